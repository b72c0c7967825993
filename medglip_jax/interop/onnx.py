"""The exported PyTorch model as ONNX: image and text in, every anchor's box and its score for every phrase out."""

import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from medglip_jax.interop.verify import load_twin, require_torch

ONNX_FILE = "model.onnx"
OUTPUTS = ("token_logits", "box_deltas", "centerness", "boxes", "phrase_scores")
_INSTALL = "install the extra `onnx` (pip install 'medglip_jax[onnx]')"
_EXAMPLE = ["left lung", "nodule", "heart"]


def write_onnx(folder: str | os.PathLike) -> pathlib.Path:
    """Adds model.onnx, and its weights in model.onnx.data, to an exported folder.

    The graph has standard operators only. Its inputs are those that the folder's processor makes (pixel_values float32
    [B, 3, H, W], input_ids and attention_mask int64[B, L], phrase_map float32[B, K, L]); B, L and K may be any, H and W
    are the canvas. Its outputs are those of the PyTorch model (`OUTPUTS`); `processor.post_process` turns them into
    detections. Suppression stays outside: it runs until nothing is left, box by box.

    Returns:
        The path of model.onnx.

    Raises:
        ValueError: PyTorch or its ONNX exporter is not installed.
    """
    torch = require_torch()
    model, processor = load_twin(folder)
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError(f"ONNX files need onnxscript to be written: {_INSTALL}") from None

    height, width = processor.canvas
    images = [np.zeros((height, width, 3), np.uint8)] * 2
    inputs = dict(processor(images, _EXAMPLE))
    batch, tokens, phrases = (
        torch.export.Dim(name, min=1, max=limit)
        for name, limit in (
            ("batch", 4096),
            ("tokens", model.config.recipe["model"]["bert"]["max_positions"]),
            ("phrases", 4096),
        )
    )
    path = pathlib.Path(folder) / ONNX_FILE
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own insides
        torch.onnx.export(
            model,
            (),
            str(path),
            kwargs=inputs,
            dynamo=True,
            external_data=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            dynamic_shapes={
                "pixel_values": {0: batch},
                "input_ids": {0: batch, 1: tokens},
                "attention_mask": {0: batch, 1: tokens},
                "phrase_map": {0: batch, 1: phrases, 2: tokens},
            },
        )
    return path


class OnnxModel:
    """model.onnx on the CPU, in the place of the PyTorch model: `processor.predict(OnnxModel(folder), ...)`."""

    device = "cpu"

    def __init__(self, folder: str | os.PathLike):
        """Opens model.onnx of an exported folder.

        Raises:
            ValueError: onnxruntime is not installed, or there is no model.onnx.
        """
        try:
            import onnxruntime
        except ImportError:
            raise ValueError(f"ONNX files need onnxruntime: {_INSTALL}") from None
        path = pathlib.Path(folder) / ONNX_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {ONNX_FILE}: write it with medglip export --onnx")
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Returns the graph's outputs by name."""
        arrays = {name: np.asarray(x) for name, x in inputs.items()}
        return dict(zip(OUTPUTS, self._session.run(list(OUTPUTS), arrays), strict=True))
