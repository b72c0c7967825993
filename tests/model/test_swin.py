"""Window arithmetic of the backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.model.swin import (
    PatchEmbed,
    merge_windows,
    partition_windows,
    relative_position_index,
    shifted_window_mask,
)


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), window=st.integers(1, 7))
def test_windows_merge_back(rows, columns, window):
    x = np.arange(2 * rows * columns * window**2 * 3, dtype=np.float32).reshape(2, rows * window, columns * window, 3)
    windows = partition_windows(jnp.asarray(x), window)
    assert windows.shape == (2, rows * columns, window**2, 3)
    np.testing.assert_array_equal(merge_windows(windows, rows * window, columns * window), x)


@given(window=st.integers(1, 8))
def test_relative_position_depends_only_on_the_difference(window):
    index = relative_position_index(window)
    y, x = np.divmod(np.arange(window**2), window)
    difference = np.stack([y[:, None] - y, x[:, None] - x], axis=-1).reshape(-1, 2)
    pairs = {(tuple(d), i) for d, i in zip(difference.tolist(), index.ravel().tolist(), strict=True)}
    assert len(pairs) == (2 * window - 1) ** 2
    assert index.min() == 0 and index.max() == (2 * window - 1) ** 2 - 1


def test_shifted_mask_keeps_apart_what_only_the_roll_joined():
    mask = shifted_window_mask(8, 8, window=4, shift=2)
    assert mask.shape == (4, 16, 16)
    assert (mask[0] == 0).all()  # the first window lies inside the image
    last = mask[3].reshape(4, 4, 4, 4)
    assert (last[:2, :2, :2, :2] == 0).all()
    assert (last[:2, :2, 2:, :] == -100).all()


def test_padding_has_no_larger_gradient_than_what_is_in_the_image():
    """Of zeros a norm's gradient is 1 / sqrt(epsilon), and norms follow one another."""
    embed = PatchEmbed(16, jnp.float32)
    image = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    weights = jax.random.normal(jax.random.key(1), (1, 4, 4, 16))
    params = embed.init(jax.random.key(2), image)

    def norm_of_gradient(pixels):
        return optax.global_norm(jax.grad(lambda p: jnp.sum(weights * jnp.asarray(embed.apply(p, pixels))))(params))

    assert norm_of_gradient(jnp.zeros_like(image)) < 3 * norm_of_gradient(image)
