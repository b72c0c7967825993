"""What an evaluation leaves behind: a JSON file and a table."""

import json
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from medglip_jax.paths import write_whole


def write_json(results: Any, path: str | os.PathLike) -> None:
    """Writes a JSON file; it appears complete or not at all, and its folder is made if missing."""
    write_whole(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _table(title: str, entries: Mapping[str, Mapping[str, Any]], count: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("AP", "AP50", count):
        table.add_column(name, justify="right")
    for name, entry in entries.items():
        table.add_row(name, _percent(entry["AP"]), _percent(entry["AP50"]), str(entry[count]))
    return table


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints results as tables, in percent: phrases with ground truth (most boxes first), then modalities, then all."""
    console = console or Console()
    shown = {name: entry for name, entry in results["per_class"].items() if entry["count"]}
    ordered = dict(sorted(shown.items(), key=lambda item: (-item[1]["count"], item[0])))
    console.print(_table("Phrases", ordered, "count"))
    if missing := len(results["per_class"]) - len(shown):
        console.print(f"not shown by any image: {missing} more", highlight=False)
    if len(results["per_modality"]) > 1:
        console.print(_table("Modalities", results["per_modality"], "images"))
    console.print(
        f"[bold]AP {_percent(results['AP'])}  AP50 {_percent(results['AP50'])}  AP75 {_percent(results['AP75'])}[/bold]"
        f"  on {results['images']} images, {results['images_per_second']:.1f} images/s",
        highlight=False,
    )


def print_scores(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the results of an evaluation without boxes: by phrase and by modality where there are such, then all."""
    console = console or Console()
    for title, key in (("Phrases", "per_class"), ("Modalities", "per_modality")):
        if entries := results.get(key):
            table = Table(title=title, title_justify="left", title_style="bold")
            columns = list(next(iter(entries.values())))
            for column in ("", *columns):
                table.add_column(column, justify="right" if column else "left")
            for name, entry in entries.items():
                table.add_row(name, *(_cell(entry[column]) for column in columns))
            console.print(table)
    told = {name: value for name, value in results.items() if not isinstance(value, dict)}
    console.print("  ".join(f"{name} {_cell(value)}" for name, value in told.items()), highlight=False)


def _cell(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
