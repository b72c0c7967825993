"""Optimizers that keep less than Adam: moments in bfloat16, factored second moments (Adafactor), SM3."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict, FrozenConfigDict

KINDS = ("adamw", "adafactor", "sm3")  # of `config.optimizer.kind`
MOMENT_DTYPES = ("float32", "bfloat16")  # of `config.optimizer.moment_dtype`

_DROPPED_BITS = 16  # of a float32's significand, in bfloat16


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down with the probabilities that make its expectation exact.

    Args:
        x: float32[...], finite.
        key: random key; what it draws does not depend on a mesh.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) >> _DROPPED_BITS
    return jax.lax.bitcast_convert_type(kept.astype(jnp.uint16), jnp.bfloat16)


def scale_by_bfloat16_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with both moments kept in bfloat16; arithmetic is float32.

    bfloat16 has eight bits: with b2 = 0.999 a step changes the second moment by less than half a unit of the last of
    them, and rounded to the nearest it would never move. So it is rounded stochastically, which is right on average:
    with a steady gradient it wanders by about 3 % around its value, and the update by half of that. The first moment
    moves by a tenth a step (b1 = 0.9), and is rounded to the nearest.

    Args:
        b1, b2, eps: as of Adam.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params) for _ in range(2))
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m.astype(g.dtype) + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v.astype(g.dtype) + (1 - b2) * g * g, updates, state.nu)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)

        leaves, structure = jax.tree.flatten(nu)
        step_key = jax.random.fold_in(jax.random.key(0), count)
        rounded = [round_stochastically(v, jax.random.fold_in(step_key, i)) for i, v in enumerate(leaves)]
        kept = optax.ScaleByAdamState(
            count=count,
            mu=jax.tree.map(lambda m: m.astype(jnp.bfloat16), mu),
            nu=jax.tree.unflatten(structure, rounded),
        )
        return jax.tree.map(direction, mu, nu), kept

    return optax.GradientTransformation(init, update)


def _vectors_for_scalars(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows single numbers to a transformation as vectors of one: optax's SM3 fails on arrays without dimensions."""

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(1) if x.ndim == 0 else x, tree)

    def init(params: Any) -> Any:
        return inner.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled, state = inner.update(widen(updates), state, None if params is None else widen(params))
        return jax.tree.map(lambda x, like: x.reshape(like.shape), scaled, updates), state

    return optax.GradientTransformation(init, update)


def scale_by_moments(settings: ConfigDict | FrozenConfigDict) -> optax.GradientTransformation:
    """Returns what a kind of optimizer makes of gradients, before decay and learning rate.

    Args:
        settings: `config.optimizer` of a recipe; reads `kind`, `moment_dtype`, `b1`, `b2`, `eps` and `factored`.

    Raises:
        ValueError: the kind or the type is unknown, or they do not go together.
    """
    kind, dtype = settings.kind, settings.moment_dtype
    if kind not in KINDS:
        raise ValueError(f"config.optimizer.kind is {kind!r}: expected one of {', '.join(KINDS)}")
    if dtype not in MOMENT_DTYPES:
        raise ValueError(f"config.optimizer.moment_dtype is {dtype!r}: expected one of {', '.join(MOMENT_DTYPES)}")
    if kind == "adamw":
        if dtype == "bfloat16":
            return scale_by_bfloat16_adam(settings.b1, settings.b2, settings.eps)
        return optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    if kind == "adafactor":
        factored = settings.factored
        steps = [
            optax.scale_by_factored_rms(
                decay_rate=factored.decay_rate,
                min_dim_size_to_factor=factored.min_size,
                epsilon=factored.eps,
            ),
            optax.clip_by_block_rms(factored.clip_rms),
        ]
        if settings.b1:
            steps.append(optax.ema(settings.b1, debias=False, accumulator_dtype=jnp.dtype(dtype)))
        return optax.chain(*steps)
    if dtype != "float32":
        raise ValueError("config.optimizer.moment_dtype is bfloat16, but sm3 keeps float32: set it to float32")
    # b2 = 1 sums the squares, as the paper does: optax averages with another b2, and corrects no bias.
    return _vectors_for_scalars(optax.scale_by_sm3(settings.b1, b2=1.0, eps=settings.eps))
