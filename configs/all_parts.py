"""GLIP-T with every part of Med-GLIP: modalities, hierarchy from organ to lesion, and masks of phrases and boxes.

It is configs/modality.py with the hierarchy of configs/hierarchy.py and the mask branch on top; a run starts with the
boxes of the plain GLIP it is given. What each part was worth to a small model, and what it costs, is in
docs/benchmarks.md. Not trained at this size.

    python -m medglip_jax.train --config configs/all_parts.py --workdir DIR --config.init.model=MODEL \\
        --config.data.train=RECORDS:train --config.data.eval=RECORDS:validation
"""

from ml_collections import ConfigDict

from configs import hierarchy, modality


def get_config() -> ConfigDict:
    config = modality.get_config()
    hierarchy.turn_on(config)

    config.data.max_masks = 16  # boxes of an image whose masks it learns from, and as many phrases
    config.model.masks.kind = "both"
    return config
