"""How the commands report mistakes: one line on stderr and exit status 1."""

import functools
import os
import sys
from collections.abc import Callable, Mapping

Main = Callable[[list[str] | None], int | None]


class Preempted(Exception):
    """A run was asked to stop, and has saved: the same command goes on.

    Attributes:
        step: steps taken.
    """

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped after step {step}; the same command goes on from there")


def reports_errors(main: Main) -> Callable[..., int]:
    """Wraps an entry point: what is wrong with the user's input becomes one line instead of a traceback.

    Our own code reports a user's mistake with a ValueError or an OSError whose message says what to do. Set
    MEDGLIP_TRACEBACK=1 to see where it was raised. Any other exception is a bug and keeps its traceback. A run that was
    preempted has done what it could: its status is 0.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (ValueError, OSError) as error:
            if os.environ.get("MEDGLIP_TRACEBACK"):
                raise
            print(f"error: {describe(error)}", file=sys.stderr)
            return 1
        except Preempted as stop:
            print(f"resume: {stop}", file=sys.stderr)
            return 0
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or "interrupted", file=sys.stderr)
            return 130

    return run


def list_mismatches(found: Mapping[str, object], wanted: Mapping[str, object], owner: str, limit: int = 5) -> str:
    """Returns a line for each array that a checkpoint and a model do not have in the same shape, "" if there is none.

    Args:
        found: shapes in the checkpoint, by path.
        wanted: shapes in the model, by path.
        owner: what the model is called: "the model", "this run".
        limit: most lines; parameters come before what belongs to an optimizer.
    """
    wrong = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
    wrong.sort(key=lambda path: not path.startswith("params/"))
    lines = [
        f"  {path}: {found.get(path, 'missing')} in the checkpoint, {wanted.get(path, 'none')} in {owner}"
        for path in wrong[:limit]
    ]
    return "\n".join(lines + [f"  and {len(wrong) - limit} more arrays"] * (len(wrong) > limit))


def describe(error: Exception) -> str:
    """Returns the message of an error; of the operating system's errors, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
