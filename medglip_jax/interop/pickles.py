"""Checkpoints as PyTorch's own .pth files: what mmdetection and Microsoft's code load."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.text import TextTokenizer
from medglip_jax.interop import glip, mmdet, mmdet_config
from medglip_jax.interop.folder import PICKLE_FILE, WEIGHTS_FILE, replaced, save_weights
from medglip_jax.interop.reading import read_state_dict
from medglip_jax.interop.state_dict import Params, Weight
from medglip_jax.interop.verify import require_torch

_ONE_FILE = 1 << 62

MMDET_CONFIG, GLIP_CONFIG, LANGUAGE = "glip_config.py", "glip_config.yaml", "bert"


def _save_pickle(weights: pathlib.Path, key: str, buffers: dict[str, np.ndarray], **more: Any) -> None:
    """Turns a safetensors file into a .pth beside it, {key: state dict}; the arrays stay in the mapped file.

    Args:
        weights: the file, deleted.
        key: of the state dict.
        buffers: what the state dict has beside the file's arrays.
        more: other entries of the .pth.
    """
    from safetensors import safe_open

    torch = require_torch()
    file: Any
    with safe_open(weights, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        state |= {name: torch.from_numpy(x) for name, x in buffers.items()}
        torch.save({key: state, **more}, weights.with_name(PICKLE_FILE))
    weights.unlink()


def _window_indices(weights: Sequence[Weight], window: int) -> dict[str, np.ndarray]:
    """Returns the index of each table of relative positions, a buffer that both code bases keep in the state dict."""
    rows, columns = (x.ravel() for x in np.meshgrid(np.arange(window), np.arange(window), indexing="ij"))
    apart = (x[:, None] - x + window - 1 for x in (rows, columns))
    index = np.ascontiguousarray(next(apart) * (2 * window - 1) + next(apart))
    table = "relative_position_bias_table"
    return {
        weight.theirs.replace(table, "relative_position_index"): index
        for weight in weights
        if weight.theirs.endswith(table)
    }


def bert_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the config.json of a Hugging Face BertModel with the sizes of the text encoder."""
    bert = config.model.bert
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": bert.vocab_size,
        "hidden_size": bert.hidden_size,
        "num_hidden_layers": bert.num_layers,
        "num_attention_heads": bert.num_heads,
        "intermediate_size": bert.intermediate_size,
        "max_position_embeddings": bert.max_positions,
        "hidden_dropout_prob": bert.dropout,
        "attention_probs_dropout_prob": bert.dropout,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }


def write_language(
    state_dict: Any, prefix: str, config: ConfigDict, tokenizer: TextTokenizer, directory: pathlib.Path
) -> None:
    """Writes the text encoder as a folder that BertModel and AutoTokenizer load.

    Args:
        state_dict: of the whole model.
        prefix: of the text encoder's names in it.
        config: the recipe.
        tokenizer: of the prompts.
        directory: made.
    """
    from safetensors.numpy import save_file

    directory.mkdir()
    arrays = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
    save_file(arrays, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(bert_config(config), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(directory)


def write_mmdet(
    params: Params, config: ConfigDict, tokenizer: TextTokenizer, directory: str | os.PathLike
) -> pathlib.Path:
    """Writes a model for mmdetection: model.pth, a config file, and the folder of the BERT that it builds first.

    Args:
        params: the model's parameters; emptied on the way.
        config: the recipe.
        tokenizer: of the prompts.
        directory: made if missing; an older export in it is replaced, other files beside it stay.

    Returns:
        The path of model.pth.

    Raises:
        ValueError: PyTorch is missing, or mmdetection's GLIP cannot be built with these sizes.
    """
    text = mmdet_config.config_file(config, config_file=MMDET_CONFIG, weights_file=PICKLE_FILE, language=LANGUAGE)
    meta = {"dataset_meta": {"classes": ()}}
    return _write(params, config, tokenizer, directory, mmdet, "state_dict", LANGUAGE, {MMDET_CONFIG: text}, meta=meta)


def write_glip(
    params: Params, config: ConfigDict, tokenizer: TextTokenizer, directory: str | os.PathLike
) -> pathlib.Path:
    """Writes a model for Microsoft's GLIP: model.pth, its yaml, and the folder of the BERT that it builds first.

    Args and returns: see `write_mmdet`.

    Raises:
        ValueError: PyTorch is missing, or Microsoft's code cannot build a GLIP of these sizes.
    """
    text = glip.config_yaml(config)
    return _write(params, config, tokenizer, directory, glip, "model", glip.BERT, {GLIP_CONFIG: text})


def _write(
    params: Params,
    config: ConfigDict,
    tokenizer: TextTokenizer,
    directory: str | os.PathLike,
    naming: Any,
    key: str,
    language: str,
    files: dict[str, str],
    **more: Any,
) -> pathlib.Path:
    """Writes model.pth under the names of a module, its text encoder in a folder, and text files beside them."""
    require_torch()
    with replaced(directory) as staging:
        names = naming.parameter_names(config.model)
        weights = save_weights(params, names, staging, max_shard=_ONE_FILE, consume=True)
        write_language(read_state_dict(weights), f"{naming.LANGUAGE}.", config, tokenizer, staging / language)
        _save_pickle(weights, key, _window_indices(names, config.model.swin.window), **more)
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
    return pathlib.Path(directory).resolve() / PICKLE_FILE
