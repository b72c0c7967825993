"""The batch that fits: found with few compilations, and never one that does not fit."""

from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.planning.chips import CHIPS
from medglip_jax.planning.measurement import Measurement
from medglip_jax.planning.suggestion import MOST_IMAGES, Trial, best_trial, largest_batch


def compiler(total_of, limit):
    """Returns a stand-in for the compiler, and the list of batches that it was asked for."""
    asked = []

    def compile_with(images):
        asked.append(images)
        total = total_of(images)
        return Measurement(temporaries=total, fits=total <= limit, flops=images * 1e12)

    return compile_with, asked


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 30_000))
def test_the_largest_power_of_two_that_fits_is_found(fixed, each, limit):
    compile_with, asked = compiler(lambda images: fixed + each * images, limit)
    tried = largest_batch(compile_with, limit)
    fitting = [images for images, m in tried if m.total <= limit]
    expected = [2**k for k in range(7) if fixed + each * 2**k <= limit and 2**k <= MOST_IMAGES]
    assert (fitting[-1] if fitting else None) == (expected[-1] if expected else None)
    assert len(asked) <= 3
    assert len(set(asked)) == len(asked)


def test_memory_that_grows_faster_than_two_images_told_is_caught():
    compile_with, asked = compiler(lambda images: 100 + 10 * images + images**3, 400)
    tried = largest_batch(compile_with, 400)
    assert asked == [1, 2, 16, 8, 4]
    assert tried[-1][0] == 4 and tried[-1][1].total <= 400


def test_the_best_is_the_fastest_that_leaves_room():
    chip = CHIPS["v5e"]

    def trial(remat, images, total, flops):
        m = Measurement(temporaries=total, fits=True, flops=flops)
        return Trial(remat, images, m, m.roofline(chip, 1, images=images, model_flops_per_image=1e12))

    slow, fast, large = trial("blocks", 8, 90, 16e12), trial("none", 4, 90, 4e12), trial("none", 8, 120, 4e12)
    assert best_trial([slow, fast, large], limit=100) is fast
    assert best_trial([large], limit=100) is None
    assert best_trial([Trial("none", 1, Measurement(temporaries=5), None)], limit=100) is None
