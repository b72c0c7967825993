"""A folder of compiled programs, so that a run that starts again need not compile."""

import argparse
import os

import jax


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --compilation-cache to a command."""
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keep compiled programs there, for the next start; a folder that all hosts share, or gs://BUCKET/DIR",
    )


def keep_compiled(directory: str | os.PathLike[str] | None) -> None:
    """Keeps every program that is compiled from now on, small ones too, and takes those that are there.

    In a run of several hosts the first one writes, and all read.

    Args:
        directory: made if needed; gs:// and s3:// as JAX allows them (etils.epath with its file system). None keeps
            nothing, or what JAX_COMPILATION_CACHE_DIR says.

    Raises:
        OSError: the folder cannot be made.
    """
    if directory is None:
        return
    directory = os.fspath(directory)
    if "://" not in directory:
        directory = os.path.abspath(directory)
        os.makedirs(directory, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
