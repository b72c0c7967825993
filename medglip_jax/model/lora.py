"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the model, which does not know of them.

The parameters of a run with adapters have a subtree `lora`: an adapter of a/b/kernel [in, out] is lora/a/b with a
[in, rank] and b [rank, out], and the model is called with kernel + alpha / rank * a @ b.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

LORA = "lora"  # the subtree
_KERNEL = "/kernel"


def make_adapters(params: Any, kernels: Sequence[str], rank: int, rng: jax.Array) -> dict[str, Any]:
    """Returns adapters that change nothing yet.

    `a` is drawn from a normal distribution of variance 1 / in, by the name of its kernel, whichever others have an
    adapter; `b` is zero.

    Args:
        params: parameters of the model.
        kernels: paths of those that get an adapter.
        rank: inner width.
        rng: random key.

    Returns:
        The subtree `lora`, float32.

    Raises:
        ValueError: one of them is no kernel of a dense layer, [in, out].
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    adapters = {}
    for path in kernels:
        shape = flat[path].shape
        if not path.endswith(_KERNEL) or len(shape) != 2:
            raise ValueError(
                f"config.finetune.lora_patterns: {path} {tuple(shape)} is no kernel of a dense layer, [in, out]: only "
                "these have adapters"
            )
        inputs, outputs = shape
        module = path.removesuffix(_KERNEL)
        key = jax.random.fold_in(rng, zlib.crc32(module.encode()))
        adapters[f"{module}/a"] = jax.random.normal(key, (inputs, rank)) * inputs**-0.5
        adapters[f"{module}/b"] = jnp.zeros((rank, outputs))
    return traverse_util.unflatten_dict(adapters, sep="/")


def without_adapters(params: Any) -> Any:
    """Returns the parameters without the subtree `lora`."""
    return {name: part for name, part in params.items() if name != LORA}


def merge_adapters(params: Any, alpha: float) -> Any:
    """Returns the parameters with the adapters added to their kernels, without `lora`; as they are if there is none.

    Args:
        params: nested dict of NumPy arrays, or of JAX arrays.
        alpha: an adapter adds alpha / rank * a @ b, computed in float32 on any device.
    """
    if LORA not in params:
        return params
    flat: dict[str, Any] = traverse_util.flatten_dict(without_adapters(params), sep="/")
    adapters: dict[str, Any] = traverse_util.flatten_dict(params[LORA], sep="/")
    for module in (path.removesuffix("/a") for path in adapters if path.endswith("/a")):
        a, b = adapters[f"{module}/a"], adapters[f"{module}/b"]
        flat[module + _KERNEL] = flat[module + _KERNEL] + alpha / a.shape[1] * _product(a, b)
    return traverse_util.unflatten_dict(flat, sep="/")


def _product(a: Any, b: Any) -> Any:
    if isinstance(a, np.ndarray):
        return a @ b
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # a TPU's default is bfloat16
