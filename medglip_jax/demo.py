"""The whole way through in a few minutes: data set, training, evaluation, export, pictures.

    python -m medglip_jax.demo --workdir DIR [--data FOLDER] [--config.path.to.field=value ...]

Without --data it draws phantoms; with it, a folder of annotated images in any layout that `data_pipelines.build` reads.
The same command goes on where an interrupted one stopped.
"""

import argparse
import json
import os
import pathlib
import sys
import time

from ml_collections import ConfigDict

from data_pipelines.build import build
from data_pipelines.curate import SourceError
from data_pipelines.records import METADATA_FILE, read_metadata
from data_pipelines.sources import load_source
from data_pipelines.sources.phantoms import LEAST_SIZE, Phantoms
from medglip_jax.configuration import load_config
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import print_results, write_json
from medglip_jax.export import export
from medglip_jax.pretrained import load_model
from medglip_jax.train import EVALUATION_FILE, SHEET_FILE, train
from medglip_jax.training.checkpoint import CHECKPOINTS

RECORDS, EXPORT = "records", "export"  # folders in the working directory
DEMO_FILE = "demo.json"  # which data the working directory was made from
PHANTOMS = 2500  # images drawn
MODALITIES = ("xray", "mri", "fundus", "microscopy", "dermoscopy")  # what five minutes of a CPU can learn
EVAL_FRACTION = {"phantoms": 0.06, "folder": 0.2}


def make_records(workdir: pathlib.Path, data: str, config: ConfigDict, count: int) -> pathlib.Path:
    """Builds the records of the demo, or finds those of an earlier call.

    Args:
        workdir: of the demo.
        data: folder of annotated images, or "" for phantoms.
        config: the recipe; phantoms are drawn in the size of its canvas.
        count: phantoms to draw.

    Returns:
        The records directory, with the splits train and validation.

    Raises:
        SourceError, RecordsError: the folder cannot be used.
        ValueError: the working directory belongs to other data.
    """
    records = workdir / RECORDS
    origin = {"data": os.path.realpath(data) if data else "", "phantoms": 0 if data else count}
    if (records / METADATA_FILE).is_file():
        try:
            known = json.loads((workdir / DEMO_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if known != origin:
            raise ValueError(f"{workdir} holds a demo of other data: remove it, or choose another --workdir")
        read_metadata(records)
        return records
    write_json(origin, workdir / DEMO_FILE)
    if not data:
        side = max(min(config.data.canvas), LEAST_SIZE)
        source = Phantoms(count, size=side, modality=MODALITIES)
        build(source, records, name="phantoms", eval_fraction=EVAL_FRACTION["phantoms"])
        return records
    source = load_source("auto", data, dataset="demo")
    if len(source) < 2:
        raise SourceError(f"{data} has one image: the demo needs one to train on and another to evaluate on")
    build(source, records, name="demo", eval_fraction=EVAL_FRACTION["folder"], on_error="skip", unmapped="keep")
    return records


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the demo and prints what it made."""
    parser = argparse.ArgumentParser(
        prog="medglip demo",
        description="Builds a data set, trains on it, evaluates, exports and draws predictions.",
        epilog="Fields of the recipe are set as --config.group.field=value.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", default="demo_run", metavar="DIR", help="where all of it goes; default: demo_run")
    parser.add_argument("--data", default="", metavar="FOLDER", help="annotated images; default: phantoms")
    parser.add_argument("--config", default="demo", metavar="FILE", help="recipe; default: configs/demo.py")
    options, overrides = parser.parse_known_args(argv)

    started = time.monotonic()
    workdir = pathlib.Path(options.workdir).resolve()
    config = load_config(options.config, overrides)
    records = make_records(workdir, options.data, config, PHANTOMS)
    config.data.train, config.data.eval = f"{records}:train", f"{records}:validation"

    results = train(config, workdir)
    assert results is not None
    _, params, config, tokenizer = load_model(workdir)
    weights = export(params, config, tokenizer, workdir / EXPORT)

    print_results(results)
    checkpoint = max((workdir / CHECKPOINTS).glob("[0-9]*"), key=lambda path: int(path.name))
    print(f"AP50        {results['AP50'] or 0:.3f} ({workdir / EVALUATION_FILE})")
    print(f"checkpoint  {checkpoint}")
    print(f"export      {weights}")
    print(f"pictures    {workdir / SHEET_FILE}")
    print(f"in {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
