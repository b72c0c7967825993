"""Evaluation of a checkpoint on records: COCO average precision for each phrase and modality.

Of a checkpoint of another task than grounding (`config.pretraining.task`), it is the evaluation of that task.

python -m medglip_jax.evaluate --checkpoint DIR --data RECORDS --output FILE.json [--config configs/X.py]
"""

import argparse
import sys

import jax

from data_pipelines.records import find_shards
from medglip_jax.compilation_cache import add_option, keep_compiled
from medglip_jax.configuration import load_config
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import print_results, write_json
from medglip_jax.evaluation.run import evaluate_records
from medglip_jax.parallel.distributed import initialize_distributed
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.pretrained import load_model
from medglip_jax.tasks import find_task
from medglip_jax.training.checkpoint import locate


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Evaluates, prints a table and writes the results."""
    parser = argparse.ArgumentParser(
        prog="medglip evaluate",
        description="Measures the average precision of a checkpoint on records.",
        epilog="Fields of the recipe are set as --config.group.field=value.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="recipe; default: the one the checkpoint was trained with")
    add("--checkpoint", required=True, metavar="DIR", help="a run's working directory, or an exported folder")
    add("--data", metavar="RECORDS", help="records, as DIR or DIR:SPLIT; default: config.data.eval")
    add("--output", metavar="FILE", help="JSON file for the results")
    add("--sheet", metavar="FILE", help="image file for a contact sheet of predicted and true boxes")
    add("--sheet-images", type=int, default=12, help="images on the contact sheet; default: %(default)s")
    add("--no-ema", action="store_true", help="use the parameters themselves instead of their running average")
    add_option(parser)
    options, overrides = parser.parse_known_args(argv)

    keep_compiled(options.compilation_cache)
    initialize_distributed()
    config = load_config(options.config or locate(options.checkpoint)[0], overrides)
    records = options.data or config.data.eval
    if not records:
        raise ValueError("no records to evaluate on: give --data RECORDS, or set config.data.eval")
    find_shards(records)  # a wrong path shows before the checkpoint is read
    mesh = make_mesh(config.mesh)
    model, params, config, tokenizer = load_model(
        options.checkpoint, use_ema=False if options.no_ema else None, config=config, mesh=mesh, pretraining=True
    )
    task = find_task(config)
    if task is not None:
        if options.sheet:
            raise ValueError(f"--sheet: config.pretraining.task {config.pretraining.task} has no boxes to draw")
        results = task.make_evaluate(model, config, mesh, tokenizer)(params, records)
    else:
        results = evaluate_records(
            model,
            params,
            config,
            records,
            mesh,
            tokenizer=tokenizer,
            sheet=options.sheet,
            sheet_images=options.sheet_images,
        )
    if jax.process_index() == 0:
        (print_results if task is None else task.print_results)(results)
        if options.output:
            write_json(results, options.output)
            print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
