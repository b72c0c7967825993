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


_SHARES = {"accuracy": "Acc@0.5", "pointing": "pointing", "false_phrases": "absent boxed"}  # columns of grounding


def _table(title: str, entries: Mapping[str, Mapping[str, Any]], count: str, shares: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("AP", "AP50", *shares.values(), count):
        table.add_column(name, justify="right")
    for name, entry in entries.items():
        values = [_percent(entry[share]) for share in ("AP", "AP50", *shares)]
        table.add_row(name, *values, str(entry[count]))
    return table


def _sentences(results: Mapping[str, Any]) -> str:
    """Returns what the columns of grounding mean, and how far the boxes agree with the hierarchy."""
    consistency, threshold = results["consistency"], results["score_threshold"]
    lines = [
        f"Acc@0.5 {_percent(results['accuracy'])}, pointing {_percent(results['pointing'])}: best boxes that meet a "
        "true one at IoU 0.5, whose centre is in one",
        f"absent boxed {_percent(results['false_phrases'])}: absent phrases with a box of score {threshold:g} and "
        f"more, in {_percent(results['false_images'])} of images",
        f"of such boxes {_percent(consistency['score_violations'])} score above a broader name of theirs, and "
        f"{_percent(consistency['outside'])} lie mostly outside of their organ",
    ]
    if broader := results.get("broader"):
        lines.append(
            f"{broader['phrases']} broader names: AP {_percent(broader['AP'])}  AP50 {_percent(broader['AP50'])}  "
            f"Acc@0.5 {_percent(broader['accuracy'])}"
        )
    return "\n".join(lines)


def _mask_table(masks: Mapping[str, Any]) -> Table:
    """Phrases by the number of images that show them, then all of them."""
    table = Table(title=f"Masks, on {masks['images']} images", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("Dice", "IoU", "HD95 mm", "HD95 px", "false area", "missed", "images"):
        table.add_column(name, justify="right")
    ordered = dict(sorted(masks["per_phrase"].items(), key=lambda item: (-item[1]["pairs"], item[0])))
    for name, entry in (ordered | {"all": masks}).items():
        distances = ["-" if entry[key] is None else f"{entry[key]:.1f}" for key in ("hd95_mm", "hd95_px")]
        percents = [_percent(entry[key]) for key in ("dice", "iou", "false_area")]
        table.add_row(name, *percents[:2], *distances, percents[2], str(entry["missed"]), str(entry["pairs"]))
    if "AP" in masks:
        table.caption = "  ".join(f"mask {name} {_percent(masks[name])}" for name in ("AP", "AP50", "AP75"))
    return table


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints results as tables, in percent: phrases with ground truth (most boxes first), levels, modalities, and all.

    What older results lack is left out.
    """
    console = console or Console()
    shown = {name: entry for name, entry in results["per_class"].items() if entry["count"]}
    ordered = dict(sorted(shown.items(), key=lambda item: (-item[1]["count"], item[0])))
    console.print(_table("Phrases", ordered, "count", {}))
    if missing := len(results["per_class"]) - len(shown):
        console.print(f"not shown by any image: {missing} more", highlight=False)
    grounded = "per_level" in results
    if grounded:
        console.print(_table("Levels", results["per_level"], "count", _SHARES))
    if len(results["per_modality"]) > 1:
        console.print(_table("Modalities", results["per_modality"], "images", _SHARES if grounded else {}))
    if grounded:
        console.print(_sentences(results), highlight=False)
    if masks := results.get("masks"):
        console.print(_mask_table(masks))
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
