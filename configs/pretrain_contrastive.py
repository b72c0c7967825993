"""Contrastive image-text pretraining of GLIP-T's two encoders, on records with captions, expressions or boxes.

Not trained here: it is a pod-scale recipe, and its rates are starting points. docs/pretraining.md has the commands, a
small form of it on phantoms, and how grounding starts from it.

    python -m medglip_jax.train --config configs/pretrain_contrastive.py --workdir DIR \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation \\
        --config.init.backbone=SWIN --config.init.language=BERT --config.data.tokenizer=BERT
"""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()
    config.pretraining.task = "contrastive"
    config.pretraining.equal_texts = "ignored"  # "no finding" is true of many images of a batch

    config.data.text = "captions"
    config.data.max_tokens = 128  # about 90 words of a report
    config.data.batch_size = 4096  # all other texts of it are negatives; SigLIP gains up to 32,768
    config.data.eval_batch_size = 512
    config.data.canvas = (448, 448)  # maps of 112, 56, 28 and 14 cells: whole windows of 7

    config.optimizer.learning_rate = 5e-4
    config.optimizer.text_scale = 1.0  # both encoders learn
    config.optimizer.bias_scale = 1.0
    config.optimizer.b2 = 0.95  # SigLIP
    config.optimizer.ema = 0.0
    config.schedule.kind = "cosine"
    config.schedule.steps = 100_000
    config.schedule.warmup_steps = 5000

    config.training.best_metric = "AUROC_within"
    return config
