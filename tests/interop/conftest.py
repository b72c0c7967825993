"""A tiny model with parameters that hide nothing: no zeros, no ones."""

import sys

import jax
import numpy as np
import pytest

from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Random parameters of `tiny_config`'s model, NumPy arrays around what each starts from."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        mean = 1.0 if "scale" in name and x.ndim < 2 and name != "log_scale" else -2.0 if name == "bias0" else 0.0
        spread = 1 / np.sqrt(np.prod(x.shape[:-1])) if x.ndim > 1 and name != "embedding" else 0.1
        return np.asarray(mean + spread * rng.normal(size=x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(GLIP(tiny_config.model), tiny_config))


@pytest.fixture
def params(tiny_params):
    """A copy that a test may empty."""
    return jax.tree.map(np.copy, tiny_params)


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """Keeps what transformers copies out of the user's cache."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("transformers.utils.hub", "transformers.utils", "transformers.dynamic_module_utils"):
            patch.setattr(f"{module}.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield cache
