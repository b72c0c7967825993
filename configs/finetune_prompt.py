"""Prompt tuning of GLIP-T: offsets of the text features of the records' phrases, everything else fixed.

Rate and weight decay are the original's (README of Microsoft GLIP).

    python -m medglip_jax.train --config configs/finetune_prompt.py --workdir DIR --config.init.model=MODEL \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation --config.data.few_shot=5

Not measured at this size.
"""

from ml_collections import ConfigDict

from configs import finetune


def get_config() -> ConfigDict:
    config = finetune.get_config()
    config.finetune.mode = "prompt"
    config.finetune.frozen = ()
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 0.25
    return config
