"""The bound of a step, and the chips that it is for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.planning.chips import CHIPS, GIB
from medglip_jax.planning.measurement import Measurement
from medglip_jax.planning.topology import parse_topology

CHIP = CHIPS["v5e"]


def measurement(**fields):
    return Measurement(**({"fits": True} | fields))


def test_each_resource_takes_its_bytes_over_its_rate():
    m = measurement(flops=197e12, hbm_bytes=2 * 819e9, sent_ici=180e9, sent_dcn=4 * 3.125e9)
    bound = m.roofline(CHIP, 16, images=32, model_flops_per_image=49.25e12)
    assert (bound.compute, bound.memory, bound.ici, bound.dcn) == pytest.approx((1, 2, 1, 4))
    assert bound.bound_by == "dcn"
    assert bound.seconds == pytest.approx(4)
    assert bound.seconds_serial == pytest.approx(8)
    # 32 images of a quarter of a chip-second each, on 16 chips: half a second of work.
    assert bound.mfu(bound.seconds) == pytest.approx(0.125)


@given(
    st.floats(1e6, 1e15),
    st.floats(0, 1e12),
    st.floats(0, 1e12),
    st.floats(0, 1e12),
    st.integers(1, 4096),
    st.floats(0.1, 1.0),
)
def test_no_bound_is_above_the_peak(flops, hbm, ici, dcn, devices, useful):
    """The program does at least the model's FLOPs, so utilisation is at most one; overlap never makes a step longer."""
    m = measurement(flops=flops, hbm_bytes=hbm, sent_ici=ici, sent_dcn=dcn)
    bound = m.roofline(CHIP, devices, images=devices, model_flops_per_image=useful * flops)
    assert bound.mfu(bound.seconds) <= 1 + 1e-9
    assert bound.seconds <= bound.seconds_serial <= 4 * bound.seconds + 1e-12


def test_a_measurement_survives_its_file():
    m = measurement(
        arguments=3, temporaries=2, outputs=1, code=4, collectives={"all-reduce": 5}, loops=[["a", 9, 8]], compile_s=1.5
    )
    fields = m.to_json()
    assert fields["bytes_per_device"] == {"arguments": 3, "temporaries": 2, "outputs": 1, "code": 4, "total": 10}
    assert Measurement.from_json(fields | {"eval": None}) == m


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_the_table_is_plausible_and_has_sources(chip):
    assert chip.sources.startswith("https://docs.cloud.google.com/tpu/docs/")
    assert 16 * GIB <= chip.hbm <= 95 * GIB
    assert chip.dcn < chip.link < chip.hbm_bandwidth
    assert 100 < chip.flops / chip.hbm_bandwidth < 1000  # FLOPs for each byte that balance a chip
    assert chip.ici_bandwidth == 2 * chip.dimensions * chip.link


def test_topologies_are_read():
    topology = parse_topology("v5p:4x4x8", 2)
    assert (topology.num_devices, topology.dims, str(topology)) == (256, (4, 4, 8), "2 x v5p:4x4x8")
    assert parse_topology("v5e:1x1").host == (1, 1, 1)
    assert parse_topology("v6e:2x4").host == (2, 4, 1)
    assert parse_topology("v5e:16x16").host == (2, 2, 1)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e", 1, "expected one of v4, v5e, v5p, v6e"),
        ("h100:8x8", 1, "expected one of"),
        ("v5e:4x4x4", 1, "v5e has 2 dimensions, as v5e:4x4"),
        ("v4:4x4", 1, "v4 has 3 dimensions"),
        ("v5e:32x32", 1, "a pod of v5e has 256 chips; take several slices"),
        ("v5e:3x4", 1, "a host of v5e has 2x2x1 chips"),
        ("v5e:4x4", 0, "--slices 0"),
    ],
)
def test_impossible_topologies_are_errors(text, slices, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text, slices)
