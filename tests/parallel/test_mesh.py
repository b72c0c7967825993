"""The mesh and batches on it, on eight CPU devices."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from configs.medglip_t import get_config
from medglip_jax.parallel.mesh import (
    AXES,
    BATCH_AXES,
    abstract_mesh,
    arrange,
    axis_sizes,
    batch_parts,
    batch_sharding,
    local_rows,
    make_mesh,
    to_global,
)


def mesh_config(data, fsdp, tensor):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize(("sizes", "shape"), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))])
def test_one_axis_takes_the_remaining_devices(sizes, shape):
    mesh = make_mesh(mesh_config(*sizes))
    assert mesh.axis_names == ("replica", "data", "fsdp", "sequence", "tensor")
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]) == shape
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_recipe_names_every_axis():
    assert set(get_config().mesh) == set(AXES) and make_mesh(get_config().mesh).shape["data"] == 8


@given(st.lists(st.integers(1, 6), min_size=5, max_size=5), st.none() | st.sampled_from(AXES))
def test_sizes_multiply_to_the_devices_and_the_free_axis_takes_what_is_left(sizes, free):
    wanted = dict(zip(AXES, sizes, strict=True))
    asked = wanted if free is None else {**wanted, free: -1}
    devices = math.prod(sizes)
    assert axis_sizes(asked, devices) == wanted
    assert tuple(abstract_mesh(asked, devices).shape.items()) == tuple(wanted.items())
    rest = devices if free is None else devices // wanted[free]
    if rest > 1:  # no size of the free axis makes it one more
        with pytest.raises(ValueError, match=r"config\.mesh is"):
            axis_sizes(asked, devices + 1)


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


def test_unknown_axis_names_the_nearest():
    with pytest.raises(ValueError, match="no axis 'fspd': did you mean fsdp"):
        make_mesh({"fspd": 8})


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def fake_devices(slices=1, processes=1, count=8):
    """Devices in the order of their ids; slices take turns, as they may."""
    return [FakeDevice(i, slice_index=i % slices, process_index=i * processes // count) for i in range(count)]


def slices_along(grid, axis):
    """The sets of slices that neighbours along an axis lie in."""
    rows = np.moveaxis(grid, AXES.index(axis), -1).reshape(-1, grid.shape[AXES.index(axis)])
    return {tuple(device.slice_index for device in row) for row in rows}


def test_replicas_are_the_slices():
    grid = arrange(fake_devices(slices=2), axis_sizes({"replica": 2, "fsdp": 2, "tensor": 2}, 8))
    assert grid.shape == (2, 1, 2, 1, 2) and len(set(device.id for device in grid.flat)) == 8
    assert slices_along(grid, "replica") == {(0, 1)}
    assert slices_along(grid, "fsdp") == slices_along(grid, "tensor") == {(0, 0), (1, 1)}


def test_slices_go_to_the_outermost_axes_that_take_them():
    grid = arrange(fake_devices(slices=4), axis_sizes({"replica": 2, "data": 4}, 8))
    assert slices_along(grid, "replica") == {(0, 2), (1, 3)}
    assert slices_along(grid, "data") == {(0, 0, 1, 1), (2, 2, 3, 3)}
    grid = arrange(fake_devices(slices=2), axis_sizes({"fsdp": 4, "tensor": 2}, 8))
    assert slices_along(grid, "fsdp") == {(0, 0, 1, 1)} and slices_along(grid, "tensor") == {(0, 0), (1, 1)}


def test_tensor_axis_over_slices_is_refused():
    with pytest.raises(ValueError, match=r"2 slices.*set config\.mesh\.replica to 2"):
        arrange(fake_devices(slices=2), axis_sizes({"tensor": 8}, 8))


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"sequence": 8}, {"sequence": 4, "tensor": 2}])
def test_devices_that_share_an_image_are_of_one_process(sizes):
    with pytest.raises(ValueError, match=r"sequence times config\.mesh\.tensor is 8"):
        make_mesh(sizes, fake_devices(processes=2))
    make_mesh({"data": 2, "sequence": 2, "tensor": 2}, fake_devices(processes=2))


def test_batch_is_split_over_replica_data_and_fsdp_and_strings_stay():
    mesh = make_mesh({"replica": 2, "data": 1, "fsdp": 2, "sequence": 2})
    batch = {"image": np.arange(8 * 2, dtype=np.uint8).reshape(8, 2), "image_id": np.array(["a"] * 8)}
    arrays = to_global(batch, mesh)
    assert set(arrays) == {"image"} and batch_parts(mesh) == 4
    assert arrays["image"].sharding.spec == PartitionSpec(BATCH_AXES)
    assert {shard.data.shape for shard in arrays["image"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(arrays["image"], batch["image"])


def test_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"6 images .* replica=1 times data=2 times fsdp=2: .* multiple of 4"):
        to_global({"image": np.zeros((6, 2))}, make_mesh(mesh_config(2, 2, 2)))


def test_rows_of_a_process_are_those_that_its_devices_hold(monkeypatch):
    """As on TPUs, where neighbours in the mesh need not be of the process that comes next."""
    devices = [jax.devices()[place] for place in (0, 1, 6, 7, 4, 5, 2, 3)]
    mesh = Mesh(np.array(devices).reshape(1, 4, 2, 1, 1), AXES)
    assert local_rows(mesh, 16) == list(range(16))  # one process holds all
    sharding = type(batch_sharding(mesh))
    held = sharding.devices_indices_map
    monkeypatch.setattr(
        sharding,
        "addressable_devices_indices_map",
        lambda self, shape: {d: part for d, part in held(self, shape).items() if d.id in (2, 3, 6)},
    )
    assert local_rows(mesh, 16) == [4, 5, 12, 13, 14, 15]
