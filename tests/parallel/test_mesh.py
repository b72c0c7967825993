"""The mesh and batches on it, on eight CPU devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from medglip_jax.parallel.mesh import batch_parts, initialize_distributed, make_mesh, to_global


def mesh_config(data, fsdp, tensor):
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(("sizes", "shape"), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))])
def test_one_axis_takes_the_remaining_devices(sizes, shape):
    mesh = make_mesh(mesh_config(*sizes))
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "multiply to 3, which are not the 8 devices"),
        ((4, 4, 1), "multiply to 16, which are not the 8 devices"),
        ((-1, 3, 1), "multiply to 3, which do not divide the 8 devices"),
        ((-1, -1, 1), "data=-1, fsdp=-1"),
        ((0, 1, 1), "at least 1"),
    ],
)
def test_impossible_mesh_is_refused_with_its_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh_config(*sizes))


def test_batch_is_split_over_data_and_fsdp_and_strings_stay():
    mesh = make_mesh(mesh_config(2, 2, 2))
    batch = {"image": np.arange(8 * 2, dtype=np.uint8).reshape(8, 2), "image_id": np.array(["a"] * 8)}
    arrays = to_global(batch, mesh)
    assert set(arrays) == {"image"} and batch_parts(mesh) == 4
    assert arrays["image"].sharding.spec == PartitionSpec(("data", "fsdp"))
    assert {shard.data.shape for shard in arrays["image"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(arrays["image"], batch["image"])


def test_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"6 images .* multiple of 4"):
        to_global({"image": np.zeros((6, 2))}, make_mesh(mesh_config(2, 2, 2)))


def test_one_process_needs_no_start(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    initialize_distributed()
    assert not jax.distributed.is_initialized()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        initialize_distributed()
