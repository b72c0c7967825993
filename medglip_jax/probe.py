"""Linear probe of a backbone, trained or random: AUROC of a logistic regression on its features.

    python -m medglip_jax.probe --checkpoint DIR --train RECORDS:train --data RECORDS:validation
    python -m medglip_jax.probe --config configs/X.py --train RECORDS:train --data RECORDS:validation

The checkpoint is of any task: only its backbone is read. Without one, the recipe's backbone is taken as a run of it
would begin, from random numbers or from what config.init names.
"""

import argparse
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.records import find_all_shards, find_shards
from medglip_jax.compilation_cache import add_option, keep_compiled
from medglip_jax.configuration import load_config
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.probe import make_probe
from medglip_jax.evaluation.report import print_scores, write_json
from medglip_jax.model.pretraining import make_model
from medglip_jax.parallel.distributed import initialize_distributed
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.pretrained import load_model, pretrained_parameters, start_from
from medglip_jax.training.checkpoint import locate
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state


def _initial(config: ConfigDict, mesh: Any) -> Any:
    """Returns the parameters that a run of the recipe begins with."""
    state, _ = create_state(make_model(config), config, make_optimizer(config), jax.random.key(config.seed), mesh)
    return start_from(state, pretrained_parameters(config)).params


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Probes, prints a table and writes the results."""
    parser = argparse.ArgumentParser(
        prog="medglip probe",
        description="Measures what a linear classifier reads from the features of a backbone.",
        epilog="Fields of the recipe are set as --config.group.field=value.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="recipe; default: the one the checkpoint was trained with")
    add("--checkpoint", metavar="DIR", help="a run's working directory, or an exported folder; default: a new backbone")
    add("--train", metavar="RECORDS", help="records to learn from; default: config.data.train")
    add("--data", metavar="RECORDS", help="records to measure on, as DIR or DIR:SPLIT; default: config.data.eval")
    add("--output", metavar="FILE", help="JSON file for the results")
    add("--no-ema", action="store_true", help="use the parameters themselves instead of their running average")
    add_option(parser)
    options, overrides = parser.parse_known_args(argv)
    if not (options.config or options.checkpoint):
        raise ValueError("give --checkpoint DIR, or --config FILE for a backbone as a run of it begins")

    keep_compiled(options.compilation_cache)
    initialize_distributed()
    config = load_config(options.config or locate(options.checkpoint)[0], overrides)
    config.data.train = options.train or config.data.train
    records = options.data or config.data.eval
    if not records:
        raise ValueError("no records to measure on: give --data RECORDS, or set config.data.eval")
    find_all_shards(config.data.train)  # a wrong path shows before the checkpoint is read
    find_shards(records)
    mesh = make_mesh(config.mesh)
    if options.checkpoint:
        use_ema = False if options.no_ema else None
        _, params, config, _ = load_model(
            options.checkpoint, use_ema=use_ema, config=config, mesh=mesh, pretraining=True
        )
    else:
        params = _initial(config, mesh)
    results = make_probe(config, mesh)(params, records)
    if jax.process_index() == 0:
        print_scores(results)
        if options.output:
            write_json(results, options.output)
            print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
