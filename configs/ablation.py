"""Plain GLIP, small, on a mixed corpus of eight modalities: what benchmarks/ablations.py adds its parts to.

Everything that teaches prompts, modalities, hierarchy or masks is off. docs/benchmarks.md tells what they change.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()

    config.data.balance_modalities = 0.5  # half of the images are smears and nuclei
    config.data.max_boxes = 64

    config.evaluation.broader_phrases = True  # "tumor" for a liver tumor, beside the names of the records

    config.schedule.steps = 400
    config.training.checkpoint_every = 400
    config.training.log_every = 25
    return config
