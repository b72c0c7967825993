"""`medglip data <command>`: one name for what is done to data before training."""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "build": ("data_pipelines.build", "make records from folders of annotated images"),
    "audit": ("data_pipelines.audit", "report what is in records, and what is wrong with them"),
    "verify": ("data_pipelines.verify", "compare the shards of records with their checksums"),
}


def usage() -> str:
    """Returns the help text: every command with what it does."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    last = "`medglip data <command> --help` lists the options of one."
    return "\n".join(["usage: medglip data <command> [options]", "", *lines, "", last])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 if there is no such command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    command, *options = words
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
        print(f"error: medglip data has no command {command!r}: {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0]).main(options)


if __name__ == "__main__":
    sys.exit(main())
