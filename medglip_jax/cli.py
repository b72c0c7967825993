"""`medglip <command>`: one name for the entry points."""

import difflib
import importlib
import importlib.metadata
import sys

COMMANDS = {
    "data": ("data_pipelines.commands", "look into records before training: audit"),
    "build": ("data_pipelines.build", "make records from a folder of annotated images"),
    "train": ("medglip_jax.train", "train a recipe of configs/, or go on with a run"),
    "plan": ("medglip_jax.plan", "whether a recipe fits a TPU pod, and how fast it can be there at most"),
    "evaluate": ("medglip_jax.evaluate", "average precision of a checkpoint on records"),
    "probe": ("medglip_jax.probe", "what a backbone's features show of records, by a linear probe"),
    "predict": ("medglip_jax.predict", "find phrases in images and draw the boxes"),
    "export": ("medglip_jax.export", "write a checkpoint for PyTorch"),
    "import": ("medglip_jax.import_weights", "read a GLIP checkpoint of mmdetection or Microsoft"),
    "sharding": ("medglip_jax.sharding", "where each parameter lies on a mesh, and its bytes a device"),
    "demo": ("medglip_jax.demo", "all of these in a few minutes, on phantoms or on your images"),
}


def usage() -> str:
    """Returns the help text: every command with what it does."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: medglip <command> [options]", "", *lines, "", "`medglip <command> --help` lists the options of one."]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 if there is no such command."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    command, *options = arguments
    if command == "--version":
        print(importlib.metadata.version("medglip_jax"))
        return 0
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
        print(f"error: medglip has no command {command!r}: {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0]).main(options) or 0


if __name__ == "__main__":
    sys.exit(main())
