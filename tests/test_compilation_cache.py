"""A second start takes its programs from the folder of --compilation-cache."""

import subprocess
import sys

import jax
import pytest

from medglip_jax import compilation_cache, evaluate, predict, train

_START = """
import sys
import jax, jax.monitoring
from medglip_jax.compilation_cache import keep_compiled
events = []
jax.monitoring.register_event_listener(lambda event, **details: events.append(event))
keep_compiled(sys.argv[1])
jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(3.0))
print(*[events.count(f"/jax/compilation_cache/cache_{name}") for name in ("hits", "misses")])
"""


def start(folder) -> tuple[int, int]:
    """Hits and misses of a process that compiles small programs."""
    done = subprocess.run([sys.executable, "-c", _START, str(folder)], capture_output=True, text=True, check=True)
    hits, misses = map(int, done.stdout.split())
    return hits, misses


def test_second_start_compiles_nothing(tmp_path):
    folder = tmp_path / "shared" / "cache"
    hits, misses = start(folder)
    assert misses > 0 and hits == 0 and any(folder.iterdir())
    assert start(folder) == (misses, 0)


@pytest.fixture
def updates(monkeypatch):
    """What is set in JAX, which stays as it is."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


def test_buckets_are_left_to_jax(updates):
    compilation_cache.keep_compiled("gs://bucket/cache")
    assert updates["jax_compilation_cache_dir"] == "gs://bucket/cache"


def test_without_the_option_nothing_is_kept(updates):
    compilation_cache.keep_compiled(None)
    assert not updates


def test_folder_that_cannot_be_made_is_an_error(updates, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        compilation_cache.keep_compiled(tmp_path / "file")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (train, ["--config", "demo", "--workdir", "w"]),
        (evaluate, ["--checkpoint", "c"]),
        (predict, ["--checkpoint", "c", "--image", "i", "--phrases", "p"]),
    ],
    ids=["train", "evaluate", "predict"],
)
def test_commands_keep_their_programs(monkeypatch, command, options):
    kept = []

    def keep(directory):
        kept.append(directory)
        raise KeyboardInterrupt  # far enough

    monkeypatch.setattr(command, "keep_compiled", keep)
    assert command.main([*options, "--compilation-cache", "gs://b/c"]) == 130
    assert kept == ["gs://b/c"]
