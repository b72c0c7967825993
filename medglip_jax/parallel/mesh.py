"""The device mesh, its start on several hosts, and batches on it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Environment variables in which launchers leave the number of processes that they started. SLURM_NTASKS is not one of
# them: a batch script has it too, where the processes that it asks for are not started yet.
_PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def initialize_distributed() -> None:
    """Connects the processes of a run; does nothing in a run of one process, or when they are connected already.

    Call it before anything else touches a device. Cloud TPU, Slurm and Open MPI are detected by JAX. Anywhere else set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process.

    Raises:
        ValueError: JAX_COORDINATOR_ADDRESS is set without the other two.
    """
    if jax.distributed.is_initialized():
        return
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        missing = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name not in environment]
        if missing:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} not: set all three")
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            int(environment["JAX_NUM_PROCESSES"]),
            int(environment["JAX_PROCESS_ID"]),
        )
    elif any(int(environment.get(name, "1")) > 1 for name in _PROCESS_COUNTS):
        jax.distributed.initialize()
    elif "TPU_WORKER_HOSTNAMES" in environment or any(os.path.exists(path) for path in _TPU_DEVICES):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address" not in str(error):  # JAX's word for: this machine is in no cluster
                raise


def make_mesh(config: ConfigDict | FrozenConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices of all processes in the axes data, fsdp and tensor.

    Args:
        config: `config.mesh` of a recipe: the size of each axis. One may be -1, for all remaining devices.
        devices: to use some devices only; None uses all.

    Returns:
        A mesh of automatically sharded axes.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or the tensor axis crosses processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: int(config[axis]) for axis in AXES}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"config.mesh is {asked}: sizes are at least 1, and one of them at most may be -1 (the rest)")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % known or (not free and known != len(devices)):
        relation = "do not divide" if free else "are not"
        raise ValueError(
            f"config.mesh is {asked}: its sizes multiply to {known}, which {relation} the {len(devices)} devices; "
            f"set one axis to -1 and the others to sizes that divide {len(devices)}"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    mesh = jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )  # [data, fsdp, tensor]
    for group in mesh.devices.reshape(-1, sizes["tensor"]):
        if len({device.process_index for device in group}) > 1:
            raise ValueError(
                f"config.mesh.tensor is {sizes['tensor']}: it must divide the {jax.local_device_count()} devices of a "
                "process, since processes read different images"
            )
    return mesh


def batch_parts(mesh: Mesh) -> int:
    """Returns how many parts a batch is split into; its number of images must be a multiple."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of everything in a batch: the leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_global(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the batches of all processes to global arrays on the mesh.

    Args:
        batch: this process's arrays, all with the same leading axis. Strings (image ids) stay on the host: they are
            not in the result.
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
                f"mesh axes data={mesh.shape['data']} times fsdp={mesh.shape['fsdp']}: "
                f"set config.data.batch_size to a multiple of {parts}"
            )
        arrays[key] = jax.make_array_from_process_local_data(sharding, value)
    return arrays
