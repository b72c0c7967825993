from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.building.reading import plan_units


def cut(size, unit_size, *borders):
    return [(unit.start, unit.stop) for unit in plan_units([size], unit_size, borders)]


def test_units_end_where_volumes_do():
    assert cut(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert cut(10, 4, [0, 3, 7]) == [(0, 3), (3, 7), (7, 10)]
    assert cut(10, 4, [0, 1, 1, 2, 9]) == [(0, 2), (2, 6), (6, 10)]  # none with more examples than asked for
    assert cut(10, 20, [0, 3, 7]) == [(0, 10)]


@given(sizes=st.lists(st.integers(0, 30), max_size=3), unit_size=st.integers(1, 9), places=st.sets(st.integers(0, 30)))
def test_units_hold_every_example_once_in_order(sizes, unit_size, places):
    units = plan_units(sizes, unit_size, [sorted(places)] * len(sizes))
    assert [(unit.data_set, place) for unit in units for place in range(unit.start, unit.stop)] == [
        (data_set, place) for data_set, size in enumerate(sizes) for place in range(size)
    ]
    assert all(1 <= unit.stop - unit.start <= unit_size for unit in units)
