"""What a build wrote about conflicts, as an audit shows it."""

import json
import os
import pathlib
from typing import Any

from data_pipelines.audit_privacy import mask_private
from data_pipelines.conflicts import KINDS
from data_pipelines.records import RecordsError

CONFLICTS_FILE = "conflicts.json"
_TEXTS = ("dataset", "image_id", "detail")


def read_conflicts(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Returns what `ConflictReport.as_dict` wrote beside records, with private text masked; None if there is nothing.

    Raises:
        RecordsError: the file is damaged.
    """
    path = pathlib.Path(directory) / CONFLICTS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        counts = {
            kind: {str(rule): int(count) for rule, count in rules.items()} for kind, rules in content["counts"].items()
        }
        examples = [
            {
                "kind": str(example["kind"]),
                "rule": str(example["rule"]),
                **{key: mask_private(str(example.get(key, ""))) for key in _TEXTS},
                "labels": [mask_private(str(label)) for label in example.get("labels", ())],
            }
            for example in content.get("examples", ())
        ]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordsError(
            f"{path} is damaged ({type(error).__name__}: {error}): expected counts and examples of conflicts; build "
            "the records again, or remove the file"
        ) from None
    datasets = content.get("datasets", {})
    return {
        "counts": counts,
        "datasets": {mask_private(str(name)): kinds for name, kinds in datasets.items()},
        "meanings": {kind: KINDS.get(kind, "") for kind in counts},
        "examples": examples,
    }
