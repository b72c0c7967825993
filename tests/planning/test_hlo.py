"""Reading HLO text: shapes, loops whose length is known from their counters, device groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.planning.hlo import Array, parse, parse_arrays, parse_groups, trip_count


def loop_text(start: int, step: int, limit: int, direction: str, *, known: str = "") -> str:
    """A while loop as the compiler for TPUs prints it: the limit comes through the loop's tuple, as a constant."""
    return f"""HloModule jit_f, is_scheduled=true

%inside (p: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %by = s32[] constant({step})
  ROOT %next = s32[] add(%p, %by)
}}

%body (state: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {{
  %state = (s32[]{{:T(128)}}, s32[], /*index=2*/f32[4]{{0:T(128)S(1)}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %moved = s32[] copy(%i)
  %stepped = s32[]{{:T(128)}} fusion(%moved), kind=kLoop, calls=%inside
  %most = s32[] get-tuple-element(%state), index=1
  %x = f32[4] get-tuple-element(%state), index=2
  ROOT %after = (s32[], s32[], f32[4]) tuple(%stepped, %most, %x)
}}, execution_thread="sparsecore"

%condition (state.1: (s32[], s32[], f32[4])) -> pred[] {{
  %state.1 = (s32[], s32[], f32[4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %most.1 = s32[] get-tuple-element(%state.1), index=1
  ROOT %less = pred[] compare(%i.1, %most.1), direction={direction}
}}

ENTRY %main (x.1: f32[4]) -> f32[4] {{
  %x.1 = f32[4] parameter(0)
  %first = s32[] constant({start})
  %limit = s32[] constant({limit})
  %begin = (s32[], s32[], f32[4]) tuple(%first, %limit, %x.1)
  %loop = (s32[], s32[], f32[4]) while(%begin), condition=%condition, body=%body{known}
  ROOT %out = f32[4] get-tuple-element(%loop), index=2
}}
"""


def trips_of(text: str) -> int | None:
    program = parse(text)
    entry = program.computations[program.entry]
    (loop,) = [x for x in entry.instructions.values() if x.opcode == "while"]
    return trip_count(program, entry, loop)


@given(st.integers(-50, 50), st.integers(1, 7), st.integers(-50, 200), st.sampled_from(["LT", "LE"]))
def test_a_loop_runs_as_often_as_its_counter_says(start, step, limit, direction):
    expected = len(range(start, limit + (direction == "LE"), step))
    assert trips_of(loop_text(start, step, limit, direction)) == expected


def test_a_loop_may_count_down():
    assert trips_of(loop_text(8, -2, 0, "GT")) == 4
    assert trips_of(loop_text(8, -2, 0, "GE")) == 5


def test_what_the_compiler_knows_wins():
    known = ', backend_config={"known_trip_count":{"n":"12"}}'
    assert trips_of(loop_text(0, 1, 5, "LT", known=known)) == 12


def test_a_loop_without_end_is_unknown():
    assert trips_of(loop_text(0, 0, 5, "LT")) is None


def test_a_loop_whose_counter_does_not_move_evenly_is_unknown():
    text = loop_text(1, 3, 100, "LT").replace("add(%p, %by)", "multiply(%p, %by)")
    assert trips_of(text) is None


def test_a_loop_that_depends_on_its_data_is_unknown():
    text = loop_text(0, 1, 5, "LT").replace("%limit = s32[] constant(5)", "%limit = s32[] convert(%x.1)")
    assert trips_of(text) is None


def test_a_scan_in_a_compiled_program_has_its_length():
    compiled = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=13)[0])
    program = parse(compiled.lower(jnp.ones(4)).compile().as_text())
    counts = [
        trip_count(program, computation, x)
        for computation in program.computations.values()
        for x in computation.instructions.values()
        if x.opcode == "while"
    ]
    assert counts == [13]


def test_shapes_tell_memory_spaces_and_widths():
    arrays = parse_arrays("(bf16[1,24564,256]{2,1,0:T(8,128)(2,1)}, /*index=1*/s32[]{:S(2)}, pred[3]{0:T(1024)S(1)})")
    assert arrays == (Array("bf16", (1, 24564, 256), 0), Array("s32", (), 2), Array("pred", (3,), 1))
    assert [x.bytes for x in arrays] == [2 * 24564 * 256, 4, 3]
    assert Array("s4", (3,)).bytes == 2
    assert Array("f8e4m3fn", (5,)).bytes == 5
    assert Array("c64", (2,)).bytes == 16


def test_operands_are_read_with_and_without_their_types():
    line = "ENTRY %main () -> f32[] {{\n  %a.1 = f32[2,3]{{1,0}} parameter(0)\n  ROOT %b = f32[2,3] {} \n}}"
    for text in ("add(%a.1, %a.1)", "add(f32[2,3]{1,0} %a.1, f32[2,3]{1,0} %a.1)", "add(a.1, a.1)"):
        program = parse(line.format(text))
        assert program.computations["main"].instructions["b"].operands == ("a.1", "a.1")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3),)),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
        ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_device_groups_in_all_their_forms(text, groups):
    assert parse_groups(text, 4) == groups


@given(st.permutations(range(3)), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_every_device_is_in_one_group(order, sizes):
    count = int(np.prod(sizes))
    rows = sizes[order[0]]
    text = f"[{rows},{count // rows}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, order))})"
    groups = parse_groups(text, count)
    assert sorted(x for group in groups for x in group) == list(range(count))


def test_unreadable_groups_are_an_error():
    with pytest.raises(ValueError, match="device groups"):
        parse_groups("iota(4)", 4)


def test_other_text_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("module @jit_f {\n}")
