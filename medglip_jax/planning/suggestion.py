"""Which batch and rematerialisation fit, with as few compilations as possible."""

import dataclasses
from collections.abc import Callable, Sequence

from medglip_jax.planning.measurement import Measurement
from medglip_jax.planning.roofline import Roofline

# Of config.model.remat, from the fastest to the smallest.
POLICIES = ("none", ".=dots", ".=dots_no_batch", "blocks")
MOST_IMAGES = 64  # of a part; larger batches are not tried


@dataclasses.dataclass(frozen=True)
class Trial:
    """A compiled train step: `config.model.remat`, images of a part, what it needs, and its bound if it fits."""

    remat: str
    images: int
    measurement: Measurement
    bound: Roofline | None


def largest_batch(compile_with: Callable[[int], Measurement], limit: float) -> list[tuple[int, Measurement]]:
    """Finds the largest power of two of images that fits, up to `MOST_IMAGES`.

    Memory grows about linearly with the images: one and two of them tell how many fit, which is then compiled to make
    sure, and halved until it does fit.

    Args:
        compile_with: compiles the step with so many images.
        limit: bytes that it may take.

    Returns:
        What was compiled, (images, measurement), in order.
    """

    def fits(measurement: Measurement) -> bool:
        return measurement.fits and measurement.total <= limit

    tried = [(1, compile_with(1))]
    if not fits(tried[0][1]):
        return tried
    tried.append((2, compile_with(2)))
    one, two = (measurement.total for _, measurement in tried)
    images = 2
    while images < MOST_IMAGES and one + (two - one) * (2 * images - 1) <= limit:
        images *= 2
    while images > 2:
        tried.append((images, compile_with(images)))
        if fits(tried[-1][1]):
            break
        images //= 2
    return tried


def best_trial(trials: Sequence[Trial], limit: float) -> Trial | None:
    """Returns the trial of most images per second, by its bound, among those that take at most `limit` bytes."""
    fitting = [x for x in trials if x.bound is not None and x.measurement.fits and x.measurement.total <= limit]
    return max(fitting, key=lambda x: x.bound.images / x.bound.seconds if x.bound else 0, default=None)
