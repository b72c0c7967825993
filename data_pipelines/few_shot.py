"""A few images of each label to fine-tune on, chosen by a seed: the same in every process."""

import logging

import numpy as np

from data_pipelines.record_index import RecordIndex

_NAMED = 8  # labels that a report names

_log = logging.getLogger(__name__)


def choose_few(index: RecordIndex, count: int, seed: int) -> np.ndarray:
    """Chooses images so that each label has at least `count` of them, or all that there are.

    As few-shot samples of detection data are drawn (TFA, arXiv 2003.06957; GLIP's ODinW): in an order drawn by the
    seed, an image is taken if one of its labels still lacks images, and then counts for all of its labels. So a label
    that comes with others may have more than `count`. Images without labels are never taken.

    How many there are, and labels with fewer images than `count`, are logged.

    Args:
        index: of the N records.
        count: images of each label, `config.data.few_shot`.
        seed: `config.data.few_shot_seed`, 0 or more.

    Returns:
        int64[n], the places of the chosen records, ascending.

    Raises:
        ValueError: `count` or `seed` is out of range, or no image has a label.
    """
    if count < 1 or seed < 0:
        raise ValueError(
            f"config.data.few_shot is {count} and config.data.few_shot_seed {seed}: at least 1 and 0 are needed"
        )
    images = np.bincount(index.label_ids, minlength=len(index.label_names))
    lacking = np.minimum(images, count).tolist()
    missing = sum(lacking)
    labels, offsets = index.label_ids.tolist(), index.label_offsets.tolist()
    chosen = []
    for place in np.random.default_rng(seed).permutation(len(index)).tolist():
        if not missing:
            break
        wanted = [label for label in labels[offsets[place] : offsets[place + 1]] if lacking[label]]
        for label in wanted:
            lacking[label] -= 1
        missing -= len(wanted)
        if wanted:
            chosen.append(place)
    if not chosen:
        raise ValueError(f"config.data.few_shot is {count}, but none of the {len(index)} images has a label")
    _log.info("config.data.few_shot: %d of %d images, for %d labels", len(chosen), len(index), (images > 0).sum())
    if rare := [f"{index.label_names[k]} ({images[k]})" for k in np.flatnonzero((images > 0) & (images < count))]:
        more = f" and {len(rare) - _NAMED} more" if len(rare) > _NAMED else ""
        _log.warning(
            "config.data.few_shot is %d; these labels have fewer images: %s%s", count, ", ".join(rare[:_NAMED]), more
        )
    return np.sort(np.asarray(chosen, np.int64))
