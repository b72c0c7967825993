"""The demo's small GLIP with a mask branch: a mask for every phrase, and one for every box, on phantoms.

    medglip demo --config demo_masks --workdir DIR

What it reaches is in docs/masks.md.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()

    config.data.max_masks = 16  # phantoms have fewer regions; as many phrases, a quarter of them absent ones

    config.model.masks.kind = "both"
    config.model.masks.channels = 32
    config.model.masks.num_convs = 2
    config.model.masks.norm_groups = 8
    return config
