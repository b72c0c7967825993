"""Stacks of modalities on a mesh: where they lie, and that images stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs.medglip_t import get_config
from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.model.modality import add_modalities, modality_variables
from medglip_jax.model.swin import Swin
from medglip_jax.parallel.activations import activations_on
from medglip_jax.parallel.mesh import abstract_mesh, batch_sharding, make_mesh, to_global
from medglip_jax.parallel.presets import PRESETS, resolve_rules
from medglip_jax.parallel.rules import find_placements, match_rules, path_name, shardings
from medglip_jax.planning.costs import CostModel
from medglip_jax.planning.hlo import parse
from tests.model.test_modality import moved, small, with_parts

__all__ = ["small"]  # a fixture


@pytest.fixture(scope="module")
def full_size():
    fields = {"names": "xray,ct,mri,pet", "image_parts": "patch_embed,norms,lora,stage_3", "lora_rank": 8}
    return with_parts(get_config(), embedding=True, classifier=True, **fields)


@pytest.fixture(scope="module")
def shapes(full_size):
    return parameter_shapes(GLIP(full_size.model), full_size)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fsdp", [4, 8])
def test_stacks_are_split_by_modality_or_as_what_they_are_copies_of(full_size, shapes, preset, fsdp):
    config = full_size.copy_and_resolve_references()
    config.sharding = preset
    found = find_placements(resolve_rules(config), shapes, abstract_mesh({"fsdp": fsdp}, fsdp))
    lost = {name: place.lost for name, place in found.items() if place.lost}
    for name, place in found.items():
        if not name.startswith("modality/backbone/"):
            assert not place.lost and (not name.startswith("modality/") or not any(place.spec))
        elif name.endswith(("/a", "/b")):
            assert preset == "ddp" or place.spec or fsdp == 8 or name.endswith("proj/a") or name.endswith("qkv/b")
        else:
            shared = tuple(found[name.removeprefix("modality/")].spec)
            split = ("fsdp",) if fsdp == 4 else (None, *shared)
            assert tuple(place.spec) == (split if any(shared) else ()), name
            assert (name in lost) == (any(shared) and fsdp == 8)
    for reasons in lost.values():
        assert reasons == ("dimension 0 (4) is no multiple of fsdp=8: split otherwise",)


def test_own_rules_of_a_stack_go_first_and_those_of_shared_parameters_are_lifted(full_size, shapes):
    config = full_size.copy_and_resolve_references()
    config.sharding_rules = ((r"^modality/.*fc2/kernel", (None, None, "fsdp")), (r"^backbone/.*fc1/kernel", ("data",)))
    mesh = abstract_mesh({"data": 2, "fsdp": 2}, 4)
    found = find_placements(resolve_rules(config), shapes, mesh)
    assert tuple(found["modality/backbone/stage_3_block_0/fc2/kernel"].spec) == (None, None, "fsdp")
    assert tuple(found["modality/backbone/stage_3_block_0/fc1/kernel"].spec) == ("fsdp", "data")
    assert tuple(found["backbone/stage_3_block_0/fc1/kernel"].spec) == ("data",)


def test_on_a_mesh_the_numbers_are_those_of_one_device_and_no_image_leaves_its_own(small):
    # Three modalities are no multiple of fsdp=2: each lies in parts.
    config = with_parts(small, names="ct,mri,pet", image_parts="encoder", group=2)
    config.model.swin.depths, config.model.scan, config.sharding = (1, 1), False, "fsdp"
    rng = np.random.default_rng(0)
    swin = Swin(config.model.swin, jnp.float32)
    shapes = jax.eval_shape(lambda key: swin.init(key, jnp.zeros((1, 32, 32, 3)), False), jax.random.key(0))["params"]
    params = {"backbone": jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)}
    params = jax.tree.map(np.asarray, moved(add_modalities(params, config.model, jax.random.key(1))))
    batch = {"pixels": rng.normal(size=(16, 32, 32, 3)).astype(np.float32), "index": rng.integers(0, 4, 16)}

    def run(**sizes):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
        rules = resolve_rules(config)
        placed = shardings(match_rules(rules, params, mesh), mesh)

        def loss(params, batch):
            with activations_on(mesh, config.activation_rules, rules):
                own = modality_variables(params["modality"], config.model, batch["index"])["backbone"]
                levels = swin.apply({"params": params["backbone"], "modality": own}, batch["pixels"], False)
            return sum((x**2).sum() + x.sum() for x in levels)

        step = jax.jit(
            jax.value_and_grad(loss), in_shardings=(placed, batch_sharding(mesh)), out_shardings=(None, placed)
        )
        arguments = jax.device_put(params, placed), to_global(batch, mesh)
        program = step.lower(*arguments).compile()
        return jax.device_get(program(*arguments)), CostModel(parse(program.as_text()), mesh.size).total()

    (expected, _), (found, costs) = run(data=1), run(data=2, fsdp=2)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected[1]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=path_name(path))
    collectives = costs.bytes_by_kind()
    assert set(collectives) == {"all-gather", "all-reduce"}
    sizes = {path: x.nbytes for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    assert collectives["all-gather"] <= 2 * sum(sizes.values())  # parameters, for both directions
