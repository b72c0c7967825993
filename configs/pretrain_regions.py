"""Alignment of regions with their descriptions, on records whose expressions ground to one region each.

Backbone, pyramid and text encoder of GLIP-T; most often it goes on from configs/pretrain_contrastive.py. Not trained
here: it is a pod-scale recipe, and its rates are starting points. docs/pretraining.md has the commands and how
grounding starts from it.

    python -m medglip_jax.train --config configs/pretrain_regions.py --workdir DIR \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation \\
        --config.init.model=CONTRASTIVE --config.init.patterns="'^backbone/','^language/'"
"""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()
    config.pretraining.task = "region_caption"
    config.pretraining.equal_texts = "ignored"  # "left lung" describes a region of many images of a batch

    config.data.text = "descriptions"
    config.data.max_tokens = 64
    config.data.max_descriptions = 8
    config.data.batch_size = 512  # up to 4096 regions and descriptions
    config.data.eval_batch_size = 256
    config.data.canvas = (448, 672)

    config.optimizer.text_scale = 1.0
    config.optimizer.bias_scale = 1.0
    config.optimizer.b2 = 0.95  # SigLIP
    config.optimizer.ema = 0.0
    config.schedule.kind = "cosine"
    config.schedule.steps = 50_000
    config.schedule.warmup_steps = 2000

    config.training.best_metric = "recall@1"
    return config
