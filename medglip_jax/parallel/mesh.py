"""The device mesh, and batches on it."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from medglip_jax.parallel.distributed import initialize_distributed as initialize_distributed

# From the slowest network to the fastest. A batch is split over the first three, so devices that differ in one of them
# read different images; sequence and tensor split the work on an image, and stay within a process.
AXES = ("replica", "data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("replica", "data", "fsdp")


def axis_sizes(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Returns the size of every mesh axis, in the order of `AXES`.

    Args:
        sizes: axis to size, `config.mesh` of a recipe or part of it. An axis that is not named has size 1; one may be
            -1, for all remaining devices.
        num_devices: of the run.

    Raises:
        ValueError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    for axis in sizes:
        if axis not in AXES:
            nearest = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(AXES)}"
            raise ValueError(f"config.mesh has no axis {axis!r}: {hint}")
    result = {axis: int(sizes[axis]) if axis in sizes else 1 for axis in AXES}
    asked = ", ".join(f"{axis}={size}" for axis, size in result.items())
    free = [axis for axis, size in result.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in result.values()):
        raise ValueError(f"config.mesh is {asked}: sizes are at least 1, and one of them at most may be -1 (the rest)")
    known = math.prod(size for size in result.values() if size != -1)
    if num_devices % known or (not free and known != num_devices):
        relation = "do not divide" if free else "are not"
        raise ValueError(
            f"config.mesh is {asked}: its sizes multiply to {known}, which {relation} the {num_devices} devices; "
            f"set one axis to -1 and the others to sizes that divide {num_devices}"
        )
    if free:
        result[free[0]] = num_devices // known
    return result


def abstract_mesh(sizes: Mapping[str, int], num_devices: int) -> AbstractMesh:
    """Returns the mesh that `make_mesh` would make of so many devices, without any device; see `axis_sizes`."""
    result = axis_sizes(sizes, num_devices)
    return AbstractMesh(tuple(result.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_shape(sizes: Mapping[str, int], num_slices: int) -> dict[str, int]:
    """Returns over how many slices each axis extends: the outermost batch axes take as many as they can.

    Args:
        sizes: of all axes, from `axis_sizes`.
        num_slices: groups of devices with a fast network inside and a slow one between them (TPU slices).

    Raises:
        ValueError: the slices cannot be divided among replica, data and fsdp.
    """
    shape: dict[str, int] = dict.fromkeys(AXES, 1)
    remaining = num_slices
    for axis in BATCH_AXES:
        shape[axis] = math.gcd(remaining, sizes[axis])
        remaining //= shape[axis]
    if remaining > 1:
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"config.mesh is {asked}, but the devices are {num_slices} slices, and axes that extend over slices are "
            f"replica, data or fsdp: set config.mesh.replica to {num_slices}"
        )
    return shape


def arrange(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Lays devices out in the shape of the axes, neighbours on the inner ones; slices along the outermost.

    Args:
        devices: of the run; with several values of `slice_index` where they are of several slices.
        sizes: of all axes, from `axis_sizes`.

    Returns:
        object[replica, data, fsdp, sequence, tensor].

    Raises:
        ValueError: see `slice_shape`.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    outer = slice_shape(sizes, num_slices)
    inner = [sizes[axis] // outer[axis] for axis in AXES]
    return mesh_utils.create_hybrid_device_mesh(inner, list(outer.values()), devices, allow_split_physical_axes=True)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices of all processes in the axes replica, data, fsdp, sequence and tensor.

    Args:
        sizes: `config.mesh` of a recipe, or part of it; see `axis_sizes`.
        devices: to use some devices only; None uses all.

    Returns:
        A mesh of automatically sharded axes.

    Raises:
        ValueError: the sizes do not multiply to the number of devices or do not go with their slices, or the sequence
            or tensor axis crosses processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    complete = axis_sizes(sizes, len(devices))
    mesh = Mesh(arrange(devices, complete), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    inner = complete["sequence"] * complete["tensor"]
    for group in mesh.devices.reshape(-1, inner):
        if len({device.process_index for device in group}) > 1:
            raise ValueError(
                f"config.mesh.sequence times config.mesh.tensor is {inner}: it must divide the "
                f"{jax.local_device_count()} devices of a process, since processes read different images"
            )
    return mesh


def batch_parts(mesh: Mesh) -> int:
    """Returns how many parts a batch is split into; its number of images must be a multiple."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def describe_parts(mesh: Mesh) -> str:
    """Returns the product behind `batch_parts`, for messages: "replica=1 times data=2 times fsdp=4"."""
    return " times ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of everything in a batch: the leading axis over replica, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a global batch that the devices of this process hold, ascending.

    `to_global` puts this process's rows there in this order. On TPUs neighbours in the mesh are neighbours in the
    network, and need not be in the order of their processes.

    Args:
        mesh: from `make_mesh`.
        batch_size: images in a global batch, a multiple of `batch_parts`.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part for row in range(batch_size)[part[0]]})


def to_global(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the batches of all processes to global arrays on the mesh.

    Args:
        batch: this process's arrays, all with the same leading axis; they become its `local_rows`. Strings (image
            ids) stay on the host: they are not in the result.
        mesh: from `make_mesh`.

    Returns:
        The global arrays, sharded as `batch_sharding` says.

    Raises:
        ValueError: the images of all processes together cannot be split over the mesh.
    """
    sharding, parts = batch_sharding(mesh), batch_parts(mesh)
    processes = len({device.process_index for device in mesh.devices.flat})
    arrays = {}
    for key, value in batch.items():
        value = np.asarray(value)
        if value.dtype.kind in "USO":
            continue
        if len(value) * processes % parts:
            raise ValueError(
                f"a global batch of {len(value) * processes} images ({key}) cannot be split over {parts} parts, the "
                f"mesh axes {describe_parts(mesh)}: "
                f"set config.data.batch_size to a multiple of {parts}"
            )
        arrays[key] = jax.make_array_from_process_local_data(sharding, value)
    return arrays
