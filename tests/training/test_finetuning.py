"""What trains in each mode, what is kept of what does not, and the rates of the layers."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from configs.medglip_t import get_config
from medglip_jax.configuration import save_config
from medglip_jax.parallel.mesh import batch_sharding, make_mesh, to_global
from medglip_jax.planning.costs import CostModel
from medglip_jax.planning.hlo import parse
from medglip_jax.planning.programs import train_batch
from medglip_jax.training.checkpoint import Checkpoints, load_params
from medglip_jax.training.finetuning import layer_multiplier, trained_paths
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import abstract_state, create_state, evaluated_parameters
from medglip_jax.training.step import make_train_step
from tests.training.slim import SHAPES, Slim, random_batch

# Of each mode, the fields of `config.finetune`, and a pattern of all that trains.
MODES = {
    "full": ({}, r""),
    "frozen": ({"frozen": ("^language/", "^backbone/patch_embed")}, r"^(backbone/stage|tower|head)"),
    "heads": ({"mode": "heads"}, r"^head/"),
    "lora": ({"mode": "lora", "lora_rank": 2}, r"^lora/"),
    "prompt": ({"mode": "prompt", "phrases": "left lung. lung. nodule"}, r"^prompt/offsets$"),
    "lora and head": ({"mode": "heads", "lora_rank": 2}, r"^(lora|head)/"),
}


def flat(tree):
    return {path: np.asarray(x) for path, x in traverse_util.flatten_dict(tree, sep="/").items()}


def raw(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y), strict=True), a, b)


def recipe_of(tiny_config, mode):
    config = tiny_config.copy_and_resolve_references()
    config.schedule.warmup_steps = 0
    config.model.bert.hidden_size = 8  # of the stand-in's text
    config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.text_scale = 1e-2, 0.1, 1.0
    config.finetune.lora_patterns = ("/(qkv|query|v_proj)/kernel$",)
    config.finetune.update(MODES[mode][0])
    return config


class Run:
    """A run of the stand-in model on a mesh, one device by default."""

    def __init__(self, config, sizes=None):
        self.config, self.optimizer = config, make_optimizer(config)
        self.mesh = make_mesh(sizes or {}, None if sizes else jax.devices()[:1])
        self.parts = Slim(), config, self.optimizer, jax.random.key(0), self.mesh
        self._step = None

    def start(self):
        return create_state(*self.parts)[0]

    def target(self):
        return abstract_state(*self.parts)

    def step(self, state, seed=0):
        if self._step is None:
            placed = jax.tree.map(lambda x: x.sharding, self.target())
            function = make_train_step(Slim(), self.config, self.optimizer, self.mesh)
            shardings = {"in_shardings": (placed, batch_sharding(self.mesh)), "out_shardings": (placed, None)}
            self._step = jax.jit(function, **shardings)
        return self._step(state, to_global(random_batch(self.config, seed), self.mesh))


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def run_of(tiny_config):
    """Returns the run of a mode; each is compiled once."""
    return functools.cache(lambda mode: Run(recipe_of(tiny_config, mode)))


@pytest.fixture(scope="module")
def run(run_of, mode):
    return run_of(mode)


@pytest.fixture(scope="module")
def states(run):
    """The state at the start and after each of three steps."""
    states = [run.start()]
    for seed in range(3):
        state, metrics = run.step(states[-1], seed)
        assert metrics["finite"] and metrics["num_positives"] > 8
        states.append(state)
    return states


def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(states, mode):
    before, after = flat(states[0].params), flat(states[-1].params)
    pattern = MODES[mode][1]
    for path, x in before.items():
        if re.search(pattern, path):
            assert np.abs(after[path] - x).max() > 1e-4, path
        else:
            np.testing.assert_array_equal(after[path], x, strict=True, err_msg=path)


def test_optimizer_and_average_hold_what_trains_and_nothing_else(states, mode):
    wanted = {path for path in flat(states[0].params) if re.search(MODES[mode][1], path)}
    for name in ("mu", "nu"):
        assert flat(optax.tree_utils.tree_get(states[-1].opt_state, name)).keys() == wanted
    assert flat(states[-1].ema).keys() == wanted
    moments = sum(x.size for x in jax.tree.leaves(states[-1].opt_state) if x.ndim)
    assert moments == 2 * sum(flat(states[0].params)[path].size for path in wanted)


def test_all_modes_start_at_the_loss_of_the_base_and_have_the_gradient_of_what_trains(run_of):
    norms, losses = {}, {}
    for name in MODES:
        _, metrics = run_of(name).step(run_of(name).start())
        norms[name], losses[name] = float(metrics["grad_norm"]), float(metrics["loss"])
    np.testing.assert_allclose([*losses.values()], losses["full"], rtol=1e-6)
    assert norms["full"] > norms["frozen"] > norms["heads"] > 0
    np.testing.assert_allclose(norms["lora and head"] ** 2, norms["lora"] ** 2 + norms["heads"] ** 2, rtol=1e-5)


def test_stopped_run_goes_on_to_the_same_bits_on_its_mesh_and_on_another(run, states, tmp_path):
    save_config(run.config, tmp_path / "config.json")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, states[2])
        resumed, _ = run.step(checkpoints.restore(run.target()), 2)
        other = Run(run.config, {"data": 2, "fsdp": 2, "tensor": 2})
        spread = checkpoints.restore(other.target())
    assert_same_bits(resumed, states[3])
    assert_same_bits(spread, states[2])
    assert jax.tree.map(lambda x: x.sharding, spread) == jax.tree.map(lambda x: x.sharding, other.target())
    evaluated = evaluated_parameters(states[2], run.config)
    for mesh in (None, other.mesh):
        loaded, _ = load_params(tmp_path, mesh=mesh)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), loaded, evaluated)
    query = loaded["language"]["layer_0"]["query"]["kernel"].sharding
    assert query == other.target().params["language"]["layer_0"]["query"]["kernel"].sharding


def test_what_evaluates_is_the_average_of_what_trains_and_the_fixed_rest(states, mode):
    config = get_config()
    config.finetune.lora_alpha = 0.0
    kept = flat(evaluated_parameters(states[-1], config))
    assert {path for path in kept if not path.startswith("prompt/")} == SHAPES.keys()  # adapters are merged
    for path, x in flat(states[-1].params).items():
        if path in kept and np.issubdtype(x.dtype, np.floating):
            assert (kept[path] == x).all() != bool(re.search(MODES[mode][1], path)), path


def test_mode_changed_on_the_way_is_an_error(tiny_config, tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, Run(recipe_of(tiny_config, "heads")).start())
        with pytest.raises(ValueError, match=r"another model or optimizer:\n.*\n"):
            checkpoints.restore(Run(recipe_of(tiny_config, "full")).target())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "head"}, r"config\.finetune\.mode is 'head': did you mean heads\?"),
        ({"mode": "zzz"}, r"there are full, heads"),
        ({"frozen": ("^languages/",)}, r"'\^languages/' is found in .* no parameter; the nearest are language/"),
        ({"frozen": ("(",)}, r"config\.finetune\.frozen: '\(' is no regular expression"),
        ({"frozen": ("",)}, r"leaves nothing to train"),
        ({"mode": "lora"}, r"config\.finetune\.lora_rank is 0: expected at least 1"),
        ({"lora_rank": -1}, r"config\.finetune\.lora_rank is -1: expected at least 0"),
        ({"lora_rank": 4}, r"lora_rank is 4 and config\.finetune\.mode is '': adapters train in"),
        (
            {"mode": "prompt", "lora_rank": 4},
            r"lora_rank is 4 and config\.finetune\.mode is 'prompt': adapters train in",
        ),
        ({"phrases": "lung"}, r"config\.finetune\.phrases is 'lung' and config\.finetune\.mode is ''"),
        ({"layer_decay": 0.0}, r"config\.finetune\.layer_decay is 0\.0"),
        ({"layer_decay": 1.5}, r"config\.finetune\.layer_decay is 1\.5"),
    ],
)
def test_mistakes_are_named(fields, message):
    finetune = get_config().finetune
    finetune.update(fields)
    with pytest.raises(ValueError, match=message):
        trained_paths(SHAPES, finetune)


def test_rates_fall_with_the_distance_from_the_end_of_the_encoder():
    config = get_config()
    config.finetune.layer_decay = 0.5
    wanted = {  # 12 blocks of Swin, 12 layers of BERT: the last of both has depth 12 of 12
        "backbone/patch_embed/norm/scale": 13,
        "backbone/stage_0_block_0/fc1/kernel": 12,
        "backbone/stage_0_block_1/fc1/kernel": 11,
        "backbone/stage_0_downsample/reduction/kernel": 11,
        "backbone/stage_1_block_0/fc1/kernel": 10,
        "backbone/stage_2_downsample/norm/bias": 3,
        "backbone/stage_3_block_1/attention/qkv/kernel": 1,
        "backbone/norm_1/scale": 0,
        "language/word_embeddings/embedding": 13,
        "language/embeddings_norm/bias": 13,
        "language/layer_0/query/kernel": 12,
        "language/layer_11/output/bias": 1,
        "neck/output_0/kernel": 0,
        "tower_0/text/query/kernel": 0,
        "head/box/kernel": 0,
    }
    assert {path: layer_multiplier(path, config) for path in wanted} == {path: 0.5**n for path, n in wanted.items()}


def test_layer_decay_multiplies_the_rates_of_the_groups(tiny_config):
    config = recipe_of(tiny_config, "full")
    params = Slim().init(jax.random.key(1))["params"]
    grads = jax.tree.map(np.ones_like, params)

    def updates():
        optimizer = make_optimizer(config)
        return flat(jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads))

    plain = updates()
    config.finetune.layer_decay = 0.5
    decayed = updates()
    for path, x in decayed.items():
        np.testing.assert_allclose(x, plain[path] * layer_multiplier(path, config), rtol=1e-6, err_msg=path)
    assert {layer_multiplier(path, config) for path in decayed} == {0.5**6, 0.5**5, 0.5**4, 0.25, 0.5, 1.0}


def flops_of(function, *shapes):
    """FLOPs of matrix products, before a compiler changed the program."""
    return CostModel(parse(jax.jit(function).lower(*shapes).as_text("hlo"))).total().flops


def test_what_is_frozen_costs_no_backward_pass(tiny_config):
    config = recipe_of(tiny_config, "heads")
    run = Run(config)
    batch = train_batch(config, config.data.batch_size, batch_sharding(run.mesh))
    step = make_train_step(Slim(), config, run.optimizer, run.mesh)
    pixels = jax.ShapeDtypeStruct(batch["image"].shape, np.float32)
    forward = flops_of(
        lambda *inputs: Slim().apply({"params": run.start().params}, *inputs),
        *(pixels, batch["input_ids"], batch["attention_mask"]),
    )
    images, anchors, tokens, width = 8, 64 + 16 + 4 + 1 + 1, 32, 8
    boxes, centerness, logits = 4 * anchors, anchors, anchors * tokens  # the gradient of the text, not of the image
    assert flops_of(step, run.target(), batch) == forward + 2 * images * width * (
        boxes + centerness + logits + tokens * width
    )
