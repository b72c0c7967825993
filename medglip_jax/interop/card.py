"""The model card of an exported folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from medglip_jax.interop.verify import Agreement, machine

_CARD = """---
library_name: transformers
pipeline_tag: zero-shot-object-detection
tags: [medical, grounding, glip, medglip_jax]
---

# {name}

Finds in a medical image the boxes that phrases name: GLIP (arXiv 2112.03857) as Med-GLIP (arXiv 2508.10528) uses it,
trained with medglip_jax.

```python
from transformers import AutoModel, AutoProcessor

folder = "."  # the folder that this card lies in
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
found = model.predict("image.png", ["left lung", "nodule"], processor=processor)
found["boxes"], found["scores"], found["phrases"]  # boxes: x0 y0 x1 y1 in pixels of the image, x1 - x0 is the width
```

`modeling_medglip.py` and `processing_medglip.py` are the whole model in plain PyTorch: no compiled operators, no JAX.
It needs torch, transformers, opencv-python-headless and Pillow. With medglip_jax installed the same folder is a
checkpoint: `MedGLIP.from_pretrained(folder)`, `medglip evaluate --checkpoint folder`.

| | |
|---|---|
| parameters | {parameters:.1f} M, float32, under mmdetection's names |
| weights | {kind} |
| canvas | {height} x {width} pixels; images are resized into it |
| prompt | up to {max_tokens} tokens; more phrases go into several prompts |
| backbone | Swin, {embed_dim} channels, depths {depths}, window {window} |
| text encoder | BERT, {num_layers} layers of {hidden_size} |
| tower | {num_blocks} blocks |
{evaluation}{verification}
## Limits

Not a medical device. It was trained on the data and for the phrases that its maker chose; on others its scores mean
little. Nothing in this folder says which images it was trained on: its maker should add that here.
"""


def model_card(
    config: ConfigDict,
    *,
    name: str,
    parameters: int,
    kind: str,
    results: Mapping[str, Any] | None = None,
    agreements: Sequence[Agreement] = (),
) -> str:
    """Returns the text of the card.

    Args:
        config: the recipe.
        name: its heading.
        parameters: how many numbers the model has.
        kind: which weights these are, in words.
        results: the run's evaluation, if it has one.
        agreements: how the exported models compare, where that was measured.
    """
    model, (height, width) = config.model, config.data.canvas
    evaluation = ""
    if results is not None:
        figures = ", ".join(f"{key} {_figure(results[key])}" for key in ("AP", "AP50", "AP75"))
        evaluation = f"\n## Evaluation\n\n{figures} on the {results['images']} images that the run was evaluated on.\n"
    verification = ""
    if agreements:
        lines = [
            f"- It {'finds' if agreement.holds else 'does NOT find'} what the JAX model finds: {agreement.describe()}."
            for agreement in agreements
        ]
        verification = "\n".join(["\n## Verification\n", *lines, f"\nMeasured on {machine()}.\n"])
    return _CARD.format(
        name=name,
        parameters=parameters / 1e6,
        kind=kind,
        height=height,
        width=width,
        max_tokens=config.data.max_tokens,
        embed_dim=model.swin.embed_dim,
        depths=tuple(model.swin.depths),
        window=model.swin.window,
        num_layers=model.bert.num_layers,
        hidden_size=model.bert.hidden_size,
        num_blocks=model.tower.num_blocks,
        evaluation=evaluation,
        verification=verification,
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
