"""GLIP-L on Med-GLIP style records: Swin-L and a tower of eight blocks, 430 M parameters.

Defaults are the original's (Microsoft GLIP, glip_Swin_L.yaml), except that no part of the backbone is frozen.
Not trained here: it is a pod-scale recipe.

    python -m medglip_jax.train --config configs/medglip_l.py --workdir DIR \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation
"""

from ml_collections import ConfigDict

from configs import medglip_t


def get_config() -> ConfigDict:
    config = medglip_t.get_config()

    config.model.remat = "blocks"  # 22 thousand pixels times 24 blocks of activations do not fit one device otherwise
    config.model.swin.embed_dim = 192
    config.model.swin.depths = (2, 2, 18, 2)
    config.model.swin.num_heads = (6, 12, 24, 48)
    config.model.swin.window = 12
    config.model.swin.drop_path = 0.4
    config.model.tower.num_blocks = 8

    config.optimizer.weight_decay = 0.01
    config.optimizer.ema = 0.0  # the original keeps no average of the large model
    return config
