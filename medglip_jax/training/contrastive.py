"""The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343) over all pairs of a global batch.

Each device holds the embeddings of its own images and texts. Texts go round the devices: at each of as many steps as
there are devices, a device has the logits of its images with one device's texts and passes these on (the paper's
section 3.3). Nothing of the size of the batch squared, or of the batch times a device's part of it, exists anywhere.
The gradient is summed up on the same round, that of texts travelling with them, so the backward pass only scales it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from medglip_jax.parallel.mesh import BATCH_AXES, batch_parts

Array = jax.Array

EQUAL_TEXTS = ("negatives", "positives", "ignored")  # config.pretraining.equal_texts


def text_keys(input_ids: Array, attention_mask: Array) -> Array:
    """Returns two hashes of each text: int32[N, L], int32[N, L] -> uint32[N, 2]; padding does not count."""
    factors = np.random.default_rng(0).integers(0, 2**32, (input_ids.shape[-1], 2), np.uint32)
    tokens = jnp.where(attention_mask > 0, input_ids + 1, 0).astype(jnp.uint32)
    return jnp.sum(tokens[..., None] * factors, axis=-2, dtype=jnp.uint32)


def sigmoid_loss(
    images: Array,
    texts: Array,
    log_scale: Array,
    bias: Array,
    keys: Array,
    valid: Array,
    *,
    equal_texts: str,
    mesh: Mesh | None,
) -> Array:
    """Returns the sum over all pairs of -log sigmoid(z (exp(log_scale) image . text + bias)), over the valid rows.

    z is 1 where image and text are of one row, and -1 elsewhere.

    Args:
        images, texts: float32[N, E], of length 1; row i of both belongs together.
        log_scale, bias: float32[].
        keys: uint32[N, 2], from `text_keys`.
        valid: bool[N]; other rows are in no pair.
        equal_texts: what a pair of two rows with the same text is: "negatives" (z = -1, as in the paper), "positives"
            (z = 1), or "ignored" (it has no loss).
        mesh: whose batch axes the rows are split over; None takes all pairs at once.

    Raises:
        ValueError: another value of `equal_texts`, or N is no multiple of the parts of the mesh.
    """
    if equal_texts not in EQUAL_TEXTS:
        raise ValueError(f"config.pretraining.equal_texts is {equal_texts!r}: there are {', '.join(EQUAL_TEXTS)}")
    if mesh is not None and len(images) % batch_parts(mesh):
        raise ValueError(f"{len(images)} pairs cannot be split over the {batch_parts(mesh)} parts of the mesh")
    return _loss(mesh, equal_texts, images, texts, log_scale, bias, keys, valid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(mesh: Mesh | None, equal_texts: str, *arrays: Array) -> Array:
    return _walk(mesh, equal_texts, False, *arrays)[0]


def _forward(mesh: Mesh | None, equal_texts: str, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _walk(mesh, equal_texts, True, *arrays)


def _backward(mesh: Mesh | None, equal_texts: str, gradients: tuple[Array, ...], g: Array) -> tuple[Any, ...]:
    return *(g * gradient for gradient in gradients), None, None


_loss.defvjp(_forward, _backward)


def _walk(
    mesh: Mesh | None, equal_texts: str, differentiate: bool, *arrays: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """Returns the loss, and its gradient in images, texts, log_scale and bias (zeros where not asked for)."""
    if mesh is None:
        return _go_round(1, equal_texts, differentiate, *arrays)
    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    walk = jax.shard_map(
        functools.partial(_go_round, batch_parts(mesh), equal_texts, differentiate),
        mesh=mesh,
        in_specs=(rows, rows, whole, whole, rows, rows),
        out_specs=(whole, (rows, rows, whole, whole)),
        check_vma=False,  # axes that are no batch axes do the same work
    )
    return walk(*arrays)


def _go_round(
    parts: int,
    equal_texts: str,
    differentiate: bool,
    images: Array,
    texts: Array,
    log_scale: Array,
    bias: Array,
    keys: Array,
    valid: Array,
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """The part of one device; of all of them with `parts` 1. Arguments as in `sigmoid_loss`, of N / parts rows."""

    def total(x: Array) -> Array:
        return jax.lax.psum(x, BATCH_AXES) if parts > 1 else x

    dot = functools.partial(jnp.matmul, precision="highest")
    scale, count = jnp.exp(log_scale), jnp.maximum(total(jnp.sum(valid, dtype=images.dtype)), 1)

    def meet(carry: Any, number: Array) -> tuple[Any, None]:
        visitors, sums = carry
        texts, text_keys, text_valid, d_texts = visitors
        loss, d_images, d_log_scale, d_bias = sums
        scaled = scale * dot(images, texts.T)  # [b, b]
        logits = scaled + bias
        positive = jnp.eye(len(images), dtype=bool) & (number == 0)
        counts = valid[:, None] & text_valid
        if equal_texts != "negatives":
            equal = (keys[:, None] == text_keys).all(axis=-1)
            if equal_texts == "positives":
                positive |= equal
            else:
                counts &= positive | ~equal
        loss += jnp.sum(jax.nn.softplus(jnp.where(positive, -logits, logits)), where=counts)
        if differentiate:
            slope = jnp.where(counts, jax.nn.sigmoid(logits) - positive, 0) / count
            d_images += scale * dot(slope, texts)
            d_texts += scale * dot(slope.T, images)
            d_log_scale += jnp.sum(slope * scaled)
            d_bias += jnp.sum(slope)
        visitors = texts, text_keys, text_valid, d_texts
        if parts > 1:  # after the last step they are at home again
            onwards = [(part, (part + 1) % parts) for part in range(parts)]
            visitors = jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, onwards), visitors)
        return (visitors, (loss, d_images, d_log_scale, d_bias)), None

    zero = jnp.zeros_like(log_scale)
    start = (texts, keys, valid, jnp.zeros_like(texts)), (zero, jnp.zeros_like(images), zero, zero)
    if parts == 1:
        (visitors, sums), _ = meet(start, jnp.zeros((), jnp.int32))
    else:
        (visitors, sums), _ = jax.lax.scan(meet, start, jnp.arange(parts))
    loss, d_images, d_log_scale, d_bias = sums
    return total(loss) / count, (d_images, visitors[-1], total(d_log_scale), total(d_bias))
