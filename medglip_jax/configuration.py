"""Recipes: reading them from Python files and from runs, and changing single fields from the command line.

config = load_config("configs/bccd.py", ["--config.schedule.steps=100"])
"""

import ast
import difflib
import importlib
import importlib.util
import json
import os
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from medglip_jax.paths import write_whole

CONFIG_FILE = "config.json"  # in a run's working directory

_FLAG = "--config."
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class ConfigError(ValueError):
    """A recipe that cannot be read, or a field that does not exist or has another type."""


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a recipe and changes single fields of it.

    Args:
        path: the bare name of a recipe in configs ("demo"; it goes before a file or folder of that name), a Python file
            with `get_config()`, a run's working directory, an exported folder, or a JSON file that `save_config`
            wrote. Fields that a JSON file lacks, since they are newer than it, have the base recipe's values.
        overrides: command-line arguments, "--config.data.train=DIR" or "--config.data.train", "DIR". A string is taken
            as it is; tuples are Python literals, brackets may be left out; a boolean without a value is True.

    Returns:
        The recipe, locked: fields can be changed, not added. Sequences are tuples.

    Raises:
        ConfigError: the recipe is not there or unreadable, or has a field that the base recipe configs/medglip_t.py
            does not have (the error names the nearest one), or lacks one, or a value is of the wrong type; or an
            argument is not an override.
    """
    text = os.fspath(path)
    source = epath.Path(text)
    if text in recipes():
        config = importlib.import_module(f"configs.{text}").get_config()
    elif source.is_dir():
        config = _from_json(source / CONFIG_FILE)
    elif source.suffix == ".json":
        config = _from_json(source)
    else:
        config = _from_python(source)
    config = _conform(config, text, complete=source.suffix == ".py" and not source.is_dir())
    for field, value in _parse(overrides, config):
        _set(config, field, value)
    return config.lock()


def save_config(config: ConfigDict, path: str | os.PathLike[str]) -> None:
    """Writes a recipe as JSON, so that `load_config` returns an equal one."""
    write_whole(path, json.dumps(config.to_dict(), indent=2) + "\n")


def recipes() -> list[str]:
    """Returns the names of the recipes in configs."""
    import configs

    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def _from_json(path: epath.Path) -> ConfigDict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {path}: expected the --workdir of a training run, or its {CONFIG_FILE}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object with the groups of a recipe")
    return ConfigDict(fields.get("recipe", fields))  # an exported folder has it inside what Hugging Face reads


def _from_python(path: epath.Path) -> ConfigDict:
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(
            f"{path}: expected a Python file, a run's working directory, or one of the recipes {', '.join(recipes())}"
        )
    spec = importlib.util.spec_from_file_location(f"medglip_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config(): it is not a recipe")
    return module.get_config()


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _conform(config: ConfigDict, source: str, complete: bool) -> ConfigDict:
    """Returns the recipe with the types of the base recipe's fields, after checking that it has no others.

    One that is not `complete` gets the base recipe's values for the fields that it lacks.
    """
    from configs.medglip_t import get_config

    base, result = dict(_leaves(get_config())), get_config()
    given = dict(_leaves(config))
    for field in given:
        if field not in base:
            raise ConfigError(f"{source}: {_unknown(field, base)}")
    for field in base:
        if field not in given and complete:
            raise ConfigError(f"{source}: config.{field} is missing; every recipe starts from configs/medglip_t.py")
    for field, value in given.items():
        _set(result, field, _convert(value, base[field], field))
    return result


def _unknown(field: str, known: Any) -> str:
    nearest = difflib.get_close_matches(field, list(known), n=1, cutoff=0.0)[0]
    return f"there is no field config.{field}; the nearest is config.{nearest}"


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *groups, name = field.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


def _parse(arguments: Sequence[str], config: ConfigDict) -> Iterator[tuple[str, Any]]:
    """Yields the fields that command-line arguments set, with their values."""
    known = dict(_leaves(config))
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith(_FLAG):
            raise ConfigError(
                f"unknown argument {argument}; fields of the recipe are set as --config.group.field=value"
            )
        field, equals, text = argument[len(_FLAG) :].partition("=")
        if field not in known:
            inside = [name for name in known if name.startswith(f"{field}.")]
            if inside:
                raise ConfigError(f"config.{field} is a group; set one of its fields: {', '.join(inside)}")
            raise ConfigError(_unknown(field, known))
        if not equals:
            if waiting and not waiting[0].startswith("--"):
                text = waiting.pop(0)
            elif isinstance(known[field], bool):
                text = "true"
            else:
                raise ConfigError(f"--config.{field} needs a value: --config.{field}=...")
        yield field, _convert(_read(text, known[field]), known[field], field)


def _read(text: str, like: Any) -> Any:
    """Returns what a command-line value means for a field whose value is `like` now."""
    if isinstance(like, str):
        return text
    if isinstance(like, bool):
        return _BOOLEANS.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(value: Any, like: Any, field: str) -> Any:
    """Returns the value with the type of `like`: whole numbers become floats and lists tuples, nothing else changes."""
    if isinstance(like, tuple) and isinstance(value, tuple | list):
        kinds = {type(item) for item in like}
        if len(kinds) == 1 and not isinstance(like[0], tuple):
            return tuple(_convert(item, like[0], field) for item in value)
        return _tuples(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(like):
        raise ConfigError(
            f"config.{field} is {value!r} ({type(value).__name__}): expected {type(like).__name__}, such as {like!r}"
        )
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, tuple | list) else value
