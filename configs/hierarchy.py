"""The demo's small GLIP, taught what is a kind of what and what lies in what; see docs/hierarchy.md.

python -m medglip_jax.demo --config hierarchy --workdir DIR
"""

from ml_collections import ConfigDict

from configs import demo


def turn_on(config: ConfigDict) -> None:
    """Turns hierarchy on in a recipe."""
    config.data.parents_positive_probability = 0.5  # "skin lesion" means the box of a melanoma too
    config.data.hierarchy.ignored = ("is_a", "may_be")  # where it does not, it carries no loss there
    config.data.hierarchy.max_pairs = 32  # of a prompt of some 60 phrases
    config.data.hierarchy.containers = True
    config.data.balance_granularities = 0.5  # images with lesions come more often
    config.data.sibling_negative_share = 0.25

    config.detection.score_consistency_weight = 1.0
    config.detection.containment_weight = 0.5

    config.evaluation.broader_phrases = True


def get_config() -> ConfigDict:
    config = demo.get_config()
    turn_on(config)
    return config
