"""GLIP (arXiv 2112.03857) in plain PyTorch, with mmdetection's parameter names; needs transformers too.

    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    found = model.predict("chest.png", ["left lung", "nodule"], processor)

Inference only: there is no dropout and no loss, but the outputs have gradients. Feature maps are [B, C, H, W].
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

_LIMIT = 50000.0  # GLIP clamps logits and the tower's text layers to stay finite in half precision
_FRAME = 2  # rows and columns of zeros around a level: a 2 x 2 read that touches it, or just misses it, stays inside
# What a predicted delta is divided by, and the most that a decoded side is of its anchor's (and its inverse).
_DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_MAX_SIDE_RATIO = 1000 / 16


class MedGLIPConfig(PretrainedConfig):
    """The recipe that the model was trained with.

    Attributes:
        recipe: nested dicts; the model reads `recipe["model"]`, and of `recipe["detection"]` strides and anchor_scale.
    """

    model_type = "medglip"

    def __init__(self, recipe: dict[str, Any] | None = None, **kwargs):
        self.recipe = recipe or {}
        super().__init__(**kwargs)


@dataclasses.dataclass
class MedGLIPOutput(ModelOutput):
    """What the model says about each of its N anchors: all levels, finest first, row by row.

    Attributes:
        token_logits: [B, N, L], agreement with every token of the prompt.
        box_deltas: [B, N, 4], what `decode_boxes` moves the anchors by.
        centerness: [B, N], logits.
        boxes: [B, N, 4], x0 y0 x1 y1 in pixels of the input, half-open, not clipped to it.
        phrase_scores: [B, N, K], 0 to 1, if there was a phrase_map: the mean probability of the phrase's tokens, 0 for
            a phrase without tokens.
    """

    token_logits: Tensor
    box_deltas: Tensor | None = None
    centerness: Tensor | None = None
    boxes: Tensor | None = None
    phrase_scores: Tensor | None = None


def at_least_float32(x: Tensor) -> Tensor:
    """Softmax, positions, boxes and scores are computed in this, whatever the model was cast to."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def flatten_levels(levels: Sequence[Tensor]) -> Tensor:
    """Joins [B, C, h, w] of all levels to [B, N, C], finest level first, row by row."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)


def unflatten_levels(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten_levels`, with the level sizes of `like`."""
    parts = x.split([y.shape[2] * y.shape[3] for y in like], dim=1)
    return [part.transpose(1, 2).reshape(y.shape) for part, y in zip(parts, like, strict=True)]


def nest(**modules: Any) -> Any:
    """Modules that only give their names to the parameters below them."""
    return nn.ModuleDict(modules)


def number(modules: Iterable[Any]) -> Any:
    """Modules that have numbers for names."""
    return nn.ModuleList(modules)


# The image: Swin Transformer v1 (arXiv 2103.14030), maps [B, H, W, C], and its feature pyramid (arXiv 1612.03144).


def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Rows of the relative position table for each (query, key) pair of a window: int64[window**2, window**2]."""
    tokens = torch.arange(window * window, device=device)
    y, x = tokens // window, tokens % window
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def shifted_window_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """What is added to the logits of a map that was rolled by `shift`: float32[windows, window**2, window**2].

    It is 0 where two tokens are neighbours in the image, -100 where only the roll brought them together.
    """

    def bands(size: int) -> Tensor:
        place = torch.arange(size, device=device)
        return (place >= size - window).long() + (place >= size - shift).long()

    regions = (3 * bands(height)[:, None] + bands(width)).reshape(height // window, window, width // window, window)
    regions = regions.transpose(1, 2).reshape(-1, window * window)  # [windows, tokens]
    return (regions[:, :, None] != regions[:, None, :]).float() * -100


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, shifted by `shift` tokens, with a learned relative position bias."""

    def __init__(self, channels: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.w_msa = nest(qkv=nn.Linear(channels, 3 * channels), proj=nn.Linear(channels, channels))
        table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.w_msa.register_parameter("relative_position_bias_table", table)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] -> the same
        b, h, w, c = x.shape
        window, shift, heads = self.window, self.shift, self.heads
        x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))
        rows, columns = x.shape[1] // window, x.shape[2] // window
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = x.reshape(b, rows, window, columns, window, c).transpose(2, 3)
        x = x.reshape(b, rows * columns, window**2, c)  # [B, windows, T, C]

        qkv = self.w_msa.qkv(x).reshape(*x.shape[:3], 3, heads, c // heads)
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [B, windows, heads, T, d]
        logits = at_least_float32(query * (c // heads) ** -0.5 @ key.transpose(-1, -2))
        index = relative_position_index(window, x.device)
        logits = logits + self.w_msa.relative_position_bias_table[index].permute(2, 0, 1)
        if shift:
            mask = shifted_window_mask(rows * window, columns * window, window, shift, x.device)
            logits = logits + mask[:, None]
        x = (logits.softmax(-1).to(x.dtype) @ value).transpose(2, 3).reshape(x.shape)
        x = self.w_msa.proj(x)

        x = x.reshape(b, rows, columns, window, window, c).transpose(2, 3)
        x = x.reshape(b, rows * window, columns * window, c)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :h, :w]


class SwinBlock(nn.Module):
    """Window attention and an MLP, each on the normalised input and added back to it."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, mlp_ratio: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window, shift)
        hidden = mlp_ratio * channels
        first = nn.Sequential(nn.Linear(channels, hidden), nn.GELU())
        self.ffn = nest(layers=nn.Sequential(first, nn.Linear(hidden, channels)))

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] -> the same
        x = x + self.attn(self.norm1(x))
        return x + self.ffn.layers(self.norm2(x))


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels; the four neighbours vary fastest (mmdetection's order)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2 C]
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """The backbone: feature maps of strides 8, 16 and 32, each with a norm."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        channels, window = config["embed_dim"], config["window"]
        self.patch_embed = nest(projection=nn.Conv2d(3, channels, 4, 4), norm=nn.LayerNorm(channels))
        self.stages = number([])
        for stage, (depth, heads) in enumerate(zip(config["depths"], config["num_heads"], strict=True)):
            shifts = [window // 2 if index % 2 else 0 for index in range(depth)]
            blocks = [SwinBlock(channels, heads, window, shift, config["mlp_ratio"]) for shift in shifts]
            self.stages.append(nest(blocks=number(blocks)))
            if stage > 0:
                self.add_module(f"norm{stage}", nn.LayerNorm(channels))
            if stage + 1 < len(config["depths"]):
                self.stages[stage]["downsample"] = PatchMerging(channels)
                channels *= 2

    def forward(self, pixels: Tensor) -> list[Tensor]:  # [B, 3, H, W]
        pixels = F.pad(pixels, (0, -pixels.shape[3] % 4, 0, -pixels.shape[2] % 4))
        x = self.patch_embed.norm(self.patch_embed.projection(pixels).permute(0, 2, 3, 1))
        features = []
        for stage, parts in enumerate(self.stages):
            for block in parts.blocks:
                x = block(x)
            if stage > 0:
                features.append(getattr(self, f"norm{stage}")(x).permute(0, 3, 1, 2))
            if "downsample" in parts:
                x = parts.downsample(x)
        return features


class FPN(nn.Module):
    """Levels of strides 8 to 128 from backbone features of strides 8, 16 and 32."""

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        self.lateral_convs = number(nest(conv=nn.Conv2d(width, channels, 1)) for width in in_channels)
        self.fpn_convs = number(nest(conv=nn.Conv2d(channels, channels, 3, s, 1)) for s in (1, 1, 1, 2, 2))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        merged = [lateral.conv(x) for lateral, x in zip(self.lateral_convs, features, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[2:], mode="nearest")
        levels = [self.fpn_convs[i].conv(x) for i, x in enumerate(merged)]
        levels.append(self.fpn_convs[3].conv(levels[-1]))
        levels.append(self.fpn_convs[4].conv(levels[-1].relu()))
        return levels


# The prompt: BERT (arXiv 1810.04805).


class BertLayer(nn.Module):
    """Self-attention and an MLP, each followed by a norm of the sum with its input; clamped in GLIP's tower."""

    def __init__(self, config: dict[str, Any], in_tower: bool = False):
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.heads, self.in_tower = config["num_heads"], in_tower
        projections = nest(**{name: nn.Linear(width, width) for name in ("query", "key", "value")})
        output = nest(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))
        self.attention = nest(**{"self": projections, "output": output})
        self.intermediate = nest(dense=nn.Linear(width, hidden))
        self.output = nest(dense=nn.Linear(hidden, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [B, L, D], bool[B, L] -> [B, L, D]
        b, length, width = x.shape
        head_size = width // self.heads

        def clamp(y: Tensor) -> Tensor:
            return y.clamp(-_LIMIT, _LIMIT) if self.in_tower else y

        def heads(name: str) -> Tensor:  # [B, heads, L, d]
            return self.attention["self"][name](x).reshape(b, length, self.heads, head_size).transpose(1, 2)

        logits = clamp(at_least_float32(heads("query") @ heads("key").transpose(2, 3) * head_size**-0.5))
        logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        y = (logits.softmax(-1).to(x.dtype) @ heads("value")).transpose(1, 2).reshape(b, length, width)
        x = self.attention.output.LayerNorm(x + self.attention.output.dense(y))
        y = clamp(F.gelu(clamp(self.intermediate.dense(x))))
        return clamp(self.output.LayerNorm(x + clamp(self.output.dense(y))))


class Bert(nn.Module):
    """The text encoder: hidden states of the last layer, padding included."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width = config["hidden_size"]
        self.embeddings = nest(
            word_embeddings=nn.Embedding(config["vocab_size"], width),
            position_embeddings=nn.Embedding(config["max_positions"], width),
            token_type_embeddings=nn.Embedding(2, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.encoder = nest(layer=number(BertLayer(config) for _ in range(config["num_layers"])))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:  # int64[B, L], bool[B, L] -> [B, L, D]
        tables = self.embeddings
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = tables.word_embeddings(input_ids) + tables.position_embeddings(positions)
        x = tables.LayerNorm(x + tables.token_type_embeddings(torch.zeros_like(positions)))
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x


# The tower: fusion of image and text, a text layer, and the dynamic head's convolutions (arXiv 2106.08322).


class VLFuse(nn.Module):
    """Bi-directional cross-attention between all pixels of the pyramid and all tokens of the prompt.

    The residual is added to the normalised streams, as in GLIP's code. The image reads only tokens under the mask; the
    text reads every pixel, padding included, and padded tokens read too.
    """

    def __init__(self, channels: int, width: int, config: dict[str, Any]):
        super().__init__()
        dim, self.heads = config["fusion_dim"], config["fusion_heads"]
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(channels), nn.LayerNorm(width)
        sizes = {"v_proj": (channels, dim), "values_v_proj": (channels, dim), "out_v_proj": (dim, channels)}
        sizes |= {"l_proj": (width, dim), "values_l_proj": (width, dim), "out_l_proj": (dim, width)}
        self.attn = nest(**{name: nn.Linear(*size) for name, size in sizes.items()})
        self.gamma_v = nn.Parameter(torch.full((channels,), 1 / config["num_blocks"]))
        self.gamma_l = nn.Parameter(torch.full((width,), 1 / config["num_blocks"]))

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        visual, text = self.layer_norm_v(visual), self.layer_norm_l(text)  # [B, N, C], [B, L, D]

        def split(name: str, x: Tensor) -> Tensor:  # [B, heads, tokens, d]
            return self.attn[name](x).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

        query = split("v_proj", visual)
        logits = query * query.shape[-1] ** -0.5 @ split("l_proj", text).transpose(2, 3)  # [B, heads, N, L]
        logits = at_least_float32(logits).clamp(-_LIMIT, _LIMIT)
        to_text = (logits - logits.amax(2, keepdim=True)).clamp(min=-_LIMIT).softmax(2).to(text.dtype)
        to_visual = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        to_visual = to_visual.softmax(3).to(visual.dtype)

        visual_update = (to_visual @ split("values_l_proj", text)).transpose(1, 2).flatten(2)
        text_update = (to_text.transpose(2, 3) @ split("values_v_proj", visual)).transpose(1, 2).flatten(2)
        visual = visual + self.gamma_v * self.attn.out_v_proj(visual_update)
        return visual, text + self.gamma_l * self.attn.out_l_proj(text_update)


class Reading(NamedTuple):
    """One modulated deformable convolution (DCNv2, arXiv 1811.11168) of 3 x 3, with padding 1, of one level.

    Attributes:
        level: index of the level that is read, [B, C, H, W].
        offsets: [B, 18, h, w], (y, x) by which each tap moves, in pixels of that level; taps in row-major order.
        mask: [B, 9, h, w], the weight of each tap.
        stride: pixels of the level between pixels of the output.
    """

    level: int
    offsets: Tensor
    mask: Tensor
    stride: int = 1


def deform_convs(
    levels: Sequence[Tensor], kernels: Sequence[Tensor], groups: Sequence[Sequence[Reading]]
) -> list[list[Tensor]]:
    """Deformable convolutions of a pyramid, all of them in one loop over the nine taps.

    The levels lie in one table of pixels, each in a frame of zeros, so that a tap is four look-ups for all readings
    together; the temporaries are those of a single tap.

    Args:
        levels: maps [B, C, H, W] of one C and type.
        kernels: each [D, C, 3, 3].
        groups: the readings of each kernel.

    Returns:
        For each group, for each reading, [B, D, h, w], without bias.
    """
    b, channels = levels[0].shape[:2]
    device, dtype = levels[0].device, levels[0].dtype
    pixels = flatten_levels([F.pad(x, (_FRAME,) * 4) for x in levels])  # [B, T, C]
    first = torch.arange(b, device=device)[:, None, None] * pixels.shape[1]
    pixels = pixels.reshape(-1, channels)
    lengths = [(x.shape[2] + 2 * _FRAME) * (x.shape[3] + 2 * _FRAME) for x in levels]
    taps = torch.arange(9, device=device)[:, None, None]

    corners, row_lengths, fractions, masks = [], [], [], []
    for level, offsets, mask, stride in (reading for readings in groups for reading in readings):
        (h, w), (height, width) = offsets.shape[2:], levels[level].shape[2:]
        moves = offsets.reshape(b, 9, 2, h, w)
        y = moves[:, :, 0] + (torch.arange(h, device=device)[:, None] * stride + taps // 3 - 1)  # [B, 9, h, w]
        x = moves[:, :, 1] + (torch.arange(w, device=device) * stride + taps % 3 - 1)
        # Further out everything is zero; the frame is reached half a pixel earlier than its last full patch.
        y, x = y.clamp(-1.5, height + 0.5).flatten(2), x.clamp(-1.5, width + 0.5).flatten(2)
        top, left = y.detach().floor(), x.detach().floor()
        row_length = width + 2 * _FRAME
        corners.append(sum(lengths[:level]) + (top.long() + _FRAME) * row_length + left.long() + _FRAME)
        row_lengths.append(torch.full((h * w,), row_length, device=device))
        fractions.append(torch.stack([y - top, x - left], dim=-1).to(dtype))
        masks.append(mask.flatten(2))
    corner, below = first + torch.cat(corners, dim=2), torch.cat(row_lengths)  # [B, 9, P], [P]
    fraction, weight = torch.cat(fractions, dim=2), torch.cat(masks, dim=2)  # [B, 9, P, 2], [B, 9, P]

    sizes = [[reading.mask[0, 0].numel() for reading in readings] for readings in groups]
    totals: list[Any] = [0] * len(kernels)
    for tap in range(9):
        index, (fy, fx) = corner[:, tap], fraction[:, tap].split(1, dim=-1)
        corners = [F.embedding(index + step, pixels) for step in (0, 1, below, below + 1)]  # each [B, P, C]
        left, right = torch.lerp(corners[0], corners[2], fy), torch.lerp(corners[1], corners[3], fy)
        values = torch.lerp(left, right, fx) * weight[:, tap, :, None]  # [B, P, C]
        parts = values.split([sum(group) for group in sizes], dim=1)
        for k, (part, kernel) in enumerate(zip(parts, kernels, strict=True)):
            totals[k] = totals[k] + part @ kernel[:, :, tap // 3, tap % 3].T  # [B, p, D]
    outputs = []
    for total, group, readings in zip(totals, sizes, groups, strict=True):
        parts = zip(total.transpose(1, 2).split(group, dim=2), readings, strict=True)
        outputs.append([part.reshape(b, -1, *reading.mask.shape[2:]) for part, reading in parts])
    return outputs


def crop_as_flat_buffer(maps: Tensor, height: int, width: int) -> Tensor:
    """Reads [B, C, H, W] as the CUDA kernel does when it takes it for a smaller map: [B, C, height, width].

    The kernel walks the buffer with the strides of the output (microsoft/GLIP#62); released weights expect it.
    """
    b, c = maps.shape[:2]
    return maps.flatten(1)[:, : c * height * width].reshape(b, c, height, width)


def resize_align_corners(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of [B, C, H, W] that maps corner pixels onto corner pixels."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)


class DynamicReLU(nn.Module):
    """The larger of two lines a channel, whose slopes and offsets depend on the image (arXiv 2003.10027)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 4
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 4 * channels))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the same
        y = F.hardsigmoid(self.fc(x.mean((2, 3))))[:, :, None, None] - 0.5
        a1, b1, a2, b2 = y.chunk(4, dim=1)
        return torch.maximum(x * (2 * a1 + 1) + b1, x * (2 * a2) + b2)


class DyConv(nn.Module):
    """Mixes each pyramid level with its neighbours by deformable convolutions that share one offset map.

    For the coarser neighbour the level's offset map is larger than the output. `legacy_offsets` reads it as released
    weights were trained to; otherwise the map is resized to the neighbour's size.
    """

    def __init__(self, channels: int, config: dict[str, Any]):
        super().__init__()
        self.fit = crop_as_flat_buffer if config["legacy_offsets"] else resize_align_corners
        norms = [nn.GroupNorm(config["norm_groups"], channels) for _ in range(3)]
        # Of the coarser, the same and the finer level.
        self.dyconvs = number(nest(conv=nn.Conv2d(channels, channels, 3), bn=norm) for norm in norms)
        self.attnconv = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1))
        self.relu = DynamicReLU(channels)
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        coarser, same, finer = readings = [], [], []
        for i, x in enumerate(levels):
            # Positions on a map of a hundred pixels and more need more than bfloat16's eight bits.
            maps = at_least_float32(self.offset(x))
            offsets, mask = maps[:, :18], maps[:, 18:].sigmoid()
            if i + 1 < len(levels):
                size = levels[i + 1].shape[2:]
                coarser.append(Reading(i + 1, self.fit(offsets, *size), self.fit(mask, *size).to(x.dtype)))
            same.append(Reading(i, offsets, mask.to(x.dtype)))
            if i > 0:
                finer.append(Reading(i - 1, offsets, mask.to(x.dtype), stride=2))
        convolved = deform_convs(levels, [parts.conv.weight for parts in self.dyconvs], readings)
        coarser, same, finer = (
            [parts.bn(x + parts.conv.bias[:, None, None]) for x in group]
            for parts, group in zip(self.dyconvs, convolved, strict=True)
        )
        outputs = []
        for i, x in enumerate(levels):
            inputs = [same[i]]
            if i > 0:
                inputs.append(finer[i - 1])
            if i + 1 < len(levels):
                inputs.append(resize_align_corners(coarser[i], *x.shape[2:]))
            weighted = [y * F.hardsigmoid(self.attnconv(y.mean((2, 3), keepdim=True)).relu()) for y in inputs]
            outputs.append(self.relu(sum(weighted[1:], weighted[0]) / len(weighted)))
        return outputs


# The heads, and the boxes that their outputs stand for.


class Head(nn.Module):
    """The tower, then box deltas, centerness and the agreement of every pixel with every token."""

    def __init__(self, config: dict[str, Any], num_levels: int):
        super().__init__()
        channels, width, tower = config["fpn"]["channels"], config["bert"]["hidden_size"], config["tower"]
        self.dyhead_tower = number([])
        for _ in range(tower["num_blocks"]):
            fusion = nest(b_attn=VLFuse(channels, width, tower))
            self.dyhead_tower.extend([fusion, BertLayer(config["bert"], in_tower=True), DyConv(channels, tower)])
        self.bbox_pred, self.centerness = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 1, 1)
        self.scales: Any = number(nn.ParameterDict({"scale": torch.ones(())}) for _ in range(num_levels))
        self.dot_product_projection_text = nn.Linear(width, channels)
        prior = config["prior_probability"]
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias_lang = nn.Parameter(torch.zeros(width))
        self.bias0 = nn.Parameter(torch.full((1,), -math.log((1 - prior) / prior)))

    def forward(self, levels: list[Tensor], text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for i in range(0, len(self.dyhead_tower), 3):
            fusion, text_layer, dyconv = self.dyhead_tower[i : i + 3]
            visual, text = fusion.b_attn(flatten_levels(levels), text, mask)
            text = text_layer(text, mask)
            levels = dyconv(unflatten_levels(visual, levels))

        pairs = zip(levels, self.scales, strict=True)
        deltas = flatten_levels([at_least_float32(self.bbox_pred(x)) * part["scale"] for x, part in pairs])
        centerness = at_least_float32(flatten_levels([self.centerness(x) for x in levels])[..., 0])
        dtype, text = text.dtype, at_least_float32(text)
        embedding = text / text.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        tokens = self.dot_product_projection_text((embedding / 2).to(dtype))  # [B, L, C]
        bias = embedding @ at_least_float32(self.bias_lang) + self.bias0  # [B, L]
        agreement = at_least_float32(flatten_levels(levels)) @ at_least_float32(tokens).transpose(1, 2)  # [B, N, L]
        logits = agreement / at_least_float32(self.log_scale).exp() + bias[:, None]
        return logits.clamp(-_LIMIT, _LIMIT), deltas, centerness


def make_anchors(levels: Sequence[Tensor], strides: Sequence[int], scale: float, dtype: torch.dtype) -> Tensor:
    """Returns one square box for each cell of the levels, `scale` strides wide, half-open, in pixels: [N, 4]."""
    anchors = []
    for x, stride in zip(levels, strides, strict=True):
        rows, columns = ((torch.arange(n, device=x.device, dtype=dtype) + 0.5) * stride for n in x.shape[2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        half = 0.5 * scale * stride
        anchors.append(torch.stack([x - half, y - half, x + half, y + half], dim=-1).reshape(-1, 4))
    return torch.cat(anchors)


def decode_boxes(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Moves and stretches anchors [N, 4] by predicted deltas [B, N, 4]: half-open boxes [B, N, 4] in pixels."""
    deltas = deltas / deltas.new_tensor(_DELTA_WEIGHTS)
    limit = math.log(_MAX_SIDE_RATIO)
    sides = anchors[:, 2:] - anchors[:, :2]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[..., :2] * sides
    half = sides * deltas[..., 2:].clamp(-limit, limit).exp() / 2
    return torch.cat([centers - half, centers + half], dim=-1)


class MedGLIPModel(PreTrainedModel):
    """The whole detector; its parameters have the names and shapes of mmdetection's GLIP."""

    config_class = MedGLIPConfig
    base_model_prefix = "medglip"
    main_input_name = "pixel_values"

    def __init__(self, config: MedGLIPConfig):
        super().__init__(config)
        if not config.recipe:
            raise ValueError("the configuration has no recipe: load it from the config.json of an export folder")
        sizes = config.recipe["model"]
        widths = [sizes["swin"]["embed_dim"] * 2**stage for stage in range(1, len(sizes["swin"]["depths"]))]
        self.backbone = Swin(sizes["swin"])
        self.neck = FPN(widths, sizes["fpn"]["channels"])
        self.language_model = nest(language_backbone=nest(body=nest(model=Bert(sizes["bert"]))))
        self.bbox_head = nest(head=Head(sizes, len(config.recipe["detection"]["strides"])))
        self.post_init()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, phrase_map: Tensor | None = None
    ) -> MedGLIPOutput:
        """Scores every anchor against every token and, given a phrase_map, every phrase.

        Args:
            pixel_values: float[B, 3, H, W], normalised BGR with zeros as padding, as the processor returns them.
            input_ids: int64[B, L].
            attention_mask: [B, L], 1 for real tokens.
            phrase_map: [B, K, L], or [K, L] for all images: above 0 on the tokens of each phrase.

        Raises:
            ValueError: the prompt is longer than the table of positions, or not as long as the phrase_map.
        """
        length, most = input_ids.shape[1], self.config.recipe["model"]["bert"]["max_positions"]
        if length > most:
            raise ValueError(f"the prompt has {length} tokens, and this model knows {most} positions")
        if phrase_map is not None and phrase_map.shape[-1] != length:
            raise ValueError(f"phrase_map is for {phrase_map.shape[-1]} tokens, and the prompt has {length}")
        mask = attention_mask.bool()
        levels = self.neck(self.backbone(pixel_values.to(self.dtype)))
        text = self.language_model.language_backbone.body.model(input_ids, mask)
        logits, deltas, centerness = self.bbox_head.head(levels, text, mask)

        detection = self.config.recipe["detection"]
        anchors = make_anchors(levels, detection["strides"], detection["anchor_scale"], deltas.dtype)
        scores = None
        if phrase_map is not None:
            tokens = (phrase_map > 0).to(logits.dtype)
            weights = tokens / tokens.sum(-1, keepdim=True).clamp(min=1)
            scores = logits.sigmoid() @ weights.transpose(-1, -2)
        return MedGLIPOutput(logits, deltas, centerness, decode_boxes(anchors, deltas), scores)

    def predict(self, images: Any, phrases: Any, processor: Any, **options: Any) -> Any:
        """Finds phrases in one image or in each of a list, on the device where the model is.

        Args:
            images, phrases, options: see `processor.predict`, which does it and says what it returns.
            processor: `AutoProcessor.from_pretrained(folder, trust_remote_code=True)`.
        """
        return processor.predict(self, images, phrases, **options)
