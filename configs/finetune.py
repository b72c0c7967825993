"""Fine-tuning of a whole GLIP-T on a few images of each label, or on all: the original's recipe for ODinW.

Values are those of Microsoft GLIP's README and configs/odinw_13/*.yaml (full fine-tuning) unless a comment says
otherwise. Its schedule follows the average precision on validation images; here the number of steps is fixed.

    python -m medglip_jax.train --config configs/finetune.py --workdir DIR --config.init.model=MODEL \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation --config.data.few_shot=5

MODEL is a run, or a folder of `medglip import` or `medglip export`. `--config.finetune.mode=heads` trains the head
alone; configs/finetune_lora.py and configs/finetune_prompt.py change this recipe. None is measured at this size.
"""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()
    config.finetune.mode = "full"
    config.finetune.frozen = (r"^backbone/(patch_embed|stage_0)",)  # FREEZE_CONV_BODY_AT 2

    config.data.batch_size = 4
    config.data.full_negatives_probability = 1.0  # every prompt names all labels, if they are not more than negatives
    config.data.caption_probability = 0.0  # names only, as labels are what is asked for
    config.data.expression_probability = 0.0
    config.data.prefix_probability = 0.0
    config.data.parents_positive_probability = 0.0
    config.data.variant_probability = 0.0

    config.optimizer.weight_decay = 0.05
    config.optimizer.ema = 0.0
    config.schedule.steps = 1000  # ours
    config.schedule.warmup_steps = 0

    config.training.checkpoint_every = 500
    return config
