"""Parts of the model that belong to a modality (`config.model.modality`), beside the model, as adapters are.

The parameters of such a run have a subtree `modality`, stacked along the E modalities that have parts of their own:

    backbone/...        [E, ...], in place of the parameter of the same path
    backbone/.../a, b   [E, in, rank] and [E, rank, out], an adapter of the dense kernel of that module
    neck/embedding      [E, C], added to every level of the pyramid as its convolution makes it
    language/embedding  [E, D], added to the text encoder's output
    classifier          kernel [C, E] and bias [E], on the backbone's last features, of the shared parts alone

Everything outside is shared, and is a plain GLIP. An index of 0 means an image that takes the shared parts: its
modality is unknown or has none of its own. 1 to E are the names in their order.
"""

import functools
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.model.lora import merge_adapters
from medglip_jax.model.routing import COLLECTION, INDEX, PLACES, SLOTS, plan_groups
from medglip_jax.model.swin import Swin
from medglip_jax.parallel.activations import parts_of

Array = jax.Array
Config = ConfigDict | FrozenConfigDict

MODALITY = COLLECTION  # the subtree

# Of each part, the paths that a modality has of its own: re.search of this pattern finds them.
PARTS = {
    "patch_embed": r"^backbone/patch_embed/",
    "norms": r"^backbone/.*/(scale|bias)$",
    "lora": r"^backbone/stage_\d+_block_\d+/attention/(qkv|proj)/kernel$",  # with adapters instead of copies
    **{f"stage_{i}": rf"^backbone/(stage_{i}_\w+|norm_{i})/" for i in range(4)},
    "encoder": r"^backbone/",
}


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def modality_names(settings: Config) -> list[str]:
    """Returns the modalities that have parts of their own.

    Raises:
        ValueError: `settings`, `config.model.modality`, cannot be used.
    """
    names, parts = _split(settings.names), _split(settings.image_parts)
    where = "config.model.modality"
    if len(set(names)) < len(names):
        raise ValueError(f"{where}.names is {settings.names!r}: a name is there twice")
    if not names and (parts or settings.embedding or settings.classifier):
        raise ValueError(f"{where} has image_parts, embedding or classifier set, and no names: set names, as 'ct,mri'")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"{where}.image_parts: {part!r} is no part: there are {', '.join(PARTS)}")
    if names and not (parts or settings.embedding or settings.classifier):
        raise ValueError(
            f"{where}.names is {settings.names!r}, but these modalities have no parts: set image_parts, embedding or "
            "classifier"
        )
    if "encoder" in parts and len(parts) > 1:
        raise ValueError(f"{where}.image_parts is {settings.image_parts!r}: encoder has all other parts in it")
    if ("lora" in parts) != (settings.lora_rank > 0):
        raise ValueError(
            f"{where}.lora_rank is {settings.lora_rank} and image_parts {settings.image_parts!r}: the part lora needs "
            "a rank of at least 1, and nothing else has one"
        )
    if settings.group < 1 or not 0 <= settings.dropout < 1:
        raise ValueError(
            f"{where}.group is {settings.group} and dropout {settings.dropout}: at least 1, and from 0 to below 1"
        )
    return names


def own_paths(paths: Any, settings: Config) -> tuple[list[str], list[str]]:
    """Returns the paths of the parameters that a modality has copies of, and of the kernels that it has adapters of.

    Args:
        paths: of a plain model.
        settings: `config.model.modality`.
    """
    parts = _split(settings.image_parts)
    copied = [path for path in paths if any(re.search(PARTS[part], path) for part in parts if part != "lora")]
    adapted = [path for path in paths if "lora" in parts and re.search(PARTS["lora"], path)]
    return sorted(copied), sorted(set(adapted) - set(copied))


def copies(params: Any, settings: Config) -> dict[str, Any]:
    """Returns the copies that the modalities start from, by path, of the parameters that are there.

    Args:
        params: of a plain model or of a part of one; NumPy arrays give NumPy arrays.
        settings: `config.model.modality`.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    number = len(modality_names(settings))
    copied, _ = own_paths(flat, settings) if number else ([], [])
    broadcast = {True: np.broadcast_to, False: jnp.broadcast_to}
    return {
        f"{MODALITY}/{path}": broadcast[isinstance(flat[path], np.ndarray)](flat[path], (number, *flat[path].shape))
        for path in copied
    }


def add_modalities(params: Any, model: Config, rng: Array) -> Any:
    """Returns the parameters of a plain model with the subtree `modality`; as they are if no modality has parts.

    It changes no output yet: copies are equal to what they are copies of, adapters have a second factor of 0,
    embeddings are 0.

    Args:
        params: nested dict of arrays.
        model: `config.model` of a recipe.
        rng: random key of the adapters' first factors (variance 1 / in, drawn by path) and of nothing else.

    Raises:
        ValueError: see `modality_names`.
    """
    settings = model.modality
    names = modality_names(settings)
    if not names:
        return params
    number = len(names)
    plain: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    added = copies(params, settings)
    for path in own_paths(plain, settings)[1]:
        inputs, outputs = plain[path].shape
        module = f"{MODALITY}/{path.removesuffix('/kernel')}"
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        added[f"{module}/a"] = jax.random.normal(key, (number, inputs, settings.lora_rank)) * inputs**-0.5
        added[f"{module}/b"] = jnp.zeros((number, settings.lora_rank, outputs))
    if settings.embedding:
        added[f"{MODALITY}/neck/embedding"] = jnp.zeros((number, model.fpn.channels))
        added[f"{MODALITY}/language/embedding"] = jnp.zeros((number, model.bert.hidden_size))
    if settings.classifier:
        features = model.swin.embed_dim * 2 ** (len(model.swin.depths) - 1)
        added[f"{MODALITY}/classifier/kernel"] = jnp.zeros((features, number))
        added[f"{MODALITY}/classifier/bias"] = jnp.zeros(number)
    return traverse_util.unflatten_dict(plain | added, sep="/")


def _is_routed(module: str, settings: Config) -> bool:
    """Returns whether a module of the backbone is of a part whose kernels are a modality's own, and large."""
    parts = _split(settings.image_parts)
    return any(re.search(PARTS[part], f"{module}/") for part in parts if part == "encoder" or part.startswith("stage"))


def modality_variables(own: Any, model: Config, index: Array) -> dict[str, Any]:
    """Returns the collection that layers find the parameters of their examples in (see `routing`).

    Args:
        own: the subtree `modality`.
        model: `config.model` of a recipe.
        index: int32[B], 0 to E.
    """
    settings = model.modality
    number = len(modality_names(settings))
    flat: dict[str, Any] = traverse_util.flatten_dict(
        {name: own[name] for name in ("backbone", "neck") if name in own}, sep="/"
    )
    modules = {path.rpartition("/")[0] for path in flat}
    scale = settings.lora_alpha / settings.lora_rank if settings.lora_rank else 1.0
    variables = {path: x * scale if path.endswith("/b") else x for path, x in flat.items()}
    routed = {module for module in modules if _is_routed(module, settings)} if settings.group > 1 else set()
    variables |= {f"{module}/{INDEX}": index for module in modules - routed}
    if routed:
        parts = parts_of("batch")
        groups = plan_groups(index, number + 1, settings.group, 1 if len(index) % parts else parts)
        variables |= {f"{module}/{INDEX}": groups.index for module in routed}
        blocks = {found[0] for module in routed if (found := re.match(r"backbone/stage_\d+_block_\d+", module))}
        moved = {found[0] for module in routed if (found := re.match(r"backbone/(patch_embed|stage_\d+)", module))}
        moved |= {f"{block}/DropPath_{i}" for block in blocks for i in range(2)}
        for path in moved:
            variables |= {f"{path}/{SLOTS}": groups.slots, f"{path}/{PLACES}": groups.places}
    return traverse_util.unflatten_dict(variables, sep="/")


def text_embedding(own: Any, index: Array) -> Array | None:
    """Returns what is added to the text features of each image, float32[B, 1, D], or None."""
    if "language" not in own:
        return None
    stack = own["language"]["embedding"]
    return jnp.where(index[:, None] > 0, stack[jnp.maximum(index - 1, 0)], 0)[:, None]


def classify(params: Any, model: Config, pixels: Array, image_size: Array) -> Array:
    """Scores the modalities of images by the shared backbone, which is not told what they are, and does not learn.

    Args:
        params: with the subtree `modality` and its classifier.
        model: `config.model` of a recipe.
        pixels: float[B, H, W, 3], as `normalize_pixels` returns them.
        image_size: int32[B, 2], height and width of the image inside the canvas, in pixels.

    Returns:
        float32[B, E], logits of the names in their order.
    """
    backbone, dtype = jax.lax.stop_gradient(params["backbone"]), jnp.dtype(model.dtype)
    features: Any = Swin(model.swin, dtype, scan=model.scan).apply({"params": backbone}, pixels.astype(dtype), False)
    last = features[-1].astype(jnp.promote_types(dtype, jnp.float32))  # [B, h, w, C]
    stride = pixels.shape[1] / last.shape[1], pixels.shape[2] / last.shape[2]
    rows, columns = (jnp.arange(last.shape[i + 1]) * stride[i] < image_size[:, i, None] for i in (0, 1))
    inside = (rows[:, :, None] & columns[:, None, :]).astype(last.dtype)[..., None]
    pooled = (last * inside).sum(axis=(1, 2)) / jnp.maximum(inside.sum(axis=(1, 2)), 1)
    head = params[MODALITY]["classifier"]
    return pooled @ head["kernel"] + head["bias"]


def without_modalities(params: Any) -> Any:
    """Returns the parameters without the subtree `modality`: the shared parts."""
    return {name: part for name, part in params.items() if name != MODALITY}


def merge_modality(params: Any, model: Config, name: str) -> Any:
    """Returns the parameters of the plain model that computes what this one does for images of a modality.

    Own parameters take the place of the shared ones, adapters are added to their kernels, and embeddings become part of
    biases: those of the pyramid's output convolutions, and that of the text encoder's last norm.

    Args:
        params: nested dict of NumPy arrays, or of JAX arrays.
        model: `config.model` of a recipe.
        name: of the modality; "" for the shared parts alone.

    Raises:
        ValueError: the modality has no parts of its own.
    """
    names = modality_names(model.modality)
    shared = without_modalities(params)
    if not name:
        return shared
    if name not in names:
        raise ValueError(f"{name!r} has no parts of its own in this model: {', '.join(names) or 'no modality'} has")
    place = names.index(name)
    flat: dict[str, Any] = traverse_util.flatten_dict(shared, sep="/")
    own: dict[str, Any] = traverse_util.flatten_dict(params[MODALITY], sep="/")
    own = {path: x[place] for path, x in own.items() if not path.startswith("classifier/")}
    image, text = own.pop("neck/embedding", None), own.pop("language/embedding", None)
    adapters = {path: own.pop(path) for path in list(own) if path.endswith(("/a", "/b"))}
    flat |= own
    if image is not None:
        for path in [path for path in flat if re.fullmatch(r"neck/output_\d+/bias", path)]:
            flat[path] = flat[path] + image
    if text is not None:
        path = f"language/layer_{model.bert.num_layers - 1}/output_norm/bias"
        flat[path] = flat[path] + text
    merged = traverse_util.unflatten_dict(flat, sep="/")
    if not adapters:
        return merged
    return merge_adapters(
        {**merged, "lora": traverse_util.unflatten_dict(adapters, sep="/")}, model.modality.lora_alpha
    )


@functools.cache
def modality_table(names: str, known: tuple[str, ...]) -> np.ndarray:
    """Returns which parts each modality of a batch takes: int32[len(known)], 0 for the shared ones.

    Args:
        names: `config.model.modality.names`.
        known: `data_pipelines.schema.MODALITIES`.

    Raises:
        ValueError: a name is no modality.
    """
    listed = _split(names)
    if strange := [name for name in listed if name not in known[1:]]:
        raise ValueError(
            f"config.model.modality.names: {strange[0]!r} is no modality of the records: there are "
            f"{', '.join(known[1:])}"
        )
    return np.array([listed.index(name) + 1 if name in listed else 0 for name in known], np.int32)
