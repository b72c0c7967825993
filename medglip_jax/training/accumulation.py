"""A step of a global batch that is larger than the memory: its gradient as a sum over micro-batches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medglip_jax.parallel.activations import constrain_parameters
from medglip_jax.parallel.mesh import BATCH_AXES, batch_parts

Batch = Mapping[str, jax.Array]


def split_batch(batch: Batch, count: int, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Cuts a batch into micro-batches, each of which takes its share of the rows of every part of the mesh.

    Rows stay on the device where they are: micro-batch k has the k-th share of each device's rows, in their order.

    Args:
        batch: arrays [B, ...], split over the mesh as `batch_sharding` says.
        count: of micro-batches.
        mesh: from `make_mesh`, or None.

    Returns:
        Arrays [count, B / count, ...].

    Raises:
        ValueError: B is no multiple of the parts of the mesh times `count`.
    """
    parts = 1 if mesh is None else batch_parts(mesh)

    def place(x: jax.Array, *axes: Any) -> jax.Array:
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def split(name: str, x: jax.Array) -> jax.Array:
        if x.shape[0] % (parts * count):
            raise ValueError(
                f"a batch of {x.shape[0]} rows ({name}) cannot be taken in {count} micro-batches over {parts} parts of "
                f"the mesh: make config.data.batch_size a multiple of {parts * count}, or change "
                "config.training.accumulation"
            )
        rows = place(x.reshape(parts, count, -1, *x.shape[1:]), BATCH_AXES)  # [parts, count, B / (parts count), ...]
        rows = place(jnp.moveaxis(rows, 1, 0), None, BATCH_AXES)
        return place(rows.reshape(count, -1, *x.shape[1:]), None, BATCH_AXES)

    return {name: split(name, x) for name, x in batch.items()}


def accumulate_gradients(
    loss_of: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Any]],
    params: Any,
    micro_batches: Batch,
    key: jax.Array,
) -> tuple[Any, Any]:
    """Sums gradients and metrics over micro-batches, one after another.

    It is the gradient of the whole batch where the losses of the micro-batches sum to its loss: so what they are
    divided by must be counted over the whole batch.

    Args:
        loss_of: (params, batch, key) -> (loss, metrics), differentiable in params; metrics are summed too.
        params: the parameters.
        micro_batches: arrays [count, b, ...], from `split_batch`.
        key: of random numbers; each micro-batch gets another one, folded from it.

    Returns:
        Gradients, in the types and on the places of the parameters, and metrics.
    """
    count = len(next(iter(micro_batches.values())))
    gradient_of = jax.grad(loss_of, has_aux=True)

    def add(sums: tuple[Any, Any], inputs: tuple[jax.Array, Batch]) -> tuple[tuple[Any, Any], None]:
        number, batch = inputs
        gradients, metrics = jax.tree.map(jnp.add, sums, gradient_of(params, batch, jax.random.fold_in(key, number)))
        return (constrain_parameters(gradients, ""), metrics), None

    first = jax.tree.map(lambda x: x[0], dict(micro_batches))
    shapes = jax.eval_shape(gradient_of, params, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = constrain_parameters(zeros[0], ""), zeros[1]
    sums, _ = jax.lax.scan(add, start, (jnp.arange(count), dict(micro_batches)))
    return sums
