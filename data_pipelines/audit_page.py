"""The page of an audit: one HTML file without scripts or links, for screens of any size, light or dark."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.audit_drawing import Picture, bar_chart, text_color
from data_pipelines.audit_findings import KINDS, LISTED

_SHOWN_ROWS = 25  # of a table or list; the others are folded away
_NOTHING = '<p class="card">Nothing found.</p>'
_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1c1e22; --faint: #5f6772; --line: #d9dde3;
  --accent: #0072b2; --error: #b3261e; --warning: #8a5a00; --info: #3c6070; --fill: #e7eff5; }
@media (prefers-color-scheme: dark) { :root { --paper: #131519; --card: #1c1f25; --ink: #e6e8ec; --faint: #9aa3af;
  --line: #333942; --accent: #56b4e9; --error: #ff8a80; --warning: #f0b94a; --info: #8fc1d4; --fill: #243240; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; } 
h3.modality { margin-top: 1.2rem; } p { margin: .3rem 0; } .faint { color: var(--faint); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin-top: .6rem; } a { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem;
  min-width: 0; }
.tile b { display: block; color: var(--tone, inherit); font-size: 1.5rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.card + .card, .card + .cards { margin-top: .8rem; } .cards .card, .tiles .card { margin-top: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: .8rem; }
.findings { columns: 32rem; column-gap: .8rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.finding, .finding + .finding { break-inside: avoid; margin: 0 0 .8rem; border-left: .3rem solid var(--tone); }
.error { --tone: var(--error); } .warning { --tone: var(--warning); } .info { --tone: var(--info); }
.badge { color: var(--tone); font-size: .8rem; font-weight: 600; text-transform: uppercase; letter-spacing: .04em; }
.finding h3 { display: flex; flex-wrap: wrap; gap: 0 .6rem; align-items: baseline; }
.finding h3 .count { margin-left: auto; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--faint); } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.wrap { white-space: normal; text-align: left; overflow-wrap: anywhere; min-width: 4.5rem; }
th.wrap { text-align: left; }
td.share { width: 22%; min-width: 5rem; } td.share i { display: block; height: .6rem; border-radius: .2rem;
  background: var(--accent); }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--accent); }
.chart { width: 100%; height: auto; display: block; } .chart .bar { fill: var(--accent); }
.chart .hit { fill: transparent; }
.chart g:hover .hit { fill: var(--fill); } .chart .axis { stroke: var(--line); }
.chart text { fill: var(--faint); font: 11px system-ui, sans-serif; text-anchor: middle; }
.pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr));
  margin-top: .7rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
@media (min-width: 34rem) { .pair { grid-column: span 2; } }
 figure { margin: 0; min-width: 0; }
img { width: 100%; height: auto; max-height: 24rem; object-fit: contain; display: block; border-radius: .3rem;
  background: #000; }
figcaption { font-size: .8rem; color: var(--faint); overflow-wrap: anywhere; margin-top: .25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .6rem; margin: .3rem 0 0; padding: 0; list-style: none;
  color: var(--ink); } .legend i { display: inline-block; min-width: 1.25em; padding: 0 .2em; margin-right: .35em;
  border-radius: .2em; text-align: center; font-style: normal; font-weight: 600; }
"""


def render_page(
    report: Mapping[str, Any],
    samples: Mapping[str, Sequence[Picture]],
    pictures: Mapping[str, Sequence[Sequence[Picture]]],
) -> str:
    """Returns the page as text.

    Args:
        report: content of audit.json.
        samples: pictures of each modality.
        pictures: pictures of each kind of finding, grouped by finding.
    """
    title = f"Audit of {html.escape(report['records'])}"
    sheets = "".join(
        f'<h3 class="modality">{html.escape(modality)}</h3><div class="pictures">{"".join(map(_figure, sheet))}</div>'
        for modality, sheet in samples.items()
    )
    findings = "".join(_finding(entry, pictures.get(entry["kind"], ())) for entry in report["findings"])
    conflicts = _conflicts(report)
    several = "findings" if len(report["findings"]) > 1 else ""
    # The policy keeps the promise that nothing is loaded from anywhere.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{title}</h1>
<p class="faint">This page holds pictures of the records: it is as confidential as they are.</p>
<nav>{_links(report)}</nav></header>
{_tiles(report)}
<main>
<h2 id="findings">Findings</h2><div class="{several}">{findings or _NOTHING}</div>
{f'<h2 id="conflicts">Conflicts</h2>{conflicts}' if conflicts else ""}
<h2 id="counts">Counts</h2>{_count_tables(report)}
<h2 id="labels">Labels</h2>{_label_tables(report)}
<h2 id="shapes">Shapes</h2><div class="cards charts">{_charts(report)}</div>
<h2 id="samples">Samples</h2>{sheets or '<p class="card">None asked for.</p>'}
<h2 id="methods">Methods</h2>{_methods(report)}
</main>
</body>
</html>
"""


def _links(report: Mapping[str, Any]) -> str:
    names = ["findings", "conflicts", "counts", "labels", "shapes", "samples", "methods"]
    if report.get("conflicts") is None:
        names.remove("conflicts")
    return "\n".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in names)


def _tiles(report: Mapping[str, Any]) -> str:
    summary, counts = report["summary"], report["counts"]
    tiles = [(_number(counts.get(name, 0)), name, "") for name in ("images", "regions")]
    tiles.append((_number(len(report["labels"])), "labels", ""))
    tiles += [(_number(summary[name]), name if name == "info" else f"{name}s", name) for name in summary]
    cells = "".join(
        f'<div class="card tile {tone if value != "0" else ""}"><b>{value}</b>{name}</div>'
        for value, name, tone in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], wide: Iterable[int] = ()) -> str:
    """A table whose first column is text; columns in `wide` wrap, a float is drawn as a share of the largest."""
    wide = set(wide)

    def cell(place: int, value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="share"><i style="width:{100 * value:.1f}%"></i></td>'
        return f"<td{' class=wrap' if place in wide else ''}>{_number(value)}</td>"

    names = "".join(f"<th{' class=wrap' if i in wide else ''}>{html.escape(name)}</th>" for i, name in enumerate(head))
    lines = ["<tr>" + "".join(cell(i, value) for i, value in enumerate(row)) + "</tr>" for row in rows]

    def table(part: Sequence[str]) -> str:
        return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{"".join(part)}</tbody></table></div>'

    if len(lines) <= _SHOWN_ROWS:
        return table(lines)
    rest = f"<details><summary>{len(lines) - _SHOWN_ROWS} more</summary>{table(lines[_SHOWN_ROWS:])}</details>"
    return table(lines[:_SHOWN_ROWS]) + rest


def _conflicts(report: Mapping[str, Any]) -> str:
    """What contradicted itself in the sources, how it was resolved, and some of each kind; "" if nothing is known."""
    conflicts = report.get("conflicts")
    if conflicts is None:
        return ""
    if not conflicts["counts"]:
        return '<p class="card">The build found none.</p>'
    rows = [
        [kind.replace("_", " "), rule.replace("_", " "), count, conflicts["meanings"].get(kind, "")]
        for kind, rules in conflicts["counts"].items()
        for rule, count in rules.items()
    ]
    table = _table(["kind", "rule", "conflicts", "meaning"], rows, wide=[3])
    lists = []
    for kind, rules in conflicts["counts"].items():
        examples = [example for example in conflicts["examples"] if example["kind"] == kind]
        total = sum(rules.values())
        if not examples:
            continue
        lines = [
            [example["dataset"], example["image_id"], ", ".join(example["labels"]), example["detail"]]
            for example in examples
        ]
        title = f"{kind.replace('_', ' ')}: {_number(len(examples))} of {_number(total)}"
        listed = _table(["data set", "image", "labels", "what was found"], lines, wide=range(4))
        lists.append(f"<details><summary>{html.escape(title)}</summary>{listed}</details>")
    note = '<p class="faint">Found when the records were built, each resolved by the rule that is named.</p>'
    return f'<div class="card">{note}{table}{"".join(lists)}</div>'


def _count_tables(report: Mapping[str, Any]) -> str:
    columns = {
        "images": "images",
        "images_without_boxes": "without boxes",
        "regions": "regions",
        "regions_with_mask": "with mask",
        "crowd_regions": "crowds",
        "images_with_caption": "captions",
        "images_with_absent_labels": "with absent labels",
    }
    rows = []
    for part, entries in (
        ("split", report["splits"]),
        ("data set", report["datasets"]),
        ("modality", report["modalities"]),
    ):
        rows += [[name, part, *(entry.get(key, 0) for key in columns)] for name, entry in entries.items()]
    rows.append(["all", "", *(report["counts"].get(key, 0) for key in columns)])
    card = f'<div class="card">{_table(["", "", *columns.values()], rows)}{_curation(report)}</div>'
    sizes = _table(["image size", "images"], list(report["image_sizes"].items()))
    grains = _table(["granularity", "regions"], list(report["granularities"].items()))
    return f'{card}<div class="cards"><div class="card">{sizes}</div><div class="card">{grains}</div></div>'


def _curation(report: Mapping[str, Any]) -> str:
    lines = []
    for split, counts in report["curation"].items():
        dropped = ", ".join(f"{reason}: {count}" for reason, count in counts.get("dropped", {}).items())
        if counts.get("clipped") or dropped:
            lines.append(
                f"{split}: {counts.get('clipped', 0)} boxes clipped{f'; dropped, {dropped}' if dropped else ''}"
            )
    return "".join(f'<p class="faint">When built, {html.escape(line)}.</p>' for line in lines)


def _label_tables(report: Mapping[str, Any]) -> str:
    splits = list(report["splits"])
    totals = {name: sum(entry["regions"].values()) for name, entry in report["labels"].items()}
    largest = max([*totals.values(), 1])
    rows = [
        [
            name,
            entry["images"],
            *(entry["regions"].get(split, 0) for split in splits),
            totals[name] / largest,
            entry["granularity"],
        ]
        for name, entry in report["labels"].items()
    ]
    labels = _table(["label", "images", *(f"regions, {split}" for split in splits), "", "granularity"], rows)
    absent = _table(["absent label", "images"], list(report["absent"].items())) if report["absent"] else ""
    return f'<div class="card">{labels}</div>' + (f'<div class="card">{absent}</div>' if absent else "")


def _charts(report: Mapping[str, Any]) -> str:
    titles = {
        "box_size": ("Box size", "root of the box's area, in percent of the image's; at most", "boxes"),
        "box_aspect": ("Box aspect", "width over height, at most", "boxes"),
        "boxes_per_image": ("Boxes per image", "at most", "images"),
        "longer_side": ("Image size", "longer side in pixels, at most", "images"),
    }
    cards = []
    for key, (title, axis, unit) in titles.items():
        histogram = report["histograms"][key]
        names = [f"{edge:.2g}" if edge < 10 else f"{edge:g}" for edge in histogram["edges"]]
        names.append(f"> {names[-1]}")
        counts = histogram["counts"]
        if key == "box_size":
            names = [f"{100 * edge:.2g}" if edge < 0.1 else f"{100 * edge:.0f}" for edge in histogram["edges"]]
            names.append("> 100")
            # Nothing lies above but boxes that leave their image.
            names, counts = (names[:-1], counts[:-1]) if not counts[-1] else (names, counts)
        chart = bar_chart(title, names, counts, unit)
        cards.append(f'<div class="card"><h3>{title}</h3>{chart}<p class="faint">{html.escape(axis)}; {unit}</p></div>')
    return "".join(cards)


def _finding(entry: Mapping[str, Any], groups: Sequence[Sequence[Picture]]) -> str:
    drawn = "".join(
        f'<div class="pair">{"".join(map(_figure, group))}</div>' if len(group) > 1 else _figure(group[0])
        for group in groups
        if group
    )
    more = entry["count"] - len(entry["examples"])
    note = f'<p class="faint">and {_number(more)} more, counted only ({LISTED} are listed)</p>' if more > 0 else ""
    details = _examples(entry["examples"]) + note
    if entry["kind"] not in ("unknown_label", "unknown_phrase", "private_text", "label_not_in_train"):
        details = f"<details><summary>{len(entry['examples'])} listed</summary>{details}</details>"
    return (
        f'<section class="card finding {entry["severity"]}"><h3><span class="badge">{entry["severity"]}</span>'
        f'{html.escape(entry["title"])}<span class="count">{_number(entry["count"])}</span></h3>'
        f'<p class="faint">{html.escape(entry["advice"])}</p>{details}'
        f"{f'<div class=pictures>{drawn}</div>' if drawn else ''}</section>"
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in examples[0] if key not in ("records", "boxes", "lines")]
    rows = []
    for example in examples:
        records = ", ".join(f"{record['split']} {record['index']}" for record in example["records"])
        values = [_words(example.get(key, "")) for key in keys]
        rows.append([records, *values] if examples[0]["records"] else values)
    head = ["record", *keys] if examples[0]["records"] else keys
    return _table([key.replace("_", " ") for key in head], rows, wide=range(len(head)))


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_number(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _figure(picture: Picture) -> str:
    items = "".join(
        f'<li><i style="background:rgb{color};color:rgb{text_color(color)}">{number}</i>{html.escape(text)}</li>'
        for color, number, text in picture.legend
        if text
    )
    legend = f'<ul class="legend">{items}</ul>' if items else ""
    note = f"<br>{html.escape(picture.note)}" if picture.note else ""
    title = html.escape(picture.title)
    return (
        f'<figure><img src="{picture.uri}" width="{picture.width}" height="{picture.height}" loading="lazy" '
        f'alt="{title}"><figcaption>{title}{note}{legend}</figcaption></figure>'
    )


def _methods(report: Mapping[str, Any]) -> str:
    methods, near = report["methods"], report["methods"]["near_duplicates"]
    lines = [
        f"Records: {report['format']}. A record is named by its split and its index in it.",
        f"Same pixels: {methods['exact_duplicates']}.",
        f"Nearly the same picture: {near['hash']}; at most {near['hamming_distance']} bits apart. "
        "Turned, mirrored and cropped copies are not found.",
        f"Writing in the picture: {methods['burnt_in_text']}.",
        f"Kinds of finding that were looked for: {', '.join(kind.title.lower() for kind in KINDS.values())}.",
    ]
    return '<div class="card">' + "".join(f"<p>{html.escape(line)}</p>" for line in lines) + "</div>"
