"""What programs cost: hand-made HLO, and programs compiled for the CPU whose counts are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medglip_jax.planning.costs import Collective, CostModel
from medglip_jax.planning.hlo import parse


def cost_of(function, *arguments, devices=1):
    return CostModel(parse(jax.jit(function).lower(*arguments).compile().as_text()), devices).total()


def entry(lines: str, other: str = "") -> str:
    return f"{other}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"


def cost_of_text(lines: str, other: str = "", devices: int = 8):
    return CostModel(parse(entry(lines, other)), devices).total()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 7), st.integers(2, 9))
@settings(max_examples=8)
def test_products_count_two_for_each_pair(batch, rows, inner, columns):
    a, b = jnp.ones((batch, rows, inner)), jnp.ones((batch, inner, columns))
    lowered = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b)).lower(a, b)
    assert CostModel(parse(lowered.as_text("hlo"))).total().flops == 2 * batch * rows * inner * columns


def test_a_scan_of_products_costs_its_length():
    matrix, vector = jnp.ones((16, 16)), jnp.ones((4, 16))
    once = 2 * 4 * 16 * 16

    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=11)[0]

    cost = cost_of(scanned, vector, matrix)
    assert cost.flops == 11 * once
    assert cost.iterations == 11

    def nested(x, w):
        return jax.lax.scan(lambda c, _: (scanned(c, w), None), x, None, length=3)[0]

    cost = cost_of(nested, vector, matrix)
    assert cost.flops == 33 * once
    assert cost.iterations == 3 + 33


@given(
    st.integers(3, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(1, 3),
)
@settings(max_examples=20)
def test_convolutions_count_what_is_neither_padding_nor_hole(size, kernel, stride, padding, lhs_dilation, rhs_dilation):
    """Every output counts the taps that meet a number, and with ones everywhere the output is just that count."""
    span = (kernel - 1) * rhs_dilation + 1
    if (size - 1) * lhs_dilation + 1 + 2 * padding < span:
        return
    options = {
        "window_strides": (stride, 1),
        "padding": ((padding, padding), (0, 0)),
        "lhs_dilation": (lhs_dilation, 1),
        "rhs_dilation": (rhs_dilation, 1),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }
    x, w = jnp.ones((2, size, 5, 3)), jnp.ones((kernel, 1, 3, 4))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, **options)

    pairs = float(np.asarray(convolve(x, w)).sum())
    lowered = jax.jit(convolve).lower(x, w)
    assert CostModel(parse(lowered.as_text("hlo"))).total().flops == 2 * pairs


def test_grouped_convolutions_count_their_own_channels():
    x, w = jnp.ones((1, 5, 5, 8)), jnp.ones((1, 1, 2, 8))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    lowered = jax.jit(convolve).lower(x, w)
    assert CostModel(parse(lowered.as_text("hlo"))).total().flops == 2 * 25 * 2 * 8


def test_a_batched_product_as_the_tpu_compiler_writes_it_counts_no_holes():
    cost = cost_of_text(
        """  %a = bf16[12,256,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[12,256,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[12,256,256]{1,2,0} convolution(%a, %b), window={size=12 stride=11 lhs_dilate=12}, """
        "dim_labels=0bf_0oi->0bf"
    )
    assert cost.flops == 2 * 12 * 256 * 256 * 64


def test_cycles_that_the_compiler_notes_count_in_loops():
    other = """%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %x = f32[8] get-tuple-element(%s), index=1
  %y = f32[8] negate(%x), backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], f32[8]) tuple(%j, %y)
}
%condition (s.1: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %most = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %most), direction=LT
}"""
    lines = """  %zero = s32[] constant(0)
  %a = f32[8] parameter(0)
  %b = f32[8] negate(%a), backend_config={"estimated_cycles":"5"}
  %begin = (s32[], f32[8]) tuple(%zero, %b)
  %loop = (s32[], f32[8]) while(%begin), condition=%condition, body=%body, metadata={op_name="here"}
  ROOT %out = f32[8] get-tuple-element(%loop), index=1"""
    cost = cost_of_text(lines, other)
    assert cost.cycles == 5 + 7 * 100
    ((loop, runs),) = cost.loops
    assert (loop.op_name, loop.trips, loop.cycles, runs) == ("here", 7, 700, 1)


def test_bytes_are_told_by_module_with_the_blocks_of_a_stack_together():
    def negate(number, place):
        return f'  %x{number} = f32[8] negate(%a), metadata={{op_name="jit(train_step)/{place}"}}'

    lines = [
        "  %a = f32[8] parameter(0)",
        negate(0, "jvp(GLIP)/tower_0/dyconv/mul"),
        negate(1, "jvp(GLIP)/tower_11/dyconv/add"),
        negate(2, "transpose(jvp(GLIP))/tower_0/dyconv/mul"),
        "  %c = f32[8] negate(%x0)",
        "  ROOT %out = (f32[8], f32[8], f32[8]) tuple(%x1, %x2, %c)",
    ]
    cost = cost_of_text("\n".join(lines))
    both = 2 * 4 * 8  # read and written
    assert {name: size for name, (size, _) in cost.by_module().items()} == {
        "jvp(GLIP)/tower_*/dyconv": 2 * both,
        "transpose(jvp(GLIP))/tower_*/dyconv": both,
        "": both,
    }
    assert sum(size for size, _ in cost.by_module().values()) == cost.bytes
    assert sum(size for size, _ in cost.times(3).by_module().values()) == 3 * cost.bytes


def test_a_conditional_costs_its_dearest_branch():
    matrix = jnp.ones((8, 8))

    def branch(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert cost_of(branch, True, matrix).flops == 2 * 2 * 8**3


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))


def collectives(function, mesh, spec, shape, out):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    compiled = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(x).compile()
    return CostModel(parse(compiled.as_text()), mesh.size).total().collectives


def test_a_sum_over_devices_reduces_its_bytes(mesh):
    """A psum of 24 numbers over four devices."""

    def function(x):
        summed = jax.shard_map(
            lambda x: jax.lax.psum(x, "fsdp"),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
        )
        return summed(x)

    ((collective, runs),) = collectives(function, mesh, PartitionSpec("data"), (4, 12), PartitionSpec("data"))
    assert (collective.kind, collective.bytes, collective.members, runs) == ("all-reduce", 24 * 4, 4, 1)


def test_collectives_in_loops_run_as_often(mesh):
    def function(x):
        def shifted(x):
            def body(c, _):
                return jax.lax.ppermute(c, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

            return jax.lax.scan(body, x, None, length=5)[0]

        return jax.shard_map(shifted, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))(x)

    ((collective, runs),) = collectives(function, mesh, PartitionSpec("fsdp"), (8, 3), PartitionSpec("fsdp"))
    assert (collective.kind, collective.bytes, runs) == ("collective-permute", 2 * 3 * 4, 5)


def test_a_gather_counts_the_whole(mesh):
    ((collective, _),) = collectives(lambda x: x * 2, mesh, PartitionSpec("fsdp"), (8, 6), PartitionSpec())
    assert (collective.kind, collective.bytes, collective.members) == ("all-gather", 8 * 6 * 4, 4)


def test_started_and_done_is_one_collective():
    cost = cost_of_text(
        """  %x = f32[100] parameter(0)
  %s = (f32[100], f32[800]) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %d = f32[800] all-gather-done(%s)"""
    )
    ((collective, runs),) = cost.collectives
    assert (collective.kind, collective.bytes, runs) == ("all-gather", 3200, 1)
    assert cost.bytes == 400 + 3200  # what is sent is read, what comes is written


def test_a_reduction_of_which_each_device_keeps_a_part_is_a_scatter():
    inner = """%fused (input: f32[64]) -> f32[8] {
  %input = f32[64] parameter(0)
  %sum = f32[64] all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %part = f32[8] dynamic-slice(%sum, %id), dynamic_slice_sizes={8}
}"""
    cost = cost_of_text(
        """  %x = f32[64] parameter(0)
  ROOT %y = f32[8] fusion(%x), kind=kCustom, calls=%fused""",
        inner,
    )
    ((collective, _),) = cost.collectives
    assert (collective.kind, collective.bytes, collective.members) == ("reduce-scatter", 256, 8)


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "size", "members"),
    [
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', "all-reduce", 400, 4),
        ("ALL_GATHER", "{{100000,300000},{200000,400000}}", "all-gather", 800, 2),
        ("ONE_TO_ONE", "{{100001->200000},{100003->200001}}", "collective-permute", 400, 2),
        ("ALL_REDUCE", '"{1:16}x{0:255}"', "all-reduce", 400, 16),
    ],
)
def test_transfers_between_slices_are_the_slow_network(transfer, target, kind, size, members):
    cost = cost_of_text(
        f"""  %x = f32[100] parameter(0)
  %t = token[] after-all()
  %send = (f32[100], u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={{"""
        f"""_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target={target},"""
        f"""_xla_megascale_transfer_type="{transfer}"}}
  ROOT %done = token[] send-done(%send)"""
    )
    assert cost.collectives == ((Collective(kind, "dcn", size, members, ""), 1),)
    assert cost.bytes_by_kind() == {f"{kind} (dcn)": size}
    assert cost.sent("ici") == 0
    assert cost.bytes == 400


@given(st.sampled_from(["all-reduce", "all-gather", "reduce-scatter"]), st.integers(1, 64), st.integers(1, 10**9))
def test_no_ring_sends_more_than_twice_the_bytes(kind, members, size):
    collective = Collective(kind, "ici", size, members, "")
    whole = 2 if kind == "all-reduce" else 1
    assert collective.sent == pytest.approx(whole * size * (members - 1) / members)
    if members == 1:
        assert collective.sent == 0


def test_what_stays_on_the_chip_is_no_traffic():
    lines = """  %x = f32[100]{0:T(128)} parameter(0)
  %start = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[100]{0:T(128)S(1)} copy-done(%start)
  %y = f32[100]{0:T(128)S(1)} multiply(%near, %near)
  ROOT %z = f32[100]{0:T(128)} negate(%y)"""
    assert cost_of_text(lines).bytes == 400 + 400  # read once into the chip, written once at the end


def test_a_fusion_reads_and_writes_only_the_parts_it_takes():
    inner = """%fused (table: f32[1000,8], row: s32[], all: f32[1000,8]) -> f32[1000,8] {
  %table = f32[1000,8] parameter(0)
  %row = s32[] parameter(1)
  %all = f32[1000,8] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[1,8] dynamic-slice(%table, %row, %zero), dynamic_slice_sizes={1,8}
  %twice = f32[1,8] add(%part, %part)
  ROOT %updated = f32[1000,8] dynamic-update-slice(%all, %twice, %row, %zero)
}"""
    lines = """  %a = f32[1000,8] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[1000,8] parameter(2)
  ROOT %c = f32[1000,8] fusion(%a, %i, %b), kind=kLoop, calls=%fused"""
    assert cost_of_text(lines, inner).bytes == 32 + 4 + 32
    used_whole = inner.replace("add(%part, %part)", "add(%part, %part)\n  %sum = f32[1000,8] negate(%table)")
    assert cost_of_text(lines, used_whole).bytes == 32000 + 4 + 32


def test_gathers_and_scatters_move_rows():
    lines = """  %x = f32[1000,8] parameter(0)
  %i = s32[10,1] parameter(1)
  %u = f32[10,8] parameter(2)
  %g = f32[10,8] gather(%x, %i), offset_dims={1}
  ROOT %s = f32[1000,8] scatter(%x, %i, %u), to_apply=%add"""
    assert cost_of_text(lines).bytes == (320 + 40 + 320) + (40 + 320 + 2 * 320)
