"""Named sharding rules for the detector: where its parameters lie on a mesh, as data.

    ddp      every device holds everything
    fsdp     kernels and tables are split over all devices of replica and fsdp: one copy for each place on data
    hsdp     the same inside a replica: every replica holds a copy, and gathers nothing from another one
    fsdp_tp  as fsdp, and heads and hidden widths are split over tensor too

What is small is copied, by a rule that says so: vectors, tables of relative positions, and layers of a few outputs. No
preset ends with a rule for everything, so that a new kind of parameter is an error until someone decides about it.
"""

import difflib
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.parallel.rules import Choice, Rules


def _preset(split: Any, tensor: str | None) -> Rules:
    """Returns rules that split a dimension of each large parameter over `split`, and another over `tensor`."""
    return (
        # Layers into heads and hidden widths, [in, out], and those out of them.
        (r"(^|/)(query|key|value|qkv|intermediate|(values_)?[vl]_proj)/kernel$", (split, tensor)),
        (r"block_\d+/fc1/kernel$", (split, tensor)),
        (r"(^|/)(attention_output|proj|output|out_[vl]_proj)/kernel$", (tensor, split)),
        (r"block_\d+/fc2/kernel$", (tensor, split)),
        # Rows are as many as the vocabulary has tokens, which is rarely a multiple of anything.
        (r"_embeddings/embedding$", (None, split)),
        # Between stages and between streams, [in, out].
        (r"(^|/)(reduction|text_projection)/kernel$", (split,)),
        # Dynamic ReLU, [channels, channels / 4] and back to four times the channels.
        (r"dyconv/relu/fc0/kernel$", (split,)),
        (r"dyconv/relu/fc1/kernel$", (None, split)),
        # Convolutions of the pyramid and of the tower, [height, width, in, out].
        (r"neck/(lateral|output)_\d+/kernel$", (None, None, split)),
        (r"dyconv/(coarser|same|finer|offset)/kernel$", (None, None, split)),
        # Copied: a few thousand numbers at most.
        (r"patch_embed/projection/kernel$", ()),
        (r"(head/(box|centerness)|dyconv/scale_attention)/kernel$", ()),
        (r"(^|/)relative_position_bias_table$", ()),
        (r"(^|/)(bias|scale|gamma_[vl])$", ()),
        (r"^head/(bias_lang|bias0|log_scale|scale_\d+)$", ()),
    )


_SPLITS: dict[str, Any] = {"fsdp": ("replica", "fsdp"), "hsdp": "fsdp", "fsdp_tp": ("replica", "fsdp")}
PRESETS: dict[str, Rules] = {
    "ddp": ((r".*", ()),),
    **{name: _preset(split, "tensor" if name == "fsdp_tp" else None) for name, split in _SPLITS.items()},
}


def mask_rules(preset: str) -> Rules:
    """Returns rules for the mask branch (`model.masks`) that go with a preset."""
    split = _SPLITS.get(preset)
    return (
        (r"^masks/(lateral_\d+|controller)/kernel$", (split,)),  # from the tower's channels
        (r"^masks/conv_\d+/kernel$", (None, None, split)),
        (r"^masks/((detail|pixel_projection|maps)/kernel|bias_lang|bias0)$", ()),  # a few thousand numbers
    )


def pretraining_rules(preset: str) -> Rules:
    """Returns rules for what the models of pretraining have and GLIP has not."""
    if preset not in _SPLITS:
        return ()
    return (
        (r"^((image|region)_projection|pixel_decoder)/kernel$", (_SPLITS[preset],)),  # [in, out]
        (r"^(log_scale|logit_bias|mask_token)$", ()),
    )


def adapter_rules(rules: Rules) -> Rules:
    """Returns rules for the adapters of dense kernels (`model.lora`), after the rules of these kernels.

    An adapter is split as its kernel: `a` [in, rank] by the rows, `b` [rank, out] by the columns; the rank is not.
    """
    adapters: list[tuple[str, Any]] = []
    for pattern, spec in rules:
        if pattern.endswith("/kernel$") and not isinstance(spec, Choice) and len(spec) <= 2:
            of_module = pattern.removesuffix("kernel$")
            adapters += [(f"{of_module}a$", spec[:1]), (f"{of_module}b$", (None, *spec[1:]) if spec[1:] else ())]
    return adapters


# Over which axes the modalities of a stack are split, if their number is a multiple.
_MODALITIES: dict[str, Any] = {
    "ddp": None,
    "fsdp": ("replica", "fsdp"),
    "hsdp": "fsdp",
    "fsdp_tp": ("replica", "fsdp"),
}


def modality_rules(rules: Rules, split: Any) -> Rules:
    """Returns rules for what modalities have of their own (`model.modality`), after those of the shared parameters.

    A stack [E, ...] is split by its modalities, each with its heads and hidden widths as ever; where their number is
    no multiple of the axes, inside each as the shared parameter is. What of the shared ones is copied is copied.

    Args:
        rules: of the shared parameters.
        split: mesh axes of the first dimension; None never splits it.
    """
    axes = {split} if isinstance(split, str) else set(split or ())

    def stack(spec: Any) -> Any:
        if not any(spec):
            return ()
        inside = [None if axes & ({entry} if isinstance(entry, str) else set(entry or ())) else entry for entry in spec]
        return Choice((split, *inside), (None, *spec)) if split else (None, *spec)

    stacks: list[tuple[str, Any]] = [(r"^modality/(neck|language|classifier)/", ())]
    for pattern, spec in (*rules, *adapter_rules(rules)):
        inside = pattern[1:] if pattern.startswith("^") else f".*(?:{pattern})"
        stacks.append((f"^modality/{inside}", stack(spec)))
    return stacks


def resolve_rules(config: ConfigDict | FrozenConfigDict) -> Rules:
    """Returns the sharding rules of a recipe: its own, then those of its preset, then those of what it adds.

    Args:
        config: a recipe; reads `sharding_rules`, `sharding`, `finetune`, `model.modality`, `model.masks.kind` and
            `pretraining.task`.

    Raises:
        ValueError: there is no such preset; the error names the nearest.
    """
    if config.sharding not in PRESETS:
        nearest = difflib.get_close_matches(config.sharding, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"config.sharding is {config.sharding!r}: {hint}")
    rules = base = (*config.sharding_rules, *PRESETS[config.sharding])
    if config.model.modality.names:
        given = [rule for rule in config.sharding_rules if "modality" in rule[0]]
        rules = (*given, *modality_rules(base, _MODALITIES[config.sharding]), *base)
    if config.model.masks.kind:
        rules = (*rules, *mask_rules(config.sharding))
    if config.pretraining.task:
        rules = (*rules, *pretraining_rules(config.sharding))
    if config.finetune.lora_rank:
        return (*rules, *adapter_rules(base))
    return (*rules, (r"^prompt/", ())) if config.finetune.mode == "prompt" else rules  # a few numbers for each phrase
