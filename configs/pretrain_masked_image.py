"""Masked image modelling (SimMIM, arXiv 2111.09886) of GLIP-T's backbone, on records of which only the images are read.

Not trained here: it is a pod-scale recipe, and its rates are starting points. docs/pretraining.md has the commands and
how grounding starts from it.

    python -m medglip_jax.train --config configs/pretrain_masked_image.py --workdir DIR \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation
"""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()
    config.pretraining.task = "masked_image"

    config.data.text = "none"
    config.data.batch_size = 2048
    config.data.eval_batch_size = 512
    config.data.canvas = (224, 224)  # 7 x 7 patches of 32 pixels; SimMIM has 192 x 192

    config.model.swin.drop_path = 0.0
    config.optimizer.learning_rate = 4e-4
    config.optimizer.bias_scale = 1.0
    config.optimizer.weight_decay = 0.05  # SimMIM
    config.optimizer.clip_norm = 5.0
    config.optimizer.ema = 0.0
    config.schedule.kind = "cosine"
    config.schedule.steps = 200_000
    config.schedule.warmup_steps = 5000

    config.training.best_metric = "AUROC_within"
    return config
