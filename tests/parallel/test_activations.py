"""Where activations lie, and that it changes no number: convolutions on maps whose rows are split, text on fsdp."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.medglip_t import get_config
from medglip_jax.model.bert import Bert
from medglip_jax.model.fpn import FPN
from medglip_jax.model.swin import Swin
from medglip_jax.parallel.activations import (
    MAP,
    NAMES,
    TEXT,
    activations_on,
    constrain,
    constrain_parameters,
    gather_parameters,
)
from medglip_jax.parallel.mesh import batch_sharding, make_mesh
from medglip_jax.parallel.presets import PRESETS
from medglip_jax.parallel.rules import match_rules, shardings

RULES = get_config().activation_rules


def layout_of(shape, names, mesh, rules=RULES):
    """What `constrain` asks of XLA."""

    def place(x):
        with activations_on(mesh, rules):
            return constrain(x, *names)

    (equation,) = jax.make_jaxpr(place)(jnp.zeros(shape)).eqns
    return tuple(equation.params["sharding"].spec)


def test_without_a_mesh_nothing_happens():
    x = jnp.zeros((2, 3))
    with activations_on(None, RULES):
        assert constrain(x, "batch", "channels") is x
    assert constrain(x, "batch", "channels") is x


def test_table_decides_where_a_dimension_lies():
    mesh = make_mesh({"replica": 2, "fsdp": 2, "sequence": 2})
    assert layout_of((4, 6, 5, 3), MAP, mesh) == (("replica", "fsdp"), "sequence", None, None)
    mesh = make_mesh({"data": 4, "tensor": 2})
    assert layout_of((4, 6, 2, 3), ("batch", "tokens", "heads", None), mesh) == ("data", None, "tensor", None)
    other = tuple((name, ("tensor",) if name == "tokens" else axes) for name, axes in RULES)
    assert layout_of((4, 6, 3), TEXT, mesh, other) == ("data", "tensor", None)


def test_stacked_parameters_lie_as_each_of_them_does():
    def place(tree, rules, stacked):
        with activations_on(make_mesh({"fsdp": 4, "tensor": 2}), RULES, rules):
            return constrain_parameters(tree, "tower_0", stacked=stacked)

    def spec(shape, stacked):
        tree = {"text": {"query": {"kernel": jnp.zeros(shape)}}}
        (equation,) = jax.make_jaxpr(lambda tree: place(tree, PRESETS["fsdp_tp"], stacked))(tree).eqns
        return tuple(equation.params["sharding"].spec)

    assert spec((3, 8, 8), True) == (None, "fsdp", "tensor") and spec((8, 8), False) == ("fsdp", "tensor")
    tree = {"no_rule": jnp.zeros(3)}
    assert place(tree, None, True) is tree and constrain_parameters(tree, "tower_0") is tree


def test_parameters_of_a_turn_are_joined_over_images_and_their_gradients_split():
    tree = {"text": {"query": {"kernel": jnp.ones((8, 8))}}}

    def loss(tree):
        with activations_on(make_mesh({"fsdp": 4, "tensor": 2}), RULES, PRESETS["fsdp_tp"]):
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(gather_parameters(tree, "tower_0")))

    asked = [
        tuple(axes if isinstance(axes, str) else (axes or (None,))[0] for axes in equation.params["sharding"].spec)
        for equation in jax.make_jaxpr(jax.grad(loss))(tree).eqns
        if equation.primitive.name == "sharding_constraint"
    ]
    assert asked == [(None, "tensor"), ("fsdp", "tensor")]
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(tree)["text"]["query"]["kernel"], 2.0)


def test_what_does_not_divide_is_not_split():
    assert layout_of((4, 5, 5, 3), MAP, make_mesh({"data": 4, "sequence": 2})) == ("data", None, None, None)
    assert layout_of((6, 4, 4, 3), MAP, make_mesh({"data": 4, "sequence": 2})) == (None, "sequence", None, None)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[1:], r"expected each of batch, .* once \(batch\)"),
        ((*RULES, RULES[0]), "once"),
        ((*RULES[:-1], ("hiden", ())), r"once \(hiden\)"),
        ((("batch", ("data", "model")), *RULES[1:]), "splits batch over 'model': the mesh has replica, data"),
    ],
)
def test_mistakes_in_the_table_are_named(rules, message):
    with (
        pytest.raises(ValueError, match=f"config.activation_rules.*{message}"),
        activations_on(make_mesh({"data": 8}), rules),
    ):
        pass


def test_names_are_as_many_as_dimensions():
    with activations_on(make_mesh({"data": 8}), RULES):
        with pytest.raises(ValueError, match=r"\('batch',\) for an array of shape \(8, 2\)"):
            constrain(jnp.zeros((8, 2)), "batch")
        with pytest.raises(ValueError, match="names are batch, height"):
            constrain(jnp.zeros((8, 2)), "batch", "rows")
    assert {name for name, _ in RULES} == set(NAMES)


def gradients(call, params, inputs, weights, sizes):
    """Output and gradients of a weighted sum on a mesh, with maps split by the table from the start."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])

    def loss(params, inputs):
        with activations_on(mesh, RULES):
            outputs = call(params, [constrain(x, *MAP) for x in inputs])
        return sum(jnp.sum(y * w) for y, w in zip(outputs, weights, strict=True))

    batch = batch_sharding(mesh)
    return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(None, batch))(params, inputs))


@pytest.mark.parametrize("part", ["backbone", "neck"])
def test_split_rows_change_no_gradient(tiny_config, part):
    """XLA computes wrong gradients of convolutions where rows and another axis are split: they must not be."""
    rng = np.random.default_rng(0)
    config = tiny_config.copy_and_resolve_references().model
    config.swin.depths, config.swin.drop_path, config.swin.window = (1, 2, 1, 1), 0.0, 2
    if part == "backbone":  # with a shifted window
        shapes, module = [(4, 32, 32, 3)], Swin(config.swin, jnp.float32)
    else:
        shapes, module = [(4, 8 >> i, 8 >> i, 16 << i) for i in range(3)], FPN(config.fpn, jnp.float32)
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def call(params, maps):
        return module.apply({"params": params}, maps[0] if part == "backbone" else maps, False)

    first = inputs[0] if part == "backbone" else inputs
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), first, False))["params"]
    params = jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), params)
    weights = [rng.normal(size=y.shape).astype(np.float32) for y in jax.eval_shape(call, params, inputs)]
    alone = gradients(call, params, inputs, weights, {"data": 1})
    spread = gradients(call, params, inputs, weights, {"data": 2, "sequence": 2, "tensor": 2})
    assert float(spread[0]) == pytest.approx(float(alone[0]), rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), spread[1], alone[1]
    )


def test_no_device_sees_the_text_of_all_images_on_fsdp(tiny_config):
    config = tiny_config.model.bert
    mesh = make_mesh({"data": 2, "fsdp": 4})
    module, ids = Bert(config, jnp.float32), jnp.ones((8, 32), jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, ids > 0, False))["params"]
    placed = shardings(match_rules(PRESETS["fsdp"], {"language": params}, mesh), mesh)["language"]

    def loss(params, ids):
        with activations_on(mesh, RULES):
            return module.apply({"params": params}, ids, ids > 0, False).var()

    step = jax.jit(jax.grad(loss), in_shardings=(placed, batch_sharding(mesh)), out_shardings=placed)
    program = step.lower(params, jax.ShapeDtypeStruct(ids.shape, ids.dtype)).compile().as_text()
    gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", program)
    assert "f32[4096,16]" in gathered  # the table of words
    assert not [shape for shape in gathered if shape.startswith("f32[8,32")]
