"""Options of sources as configuration files have them, checked and turned into keywords of the source."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from data_pipelines.curate import SourceError


def _name_of(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def convert(value: Any, kind: Any) -> Any:
    """Returns a value of a configuration file as the type that a field has: lists become tuples, integers floats.

    Args:
        value: of JSON, YAML or ml_collections.
        kind: a type, `tuple[...]`, `Mapping[...]`, or a union of such.

    Raises:
        TypeError: it is something else; the message says what was expected.
    """
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for each in inner:
            try:
                return convert(value, each)
            except TypeError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if len(inner) == 2 and inner[1] is ... else inner
        if not inner:
            return tuple(value)
        if len(kinds) == len(value):
            return tuple(convert(item, each) for item, each in zip(value, kinds, strict=True))
    elif origin is Any:
        return value
    elif origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(origin, type) and isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
        return value
    raise TypeError(f"expected {_name_of(kind)}, found {value!r}")


def read_options(name: str, source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords that a source's constructor takes for these options.

    Args:
        name: of the source, for messages.
        source: its class; see `data_pipelines.sources`.
        options: values by name.

    Raises:
        SourceError: the source has no such option, or its value is of another type or not usable.
    """
    known = dict(getattr(source, "OPTIONS", {}))
    rule_fields: dict[str, Any] = {}
    if "rule" in inspect.signature(source).parameters:
        from data_pipelines.volumes import SliceRule

        hints = typing.get_type_hints(SliceRule)
        rule_fields = {field.name: hints[field.name] for field in dataclasses.fields(SliceRule)}
    kinds = {**rule_fields, **known}
    values = {}
    for option, value in options.items():
        if option not in kinds:
            near = difflib.get_close_matches(str(option), kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            has = f"it has {', '.join(kinds)}" if kinds else "it has none"
            raise SourceError(f"source {name!r} has no option {option!r}{hint}; {has}")
        try:
            values[option] = convert(value, kinds[option])
        except TypeError as error:
            raise SourceError(f"source {name!r}, option {option!r}: {error}") from None
    keywords = {option: value for option, value in values.items() if option in known}
    rule = {option: value for option, value in values.items() if option not in known}
    if rule:
        from data_pipelines.volumes import SliceRule

        try:
            keywords["rule"] = SliceRule(**rule)
        except (TypeError, ValueError) as error:
            raise SourceError(f"source {name!r}: {error}") from None
    return keywords
