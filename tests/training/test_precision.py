"""What stays float32 when the model computes in bfloat16, and that a step takes no second copy of the state."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from benchmarks.ablations import SETTINGS
from medglip_jax.model.pretraining import make_model
from medglip_jax.parallel.mesh import batch_sharding, make_mesh
from medglip_jax.planning.programs import train_batch
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import abstract_state, state_shapes
from medglip_jax.training.step import make_train_step
from tests.training.small_detector import Detector


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.fixture(scope="module", params=["plain GLIP", "all parts"])
def step(request, tiny_config):
    """The program of a step in bfloat16, and the shapes of what it returns."""
    config = tiny_config.copy_and_resolve_references()
    config.model.dtype = "bfloat16"
    if request.param == "all parts":
        for changes in SETTINGS.values():
            config.update_from_flattened_dict(changes)
        config.model.masks.channels, config.model.modality.classifier = 16, True
    model, optimizer = make_model(config), make_optimizer(config)
    state = state_shapes(model, config, optimizer, jax.random.key(0))
    program, shapes = jax.make_jaxpr(make_train_step(model, config, optimizer), return_shape=True)(
        state, train_batch(config, 2, None)
    )
    return list(equations(program.jaxpr)), shapes, config


def halves(found):
    return [x for x in found if any(getattr(v.aval, "dtype", None) == jnp.bfloat16 for v in x.invars)]


def test_nothing_is_summed_in_bfloat16(step):
    """Norms' statistics, softmaxes, means, losses, the gradients of biases and scales, and the gradient's norm."""
    found, _, _ = step
    reductions = [x for x in found if x.primitive.name.startswith(("reduce_sum", "reduce_max", "reduce_prod", "cum"))]
    summed = [x for x in halves(reductions) if x.invars[0].aval.size > x.outvars[0].aval.size]
    assert len(reductions) > 200 and not summed, summed[:3]
    assert not halves([x for x in found if x.primitive.name in ("rsqrt", "logistic", "log", "log1p") and x.invars])


def test_token_logits_and_the_gradients_of_tables_are_float32(step):
    found, _, config = step
    (height, width), tokens = config.data.canvas, config.data.max_tokens
    anchors = sum(-(-height // stride) * -(-width // stride) for stride in config.detection.strides)
    products = [x for x in found if x.primitive.name == "dot_general"]
    logits = [x for x in products if x.outvars[0].aval.shape[1:] == (anchors, tokens)]
    assert logits and all(x.outvars[0].aval.dtype == jnp.float32 for x in logits)
    vocabulary = config.model.bert.vocab_size
    scattered = [x for x in found if x.primitive.name == "scatter-add" and x.outvars[0].aval.shape[0] == vocabulary]
    assert scattered and not halves(scattered)


def test_state_and_metrics_are_float32(step):
    _, (state, metrics), _ = step
    for tree in (state.params, state.ema, state.opt_state, metrics):
        kinds = {x.dtype.name for x in jax.tree.leaves(tree)}
        assert "float32" in kinds and kinds <= {"float32", "int32", "bool"}, kinds


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "sm3"])
def test_a_step_takes_the_place_of_its_state(tiny_config, kind):
    """The buffers that are given away cover parameters, moments and average: there is no second copy of them."""
    config = tiny_config.copy_and_resolve_references()
    config.detection.strides, config.optimizer.kind = (16, 32), kind
    config.sharding_rules = (("kernel", (None, None, None, "fsdp")), (".*", ()))
    mesh = make_mesh({"data": 4, "fsdp": 2})
    model, optimizer = Detector(), make_optimizer(config)
    state = abstract_state(model, config, optimizer, jax.random.key(0), mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        make_train_step(model, config, optimizer, mesh),
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=(placed, None),
        donate_argnums=0,
    )
    memory = step.lower(state, train_batch(config, 8, batch_sharding(mesh))).compile().memory_analysis()
    size = 0
    for x in jax.tree.leaves(state.replace(rng=None)):
        size += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    assert memory.alias_size_in_bytes >= size
