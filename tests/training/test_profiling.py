"""A trace of some steps, and the programs of a run."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from medglip_jax.training.profiling import Trace, parse_steps


def test_trace_holds_the_steps_that_were_asked_for(tmp_path):
    step_fn = jax.jit(lambda x: (x @ x).sum())
    written = {}
    with Trace(tmp_path, (2, 3), start=10) as trace:
        for step in range(11, 15):
            trace.before(step)
            result = step_fn(jnp.full((64, 64), float(step)))
            trace.after(step, result)
            written[step] = bool(list(tmp_path.rglob("*.xplane.pb")))
    assert written == {11: False, 12: False, 13: True, 14: True}


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
    with Trace(tmp_path, (1, 100)) as trace:
        trace.before(1)
        trace.after(1, jnp.zeros(1) + 1)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_nothing_is_traced_unless_asked(tmp_path):
    with Trace(tmp_path, None) as trace:
        trace.before(1)
        trace.after(1, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "10", "15:10", "0:3", "a:b"])
def test_steps_that_are_none_are_told(text):
    assert parse_steps("10:15") == (10, 15)
    with pytest.raises(ValueError, match="expected the first and the last step, as in 10:15"):
        parse_steps(text)


def test_programs_are_written_as_text(tmp_path):
    program = (
        "import sys, jax; from medglip_jax.training.profiling import dump_hlo; dump_hlo(sys.argv[1]); "
        "jax.jit(lambda x: x * 3, inline=False)(1.0)"
    )
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "hlo")], env=environment, check=True)
    assert list((tmp_path / "hlo").glob("*after_optimizations.txt"))
