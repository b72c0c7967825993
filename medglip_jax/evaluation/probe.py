"""Linear probe: how much of what images show can be read linearly from a backbone whose weights are fixed."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.records import find_all_shards, find_shards
from medglip_jax.evaluation.auroc import SHOWN, UNKNOWN, summarize
from medglip_jax.evaluation.encoding import encode_records, phrases_of, read_truth
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.model.pretraining import pool_map
from medglip_jax.model.swin import Swin
from medglip_jax.parallel.activations import activations_on


def fit_probe(
    features: np.ndarray, truth: np.ndarray, *, decay: float, steps: int
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Fits a logistic regression for each label by L-BFGS.

    A label's objective is the mean cross-entropy over the images whose truth is known, and decay / 2 times the squared
    length of its weights; the bias is free. Features are brought to mean 0 and standard deviation 1 before.

    Args:
        features: float[N, D].
        truth: int8[N, K], see `image_truth`.
        decay: above 0.
        steps: of L-BFGS.

    Returns:
        The function from features [n, D] to logits [n, K], and the largest slope that is left, of a label's objective.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)

    def scale(x: np.ndarray) -> np.ndarray:
        return ((x - mean) / deviation).astype(np.float32)

    known = truth != UNKNOWN
    shares = jnp.asarray(known / np.maximum(known.sum(axis=0), 1), jnp.float32)
    weights, bias, slope = _fit(jnp.asarray(scale(features)), jnp.asarray(truth == SHOWN), shares, decay, steps)
    weights, bias = np.asarray(weights), np.asarray(bias)
    return lambda x: scale(x) @ weights + bias, float(slope)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _fit(x: jax.Array, shown: jax.Array, shares: jax.Array, decay: float, steps: int) -> tuple[jax.Array, ...]:
    def objective(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, bias = params
        logits = jnp.matmul(x, weights, precision="highest") + bias
        losses = jax.nn.softplus(jnp.where(shown, -logits, logits))
        return jnp.sum(shares * losses) + decay / 2 * jnp.sum(weights**2)

    solver = optax.lbfgs()
    value_and_slope = optax.value_and_grad_from_state(objective)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        value, slope = value_and_slope(params, state=state)
        updates, state = solver.update(slope, state, params, value=value, grad=slope, value_fn=objective)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros((x.shape[1], shown.shape[1])), jnp.zeros(shown.shape[1])
    (params, _), _ = jax.lax.scan(step, (params, solver.init(params)), None, length=steps)
    slopes = jax.grad(objective)(params)
    return *params, jnp.maximum(*(jnp.abs(slope).max() for slope in slopes))


def make_probe(config: ConfigDict, mesh: Mesh) -> Callable[..., dict[str, Any]]:
    """Returns the function that probes the backbone of a model, whatever else it has.

    Features are the mean of its last stage over the image.

    Args:
        config: a recipe; reads `model`, `data`, `pretraining.probe_*` and the rules of sharding.
        mesh: from `make_mesh`.

    Returns:
        evaluate(params, records_path, between_batches=) -> what `summarize` returns of the records, the probe having
        learned from at most `pretraining.probe_images` of `data.train`, spread over it; with "train_images", "slope"
        (what is left of it), "seconds" and "images_per_second". The same on every process.
    """
    settings = config.pretraining
    backbone = Swin(config.model.swin, jnp.dtype(config.model.dtype), scan=config.model.scan)

    @jax.jit
    def encode(params: Any, image: jax.Array, image_size: jax.Array) -> jax.Array:
        pixels = normalize_pixels(image, image_size).astype(backbone.dtype)
        with activations_on(mesh, config.activation_rules, None):
            features: Any = backbone.apply({"params": params}, pixels, False)
        return pool_map(features[-1], image_size)

    def evaluate(
        params: Mapping[str, Any], records_path: str, *, between_batches: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        started = time.perf_counter()
        phrases = phrases_of(records_path)
        if not config.data.train:
            raise ValueError("a linear probe learns from config.data.train: set it to records")
        splits = find_all_shards(config.data.train)
        every = -(-sum(split.num_examples for split in splits) // settings.probe_images)
        run = functools.partial(
            encode_records, lambda **x: encode(params["backbone"], **x), config, between_batches=between_batches
        )
        features, known = [], []
        for split in splits:
            features.append(run(f"{split.directory}:{split.split}", mesh, every=every)[0])
            known.append(read_truth(split, phrases, every)[0])
        learned = np.concatenate(features)
        predict, slope = fit_probe(
            learned, np.concatenate(known), decay=settings.probe_decay, steps=settings.probe_steps
        )
        images, speed = run(records_path, mesh)
        truth, modalities = read_truth(find_shards(records_path), phrases)
        return summarize(predict(images), truth, list(phrases), modalities) | {
            "train_images": len(learned),
            "slope": slope,
            "seconds": time.perf_counter() - started,
            "images_per_second": speed,
        }

    return evaluate
