"""Fixtures shared by all tests: eight CPU devices, a compilation cache, and the annotated images beside a checkout."""

import os
import pathlib

# Most of the tests' time is compilation, and unoptimised code compiles twice as fast; before jax starts its backend.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import hypothesis
import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

hypothesis.settings.register_profile("medglip", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("medglip")


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """The folder of reference vectors and annotated images that developers have beside the checkout."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the reference vectors and images that lie beside a developer's checkout")
    return path


@pytest.fixture(scope="session")
def tiny_config():
    """A recipe of the smallest model that still has every part; one compilation serves many tests."""
    from configs.medglip_t import get_config

    config = get_config()
    config.data.canvas = (64, 64)
    config.data.max_tokens = 32
    config.data.max_boxes = 16
    config.data.batch_size = config.data.eval_batch_size = 8
    config.data.num_threads, config.data.prefetch = 1, 2
    model = config.model
    model.swin.embed_dim, model.swin.depths, model.swin.num_heads, model.swin.window = 8, (1, 2, 1, 1), (1, 1, 2, 2), 4
    model.fpn.channels = 16
    model.bert.vocab_size, model.bert.hidden_size, model.bert.num_layers = 4096, 16, 1
    model.bert.num_heads, model.bert.intermediate_size, model.bert.max_positions = 2, 32, 64
    model.tower.num_blocks, model.tower.fusion_dim, model.tower.fusion_heads, model.tower.norm_groups = 1, 32, 2, 4
    return config
