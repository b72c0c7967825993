"""What a run learns, behind one interface: grounding, or one of the stages before it (`config.pretraining.task`).

The model is that of `make_model`, the loss that of `make_train_step`; here is how each is evaluated and what is told.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax.linen import Module
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.text import TextTokenizer
from medglip_jax.evaluation.probe import make_probe
from medglip_jax.evaluation.report import print_scores
from medglip_jax.evaluation.retrieval import make_retrieval
from medglip_jax.evaluation.zero_shot import make_zero_shot
from medglip_jax.training.pretraining import check_pretraining

Evaluate = Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A stage of pretraining.

    Attributes:
        scores: names of numbers that an evaluation returns, the higher the better; the best of them decides by
            `config.training.best_metric`, and all are logged.
        make_evaluate: (model, config, mesh, tokenizer) -> evaluate(params, records_path, between_batches=) -> results,
            for JSON, the same on every process. What it compiles is compiled once.
        print_results: prints them.
    """

    scores: tuple[str, ...]
    make_evaluate: Callable[[Module, ConfigDict, Mesh, TextTokenizer], Evaluate]
    print_results: Callable[[Mapping[str, Any]], None] = print_scores


TASKS = {
    "contrastive": Task(("AUROC", "AUROC_within"), make_zero_shot),
    "masked_image": Task(("AUROC", "AUROC_within"), lambda model, config, mesh, tokenizer: make_probe(config, mesh)),
    "region_caption": Task(("recall@1", "recall@5"), make_retrieval),
}


def find_task(config: ConfigDict) -> Task | None:
    """Returns the stage of pretraining of a recipe; None is grounding.

    Raises:
        ValueError: see `check_pretraining`.
    """
    check_pretraining(config)
    return TASKS[config.pretraining.task] if config.pretraining.task else None
