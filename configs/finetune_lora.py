"""Fine-tuning of GLIP-T by adapters (LoRA) on attention and fusion, everything else fixed.

    python -m medglip_jax.train --config configs/finetune_lora.py --workdir DIR --config.init.model=MODEL \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation --config.data.few_shot=5

`--config.finetune.mode=heads` trains the head beside the adapters. Not measured at this size.
"""

from ml_collections import ConfigDict

from configs import finetune


def get_config() -> ConfigDict:
    config = finetune.get_config()
    config.finetune.mode = "lora"
    config.finetune.frozen = ()
    config.finetune.lora_rank = 8
    config.finetune.lora_alpha = 16.0
    config.optimizer.learning_rate = 5e-4  # ours; adapters start at 0 and bear more than kernels
    config.optimizer.weight_decay = 0.0  # ours; it would pull towards the model that is started from
    return config
