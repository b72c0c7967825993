"""`medglip <command>`, how mistakes are reported, and what importing the package loads."""

import subprocess
import sys
import types

import pytest

from medglip_jax import cli
from medglip_jax.errors import reports_errors


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in ("build", "train", "evaluate", "predict", "export", "demo"):
        assert any(line.split()[:1] == [command] and len(line.split()) > 3 for line in lines)


def test_no_command_is_a_mistake(capsys):
    assert cli.main([]) == 2
    assert "usage: medglip" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "meant"), [("evalute", "evaluate"), ("trian", "train"), ("predictions", "predict")])
def test_an_unknown_command_names_the_nearest(capsys, typed, meant):
    assert cli.main([typed]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_word_like_no_command_lists_them(capsys):
    assert cli.main(["xyz"]) == 2
    assert "build, train, plan, evaluate" in capsys.readouterr().err


def test_options_and_exit_status_pass_through(monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["train", "--workdir", "x"]) == 3
    assert seen == [["--workdir", "x"]]


@pytest.mark.parametrize("error", [ValueError("the box is empty"), FileNotFoundError(2, "No such file", "a.png")])
def test_a_mistake_is_one_line_without_traceback(capsys, error):
    @reports_errors
    def main(argv):
        raise error

    assert main([]) == 1
    message = capsys.readouterr().err
    assert message in ("error: the box is empty\n", "error: a.png: No such file\n")


def test_a_bug_keeps_its_traceback():
    @reports_errors
    def main(argv):
        raise TypeError

    with pytest.raises(TypeError):
        main([])


def test_traceback_on_request(monkeypatch):
    @reports_errors
    def main(argv):
        raise ValueError("x")

    monkeypatch.setenv("MEDGLIP_TRACEBACK", "1")
    with pytest.raises(ValueError):
        main([])


def test_importing_the_package_loads_no_framework():
    heavy = "('jax', 'torch', 'transformers', 'tensorflow', 'grain', 'flax')"
    code = f"import sys, medglip_jax, medglip_jax.cli; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
