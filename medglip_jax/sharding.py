"""Where a recipe's parameters lie on a mesh, before there is one: specs, bytes a device, and what was not split.

    python -m medglip_jax.sharding --config configs/X.py --mesh data=2,fsdp=4 [--devices N] [--json FILE]

Nothing is computed and no device is needed: shapes come from tracing the initialisation.
"""

import argparse
import math
import sys
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding
from ml_collections import ConfigDict

from medglip_jax.configuration import load_config
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import write_json
from medglip_jax.model.pretraining import make_model
from medglip_jax.parallel.mesh import abstract_mesh
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import find_placements, path_name
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import state_shapes, state_specs


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "data=2,fsdp=4".

    Raises:
        ValueError: an entry is no AXIS=SIZE, or an axis is named twice.
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        axis, _, size = (part.strip() for part in entry.partition("="))
        try:
            number = int(size)
        except ValueError:
            raise ValueError(f"--mesh {text}: {entry!r} is not AXIS=SIZE, as in data=2,fsdp=4") from None
        if axis in sizes:
            raise ValueError(f"--mesh {text}: the axis {axis} is there twice")
        sizes[axis] = number
    return sizes


def _bytes(tree: Any, specs: Any, mesh: AbstractMesh) -> dict[str, int]:
    """Returns the bytes of all arrays of a tree, and those of one device."""
    total = {"bytes": 0, "bytes_per_device": 0}
    for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        shard = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        total["bytes"] += math.prod(leaf.shape) * leaf.dtype.itemsize
        total["bytes_per_device"] += math.prod(shard) * leaf.dtype.itemsize
    return total


def describe_sharding(config: ConfigDict, mesh: AbstractMesh) -> dict[str, Any]:
    """Returns where a recipe's training state lies on a mesh.

    Args:
        config: the recipe.
        mesh: from `abstract_mesh`.

    Returns:
        What goes into the JSON file: mesh, axis to size; sharding, the preset; parameters, for each its path, shape,
        dtype, spec (for each dimension a list of mesh axes), rule, not_split (reasons, where its rule asked for more),
        bytes and bytes_per_device; totals, the same bytes of parameters, optimizer, ema, other (step and random key)
        and state; unused_rules, patterns of `config.sharding_rules` by which no parameter is placed.

    Raises:
        ValueError: see `find_placements` and `resolve_rules`.
    """
    rules = resolve_rules(config)
    shapes = state_shapes(make_model(config), config, make_optimizer(config), jax.random.key(0))
    found = find_placements(rules, shapes.params, mesh)
    placed = jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)].spec, shapes.params)
    specs = state_specs(shapes, placed)

    parameters = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params):
        place = found[path_name(path)]
        split = [[entry] if isinstance(entry, str) else list(entry or ()) for entry in place.spec]
        parameters.append(
            {
                "path": path_name(path),
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "spec": split + [[]] * (len(leaf.shape) - len(split)),
                "rule": place.pattern,
                "not_split": list(place.lost),
                **_bytes(leaf, place.spec, mesh),
            }
        )
    totals = {
        "parameters": _bytes(shapes.params, specs.params, mesh),
        "optimizer": _bytes(shapes.opt_state, specs.opt_state, mesh),
        "ema": _bytes(shapes.ema, specs.ema, mesh),
        "other": _bytes((shapes.step, shapes.rng), (specs.step, specs.rng), mesh),
        "state": _bytes(shapes, specs, mesh),
    }
    used = {place.pattern for place in found.values()}
    return {
        "mesh": dict(mesh.shape),
        "sharding": config.sharding,
        "parameters": parameters,
        "totals": totals,
        "unused_rules": [pattern for pattern, _ in config.sharding_rules if pattern not in used],
    }


def _spec_text(spec: list[list[str]]) -> str:
    return "(" + ", ".join(" x ".join(axes) if axes else "-" for axes in spec) + ")" if any(spec) else "copied"


def print_sharding(report: dict[str, Any]) -> None:
    """Prints what `describe_sharding` returned as tables."""
    sizes = report["mesh"]
    print(f"mesh {', '.join(f'{axis}={size}' for axis, size in sizes.items())}: {math.prod(sizes.values())} devices")
    print(f"config.sharding {report['sharding']}\n")
    rows = [("parameter", "shape", "dtype", "split over", "bytes a device")]
    for entry in report["parameters"]:
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        row = entry["path"], shape, entry["dtype"], _spec_text(entry["spec"]), f"{entry['bytes_per_device']:,}"
        rows.append(row)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row[:-1], widths[:-1], strict=True)]
        print("  ".join([*cells, row[-1].rjust(widths[-1])]))

    print(f"\n{'':20}{'bytes':>20}{'bytes a device':>20}")
    for name, total in report["totals"].items():
        print(f"{name:20}{total['bytes']:>20,}{total['bytes_per_device']:>20,}")

    copied = [entry for entry in report["parameters"] if not any(entry["spec"]) and not entry["not_split"]]
    largest = max(copied, key=lambda entry: entry["bytes"], default=None)
    if largest is not None:
        print(
            f"\ncopied to every device because their rule says so: {len(copied)} parameters, "
            f"{sum(entry['bytes'] for entry in copied):,} bytes; the largest is {largest['path']}, {largest['bytes']:,}"
        )
    lost = [entry for entry in report["parameters"] if entry["not_split"]]
    print(f"not split as their rule says: {len(lost)} parameters")
    for entry in lost:
        print(f"  {entry['path']}: {'; '.join(entry['not_split'])} (rule {entry['rule']})")
    for pattern in report["unused_rules"]:
        print(f"config.sharding_rules: {pattern!r} places no parameter")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="medglip sharding",
        description="Prints where each parameter of a recipe lies on a mesh, and the bytes that a device holds.",
        epilog="Fields of the recipe are set as --config.group.field=value.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="recipe, configs/X.py, or its name")
    add("--mesh", metavar="AXIS=SIZE,...", help="mesh, the axes not named have size 1; default: config.mesh")
    add("--devices", type=int, metavar="N", help="number of devices, needed where a size is -1")
    add("--json", metavar="FILE", help="JSON file for the same")
    options, overrides = parser.parse_known_args(argv)

    config = load_config(options.config, overrides)
    sizes = parse_mesh(options.mesh) if options.mesh else dict(config.mesh.items())
    if options.devices is not None and options.devices < 1:
        raise ValueError(f"--devices is {options.devices}: at least 1 is needed")
    if options.devices is None and -1 in sizes.values():
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"the mesh is {asked}, where -1 means the remaining devices: give their number with --devices")
    devices = options.devices or math.prod(sizes.values())
    report = describe_sharding(config, abstract_mesh(sizes, devices))
    print_sharding(report)
    if options.json:
        write_json(report, options.json)
        print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
