"""The programs of a run, lowered for devices that need not be there: the train step, and detection in evaluation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data_pipelines.hierarchy import HierarchyRule
from data_pipelines.mask_targets import packed_size
from medglip_jax.inference import make_detector, parameter_shapes, power_of_two
from medglip_jax.model.lora import without_adapters
from medglip_jax.model.pretraining import make_model
from medglip_jax.model.text_offsets import apply_model
from medglip_jax.parallel.mesh import batch_parts, batch_sharding, describe_parts
from medglip_jax.planning.costs import CostModel
from medglip_jax.planning.hlo import parse
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import abstract_state
from medglip_jax.training.step import make_train_step


def images_of_part(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the images of a step on one part of the batch, which is one device unless several share an image.

    Raises:
        ValueError: the batch of the recipe cannot be split over the mesh.
    """
    parts = batch_parts(mesh)
    if config.data.batch_size % parts:
        raise ValueError(
            f"config.data.batch_size is {config.data.batch_size}, no multiple of {parts}, the mesh axes "
            f"{describe_parts(mesh)}: give --batch, the images of each part"
        )
    return config.data.batch_size // parts


def train_batch(config: ConfigDict, images: int, sharding: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what the train step reads of a batch, as shapes; see `make_train_step`."""
    height, width = config.data.canvas
    boxes, tokens = config.data.max_boxes, config.data.max_tokens
    shapes = {
        "image": ((height, width, 3), jnp.uint8),
        "image_size": ((2,), jnp.int32),
        "input_ids": ((tokens,), jnp.int32),
        "attention_mask": ((tokens,), jnp.int32),
        "boxes": ((boxes, 4), jnp.float32),
        "box_mask": ((boxes,), jnp.bool_),
        "positive_map": ((boxes, tokens), jnp.float32),
    }
    if config.model.modality.names:
        shapes["modality"] = ((), jnp.int32)
    hierarchy = HierarchyRule.from_config(config.data.hierarchy).make_arrays(boxes, tokens)
    shapes |= {name: (x.shape, x.dtype) for name, x in hierarchy.items()}
    if masks := config.data.max_masks:
        packed = packed_size((height, width))
        shapes |= {
            "masks": ((masks, *packed), jnp.uint8),
            "mask_boxes": ((masks,), jnp.int32),
            "phrase_masks": ((masks, *packed), jnp.uint8),
            "phrase_tokens": ((masks, tokens), jnp.bool_),
        }
    if config.data.text != "prompts":
        shapes = {name: shapes[name] for name in ("image", "image_size")} | _text_shapes(config.data)
    return {
        name: jax.ShapeDtypeStruct((images, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def _text_shapes(data: ConfigDict) -> dict[str, Any]:
    """Returns what `TextRule` writes for an image, as shapes and types."""
    tokens, most = (data.max_tokens,), (data.max_descriptions,)
    if data.text == "descriptions":
        return {
            "input_ids": ((*most, *tokens), jnp.int32),
            "attention_mask": ((*most, *tokens), jnp.int32),
            "boxes": ((*most, 4), jnp.float32),
            "box_mask": (most, jnp.bool_),
        }
    return dict.fromkeys(("input_ids", "attention_mask"), (tokens, jnp.int32)) if data.text == "captions" else {}


def lower_train(config: ConfigDict, mesh: Mesh, images: int) -> Any:
    """Lowers the step that `medglip train` compiles, for TPU devices.

    Args:
        config: a recipe.
        mesh: from `make_mesh`, of devices of a topology.
        images: of a global batch.
    """
    model, optimizer = make_model(config), make_optimizer(config)
    state = abstract_state(model, config, optimizer, jax.eval_shape(lambda: jax.random.key(0)), mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        make_train_step(model, config, optimizer, mesh),
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=(placed, None),
        donate_argnums=0,
    )
    return step.trace(state, train_batch(config, images, batch_sharding(mesh))).lower(lowering_platforms=("tpu",))


def lower_eval(config: ConfigDict, mesh: Mesh, images: int) -> Any:
    """Lowers the detection of `medglip evaluate`: one full prompt, of as many phrases as training samples negatives."""
    model = make_model(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = without_adapters(abstract_state(model, config, make_optimizer(config), key, mesh).params)
    phrases, tokens = power_of_two(config.data.max_negatives), config.data.max_tokens
    whole = NamedSharding(mesh, PartitionSpec())
    batch = train_batch(config, images, batch_sharding(mesh))
    prompt = {
        "input_ids": ((1, tokens), jnp.int32),
        "attention_mask": ((1, tokens), jnp.int32),
        "phrase_map": ((1, phrases, tokens), jnp.float32),
        "phrase_valid": ((1, phrases), jnp.bool_),
    }
    arrays = {name: batch[name] for name in ("image", "image_size", "modality") if name in batch} | {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for name, (shape, dtype) in prompt.items()
    }
    detector: Any = make_detector(model, config, mesh)
    return detector.trace(params, **arrays).lower(lowering_platforms=("tpu",))


def forward_flops(config: ConfigDict) -> tuple[float, int]:
    """Returns the FLOPs of the products and convolutions of the model for one image, and its number of parameters.

    The FLOPs are counted in the program before any compiler changed it; nothing is recomputed, padded or partitioned.
    """
    model = make_model(config)
    height, width = config.data.canvas
    pixels = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    texts = (config.data.max_descriptions,) if config.data.text == "descriptions" else ()
    tokens = jax.ShapeDtypeStruct((1, *texts, config.data.max_tokens), jnp.int32)
    params = parameter_shapes(model, config)
    index = jax.ShapeDtypeStruct((1,), jnp.int32) if config.model.modality.names else None

    def apply(params: Any, index: jax.Array | None, *inputs: jax.Array) -> dict[str, jax.Array]:
        return apply_model(model, params, *inputs, modality=index, train=False)

    lowered = jax.jit(apply).lower(params, index, pixels, tokens, tokens)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return CostModel(parse(lowered.as_text("hlo"))).total().flops, parameters
