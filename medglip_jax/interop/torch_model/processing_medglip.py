"""Images and phrases to the inputs of MedGLIPModel, and its outputs to boxes, in plain PyTorch, OpenCV and Pillow.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=image, phrases=["left lung", "nodule"])
    with torch.no_grad():
        outputs = model(**inputs)
    results = processor.post_process(outputs, inputs, threshold=0.3)

The settings are in processor_config.json: canvas, max_tokens, detection and prefix, of the recipe that the model was
made with.
"""

import io
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

try:  # OpenCV's resampling is the one that the model was trained with
    import cv2
except ImportError:
    raise ImportError("MedGLIP resizes images with OpenCV: pip install opencv-python-headless") from None

# Blue, green, red, on the scale 0 to 255.
PIXEL_MEAN = (103.53, 116.28, 123.675)
PIXEL_STD = (57.375, 57.12, 58.395)
SEPARATOR = ". "
_JPEG = b"\xff\xd8\xff"
_LENGTHS = (64, 128, 256)  # tokens of the prompt buckets
_MIN_AREA = 1e-6  # least area that is divided by, in square pixels
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class MedGLIPInputs(BatchFeature):
    """The model's inputs as a dict, and what `post_process` needs to make boxes of its outputs.

    Attributes:
        phrases: the phrases of each image.
        sizes: height and width of each image, in pixels.
    """

    def __init__(self, data=None, tensor_type=None, phrases: Sequence = (), sizes: Sequence = ()):
        super().__init__(data, tensor_type=tensor_type)
        self.phrases, self.sizes = list(phrases), list(sizes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _decode(image: str | os.PathLike | bytes) -> np.ndarray | Image.Image:
    """Decodes a file or its content; a JPEG with OpenCV, as in training, anything else with Pillow."""
    name = f"the image of {len(image)} bytes" if isinstance(image, bytes) else os.fspath(image)
    try:
        encoded = image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()
        picture = Image.open(io.BytesIO(encoded))
        picture.load()  # Pillow refuses a truncated file; OpenCV fills it up with grey
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such image") from None
    except _UNREADABLE as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from None
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) if encoded.startswith(_JPEG) else None
    if pixels is not None:
        return pixels
    if getattr(picture, "n_frames", 1) != 1:
        raise ValueError(f"{name} holds several pictures: split them into files of their own")
    if picture.mode.startswith(("I", "F")):  # above 8 bits a grey image's own range becomes 0 to 255
        values = np.asarray(picture, np.float64)
        low, high = values.min(), values.max()
        return np.rint((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    return picture


def resize_into(image: np.ndarray, canvas: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes uint8[h, w, 3] into a canvas (H, W), keeping its aspect to the nearest pixel, zeros right and below.

    Returns:
        uint8[H, W, 3], and the (height, width) that the image takes in it.
    """
    height, width = image.shape[:2]
    factor = min(canvas[0] / height, canvas[1] / width)
    size = fitted_size((height, width), canvas)
    pixels = np.zeros((*canvas, 3), np.uint8)
    if size == (height, width):
        pixels[:height, :width] = image
    else:
        interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        cv2.resize(image, size[::-1], dst=pixels[: size[0], : size[1]], interpolation=interpolation)
    return pixels, size


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) that an image of this size takes in a canvas."""
    factor = min(limit / length for length, limit in zip(size, canvas, strict=True))
    height, width = (min(max(round(factor * length), 1), limit) for length, limit in zip(size, canvas, strict=True))
    return height, width


def normalize_pixels(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns float32[3, H, W], normalised BGR, of uint8[H, W, 3] RGB; beyond `size` (height, width) it is 0."""
    pixels = np.zeros((3, *image.shape[:2]), np.float32)
    inside = image[: size[0], : size[1], ::-1].astype(np.float32)
    inside = (inside - np.asarray(PIXEL_MEAN, np.float32)) / np.asarray(PIXEL_STD, np.float32)
    pixels[:, : size[0], : size[1]] = inside.transpose(2, 0, 1)
    return pixels


def split_phrases(phrases: str | Sequence[str]) -> list[str]:
    """Returns the phrases of "left lung. nodule." or of a list, without repetition.

    Raises:
        ValueError: there are none, one is empty, or one is no text.
    """
    if isinstance(phrases, str):
        phrases = re.split(r"\.\s+", re.sub(r"\.\s*$", "", phrases.strip()))
    if not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError(f"phrases: expected text as 'left lung. nodule' or a list of it, not {phrases!r}")
    names = [phrase.strip() for phrase in phrases]
    if not names or not all(names):
        raise ValueError(f"phrases: expected at least one and none empty, as 'left lung. nodule', not {phrases!r}")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"phrases: {error.object!r} is no valid Unicode text, it was not read as UTF-8") from None
    return list(dict.fromkeys(names))


def nms(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, limit: int) -> Tensor:
    """Greedy non-maximum suppression within each class.

    Args:
        boxes: [N, 4], x0 y0 x1 y1; the width is x1 - x0.
        scores: [N].
        classes: [N]; boxes of different classes never touch each other.
        iou_threshold: a box goes when its overlap with a better kept one is above this.
        limit: most boxes to keep.

    Returns:
        int64[n], indices of the kept boxes, best first; of equal scores the lower index.
    """
    left, kept = scores.clone(), []
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
    while len(kept) < min(limit, len(boxes)):
        best = int(left.argmax())
        if left[best] == -math.inf:
            break
        kept.append(best)
        sides = torch.minimum(boxes[:, 2:], boxes[best, 2:]) - torch.maximum(boxes[:, :2], boxes[best, :2])
        intersection = sides.clamp(min=0).prod(-1)
        iou = intersection / (areas + areas[best] - intersection).clamp(min=_MIN_AREA)
        left[(classes == classes[best]) & (iou > iou_threshold)] = -math.inf
        left[best] = -math.inf  # a box without area does not overlap itself
    return torch.tensor(kept, dtype=torch.long)


class MedGLIPProcessor(ProcessorMixin):
    """Preprocessing, prompts and post-processing of MedGLIPModel.

    Args:
        tokenizer: a fast tokenizer.
        canvas: (height, width) in pixels that every image is resized into.
        max_tokens: most tokens of a prompt.
        detection: the recipe's section: strides, score_threshold, pre_nms, nms_iou, max_detections.
        prefix: words that every prompt begins with and no phrase has, as "CT: ".
    """

    attributes, tokenizer_class = ["tokenizer"], "AutoTokenizer"  # transformers before 5 asks for them

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        canvas: Sequence[int],
        max_tokens: int,
        detection: dict,
        prefix: str = "",
    ):
        super().__init__(tokenizer)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer, and the offsets of one are needed")
        self.canvas, self.max_tokens, self.detection, self.prefix = list(canvas), max_tokens, dict(detection), prefix

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask", "phrase_map"]

    def __call__(self, images: Any, phrases: Any, return_tensors: str | None = "pt") -> MedGLIPInputs:
        """Makes one prompt for each image.

        Args:
            images: an image, or a list of them (see `read_image`).
            phrases: "left lung. nodule", or a list of phrases; for a list of images also a list of such lists, one an
                image. A phrase that is given twice counts once.
            return_tensors: "pt", or "np" for arrays.

        Returns:
            pixel_values float32[B, 3, H, W], input_ids and attention_mask int64[B, L], and phrase_map float32[B, K, L],
            1 on the tokens of each phrase. Its `to(device)` moves them.

        Raises:
            ValueError: an image cannot be read, a phrase is empty, or the phrases of an image do not fit one prompt.
        """
        images = images if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("there are no images: give at least one")
        pixels = [self.read_image(image) for image in images]
        asked = self.phrases_of_each(phrases, len(pixels))
        prompts = [self._encode(names) for names in asked]
        tokens = max(len(ids) for ids, _ in prompts)
        length = min([n for n in _LENGTHS if tokens <= n <= self.max_tokens] or [self.max_tokens])
        input_ids = np.full((len(prompts), length), self.tokenizer.pad_token_id or 0, np.int64)
        attention_mask = np.zeros_like(input_ids)
        phrase_map = np.zeros((len(prompts), max(map(len, asked)), length), np.float32)
        for i, (ids, owned) in enumerate(prompts):
            input_ids[i, : len(ids)], attention_mask[i, : len(ids)] = ids, 1
            phrase_map[i, : len(owned), : len(ids)] = owned
        canvas = (self.canvas[0], self.canvas[1])
        resized = [resize_into(image, canvas) for image in pixels]
        tensors = {
            "pixel_values": np.stack([normalize_pixels(*image) for image in resized]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "phrase_map": phrase_map,
        }
        return MedGLIPInputs(tensors, return_tensors, asked, [image.shape[:2] for image in pixels])

    def read_image(self, image: Any) -> np.ndarray:
        """Returns an image as uint8[H, W, 3] RGB, turned upright where EXIF data say so.

        Args:
            image: a file or its bytes (16-bit grey is stretched over 0 to 255), an 8-bit Pillow image (transparent
                pixels are black), or uint8[H, W] or uint8[H, W, 3] RGB.

        Raises:
            ValueError: the file is missing or damaged, or the image is not of that kind.
        """
        if isinstance(image, str | os.PathLike | bytes):
            image = _decode(image)
        if isinstance(image, Image.Image):
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"the Pillow image has mode {image.mode}: choose a window and convert it to 8 bits first"
                )
            try:
                image = ImageOps.exif_transpose(image)
            except _UNREADABLE as error:  # Pillow reads the pixels of a file only now
                raise ValueError(f"the Pillow image cannot be decoded: {error}") from None
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
            image = np.asarray(image.convert("RGB"))
        pixels = np.asarray(image)
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or pixels.shape[2:] not in ((), (3,))
            or not pixels.size
        ):
            raise ValueError(
                "an image array must be uint8[height, width] or uint8[height, width, 3] (RGB), not "
                f"{pixels.dtype}{list(pixels.shape)}; several images go into a list"
            )
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)

    def phrases_of_each(self, phrases: Any, count: int) -> list[list[str]]:
        """Returns the phrases of each of `count` images, given for all of them or one list an image."""
        if isinstance(phrases, str) or all(isinstance(phrase, str) for phrase in phrases):
            return [split_phrases(phrases)] * count
        if len(phrases) != count:
            raise ValueError(f"there are {count} images but {len(phrases)} lists of phrases: give one an image, or one")
        return [split_phrases(names) for names in phrases]

    def split_into_prompts(self, phrases: str | Sequence[str]) -> list[list[str]]:
        """Spreads phrases over as few prompts as hold them in their order.

        Raises:
            ValueError: there are no phrases, one is empty, or one alone does not fit into a prompt.
        """
        names = split_phrases(phrases)
        separator = self._count(SEPARATOR.strip())
        budget = self.max_tokens - self.tokenizer.num_special_tokens_to_add() - self._count(self.prefix) + separator
        prompts, start = [], 0
        while start < len(names):
            end, used = start, 0
            while end < len(names) and (used := used + self._count(names[end]) + separator) <= budget:
                end += 1
            end = max(end, start + 1)
            while end > start + 1 and self._count(SEPARATOR.join(names[start:end])) + separator > budget:
                end -= 1
            self._encode(names[start:end])
            prompts.append(names[start:end])
            start = end
        return prompts

    def _count(self, text: str) -> int:
        """Returns the number of tokens of a text, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _encode(self, names: list[str]) -> tuple[list[int], np.ndarray]:
        """Returns the token ids of a prompt and, as bool[K, L], which of them belong to each phrase."""
        text = self.prefix + SEPARATOR.join(names)
        encoding = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], np.asarray(encoding["offset_mapping"]).reshape(-1, 2)
        if len(ids) > self.max_tokens:
            advice = (
                "use a shorter one"
                if len(names) == 1
                else "model.predict spreads phrases over several prompts, and processor.split_into_prompts gives them"
            )
            named = f"the phrase {names[0]!r}" if len(names) == 1 else f"a prompt of these {len(names)} phrases"
            raise ValueError(f"{named} needs {len(ids)} tokens, and a prompt has {self.max_tokens}: {advice}")
        owned, start = np.zeros((len(names), len(ids)), bool), len(self.prefix)
        for row, name in zip(owned, names, strict=True):
            row[:] = (offsets[:, 0] < start + len(name)) & (offsets[:, 1] > start)
            start += len(name) + len(SEPARATOR)
            if not row.any():
                raise ValueError(f"the tokenizer keeps nothing of the phrase {name!r}: leave it out or rename it")
        return ids, owned

    def post_process(
        self, outputs: Any, inputs: MedGLIPInputs, threshold: float = 0.3, max_detections: int | None = None
    ) -> list[dict[str, Any]]:
        """Finds the boxes of each phrase (mmdetection's ATSSVLFusionHead).

        On each level the best `pre_nms` pairs of anchor and phrase whose phrase score exceeds `score_threshold` are
        candidates. Their score is then sqrt(phrase score * centerness). Suppression within each phrase works on corners
        that name the first and last pixel, clipped to the image.

        Args:
            outputs: of `model(**inputs)`; of a dict boxes, phrase_scores and centerness, also as arrays.
            inputs: what the processor returned, moved by its `to` if at all.
            threshold: least score of a box, 0 to 1. The recipe's score_threshold comes before it.
            max_detections: most boxes of an image; None and the most is the recipe's max_detections.

        Returns:
            For each image a dict, best first, on the CPU: boxes [n, 4], x0 y0 x1 y1 in pixels of the image as it was
            given, half-open; scores [n]; and phrases, a list.

        Raises:
            ValueError: an option is out of its range, or outputs and inputs are not those of one call.
        """
        limit = self._limit(max_detections)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}: scores are between 0 and 1")
        if not hasattr(inputs, "sizes"):  # not by its class: each folder that is loaded has a class of its own
            raise ValueError(
                "inputs must be what the processor returned, moved by inputs.to(device): a dict is not enough"
            )
        if outputs.get("phrase_scores") is None:
            raise ValueError("the outputs have no phrase_scores: call the model with all inputs, model(**inputs)")
        results = []
        columns = (torch.as_tensor(outputs[key]).detach() for key in ("boxes", "phrase_scores", "centerness"))
        for boxes, scores, centerness, names, size in zip(*columns, inputs.phrases, inputs.sizes, strict=True):
            boxes, scores, phrases = self._detect(boxes, scores, centerness, size)
            kept = (scores >= threshold).nonzero()[:, 0][:limit]
            results.append(
                {"boxes": boxes[kept], "scores": scores[kept], "phrases": [names[i] for i in phrases[kept].tolist()]}
            )
        return results

    def _limit(self, max_detections: int | None) -> int:
        most = self.detection["max_detections"]
        if max_detections is not None and not 1 <= max_detections <= most:
            raise ValueError(f"max_detections is {max_detections}: this model gives between 1 and {most}")
        return max_detections or most

    def _detect(
        self, boxes: Tensor, scores: Tensor, centerness: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns boxes, scores and phrase indices of one image, of its boxes [N, 4], scores [N, K], centerness [N]."""
        settings, count = self.detection, scores.shape[1]
        lengths = [math.ceil(self.canvas[0] / s) * math.ceil(self.canvas[1] / s) for s in settings["strides"]]
        if sum(lengths) != len(scores):
            raise ValueError(
                f"the outputs have {len(scores)} anchors, and a canvas of {self.canvas} has {sum(lengths)}"
            )
        pairs, start = [], 0
        for level in scores.split(lengths):
            flat = level.flatten()
            over = (flat > settings["score_threshold"]).nonzero()[:, 0]
            best = flat[over].argsort(descending=True, stable=True)[: settings["pre_nms"]]
            pairs.append(start * count + over[best])
            start += len(level)
        pair = torch.cat(pairs)
        anchor, phrase = pair // count, (pair % count).cpu()
        score = (scores.flatten()[pair] * centerness[anchor].sigmoid()).sqrt().cpu()

        height, width = fitted_size(size, (self.canvas[0], self.canvas[1]))
        last = boxes.new_tensor([1, 1])  # half-open corners to first and last pixels
        corners = torch.cat([boxes[anchor, :2], boxes[anchor, 2:] - last], dim=1)
        corners = corners.clamp(min=0).minimum(corners.new_tensor([width - 1, height - 1] * 2)).cpu()
        valid = (corners[:, 2:] > corners[:, :2]).all(-1).nonzero()[:, 0]
        corners, score, phrase = corners[valid], score[valid], phrase[valid]
        kept = nms(corners, score, phrase, settings["nms_iou"], settings["max_detections"])
        corners = corners[kept].double() + torch.tensor([0, 0, 1, 1])
        scale = torch.tensor([width / size[1], height / size[0]] * 2, dtype=torch.float64)
        limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
        return (corners / scale).clamp(min=0).minimum(limit).float(), score[kept], phrase[kept]

    @torch.no_grad()
    def predict(
        self,
        model: Any,
        images: Any,
        phrases: Any,
        *,
        threshold: float = 0.3,
        max_detections: int | None = None,
        batch_size: int = 1,
    ) -> Any:
        """Finds phrases in one image or in each of a list, on the device where the model is.

        More phrases than a prompt holds go into several prompts, each with a pass over the image.

        Args:
            model: a MedGLIPModel.
            images, phrases: as for a call of the processor, but there may be any number of phrases.
            threshold, max_detections: see `post_process`.
            batch_size: most pairs of image and prompt that go through the model together.

        Returns:
            A dict as `post_process` makes it; for a list of images a list of them.

        Raises:
            ValueError: see `__call__` and `post_process`; of the phrases, one alone is too long for a prompt.
        """
        limit = self._limit(max_detections)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        single = not isinstance(images, list | tuple)
        pixels = [self.read_image(image) for image in ([images] if single else images)]
        asked = self.phrases_of_each(phrases, len(pixels))
        pairs = [(i, prompt) for i, names in enumerate(asked) for prompt in self.split_into_prompts(names)]
        found: list[list[dict[str, Any]]] = [[] for _ in pixels]
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            inputs = self([pixels[i] for i, _ in batch], [names for _, names in batch])
            results = self.post_process(model(**inputs.to(model.device)), inputs, threshold)
            for (i, _), result in zip(batch, results, strict=True):
                found[i].append(result)
        merged = [merge(parts, limit) for parts in found]
        return merged[0] if single else merged


def merge(parts: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Joins what several prompts found in an image, best first; a phrase is in one of them only."""
    scores = torch.cat([part["scores"] for part in parts])
    phrases = [phrase for part in parts for phrase in part["phrases"]]
    order = scores.argsort(descending=True, stable=True)[:limit]
    boxes = torch.cat([part["boxes"] for part in parts])[order]
    return {"boxes": boxes, "scores": scores[order], "phrases": [phrases[i] for i in order.tolist()]}
