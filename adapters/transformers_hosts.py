"""How the query models of Hugging Face transformers are read: where each keeps what, and how it resizes masks.

N queries. ``h w`` mask map, ``H W`` network input with its padding, which lies right and below.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from transfiner_refine.adapters.protocol import evaluating
from transfiner_refine.data.photos import PhotoSample
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.types import FeaturePyramid

PROBE_SIDE = 128
"""Side of the blank image on which the strides of a backbone are measured."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Host:
    """How one model of transformers is read.

    Attributes:
        backbone: Path of the module that makes the stages.
        processor: Class of its image processor.
        classes: Field of the output with the class logits.
        masks: Field with the mask logits; None for a detector of boxes.
        boxes: Whether there are ``pred_boxes``; otherwise they are taken from the masks.
        scores: How class logits become scores: softmax with a last column for "no object", or sigmoid without.
        resized: What the processor interpolates when it resizes masks.
    """

    backbone: str
    processor: str
    classes: str = "logits"
    masks: str | None = None
    boxes: bool = True
    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    resized: Literal["probs", "logits"] = "probs"

    def best_class(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Score and label of each query's best class: ``(N,)`` float32 and int64 from ``(N, C)``."""
        logits = logits.float()
        scores, labels = (logits.softmax(-1)[:, :-1] if self.scores == "softmax" else logits.sigmoid()).max(-1)
        return scores, labels

    def probs(self, logits: Tensor, padded: Size, size: Size, target: Size) -> Tensor:
        """Turn mask logits into masks, by the processor's rule for resizing them.

        Args:
            logits: ``(N, h, w)``, of the whole input.
            padded: Of the whole input.
            size: Of the image in it.
            target: Of the result.

        Returns:
            ``(N, height, width)`` float32 probabilities.
        """
        logits = logits.float()
        if self.resized == "probs":
            return resize(logits.sigmoid(), padded, size, target).clamp(0, 1)
        return resize(logits, padded, size, target).sigmoid()


_MASK_QUERIES: dict[str, Any] = {
    "backbone": "model.pixel_level_module.encoder",
    "classes": "class_queries_logits",
    "masks": "masks_queries_logits",
    "boxes": False,
    "scores": "softmax",
    "resized": "logits",
}
HOSTS = {
    "DetrForSegmentation": Host("detr.model.backbone", "DetrImageProcessor", masks="pred_masks", scores="softmax"),
    "ConditionalDetrForSegmentation": Host(
        "conditional_detr.model.backbone", "ConditionalDetrImageProcessor", masks="pred_masks"
    ),
    "Mask2FormerForUniversalSegmentation": Host(processor="Mask2FormerImageProcessor", **_MASK_QUERIES),
    "MaskFormerForInstanceSegmentation": Host(processor="MaskFormerImageProcessor", **_MASK_QUERIES),
    "DetrForObjectDetection": Host("model.backbone", "DetrImageProcessor", scores="softmax"),
    "ConditionalDetrForObjectDetection": Host("model.backbone", "ConditionalDetrImageProcessor"),
    "DeformableDetrForObjectDetection": Host("model.backbone", "DeformableDetrImageProcessor"),
    "RTDetrForObjectDetection": Host("model.backbone", "RTDetrImageProcessor"),
    "RTDetrV2ForObjectDetection": Host("model.backbone", "RTDetrImageProcessor"),
    "DFineForObjectDetection": Host("model.backbone", "RTDetrImageProcessor"),
}
"""Models by the name of their class, or of a class that theirs derives from."""


def host_of(model: nn.Module) -> Host:
    """Find how a model is read.

    Raises:
        InvalidInputError: If it is none of :data:`HOSTS`.
    """
    for base in type(model).__mro__:
        if base.__name__ in HOSTS:
            return HOSTS[base.__name__]
    raise InvalidInputError(
        f"expected one of {', '.join(HOSTS)}, got {type(model).__name__}: refine its masks with Refiner.refine"
    )


def input_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Size, list[Size]]:
    """Height and width of the network's input, and of each image in it without its padding.

    Args:
        pixel_values: ``(B, 3, H, W)``.
        pixel_mask: ``(B, H, W)``, above 0 where the image is; None if there is no padding.
    """
    padded = (pixel_values.shape[2], pixel_values.shape[3])
    if pixel_mask is None:
        return padded, [padded] * pixel_values.shape[0]
    inside = pixel_mask > 0
    rows, columns = inside.any(dim=2).sum(1).tolist(), inside.any(dim=1).sum(1).tolist()
    return padded, list(zip(rows, columns, strict=True))


def stage_maps(stages: Any) -> list[Tensor]:
    """Feature maps in what a backbone returned, which some hosts pair with padding masks."""
    maps: Sequence[Any] = getattr(stages, "feature_maps", stages)
    return [level[0] if isinstance(level, tuple) else level for level in maps]


def measure_stages(backbone: nn.Module) -> tuple[list[int], tuple[int, ...]]:
    """Channels and strides of a backbone's stages, found by running it once.

    Raises:
        InvalidInputError: If they are no pyramid whose strides double.
    """
    blank = next(backbone.parameters()).new_zeros((1, 3, PROBE_SIDE, PROBE_SIDE))
    with_mask = "pixel_mask" in inspect.signature(backbone.forward).parameters
    with evaluating(backbone):
        stages = backbone(blank, torch.ones_like(blank[:, 0])) if with_mask else backbone(blank)
    maps = stage_maps(stages)
    strides = tuple(round(PROBE_SIDE / level.shape[3]) for level in maps)
    FeaturePyramid(tuple(level[:, :1] for level in maps), strides)  # says what is wrong with them
    return [level.shape[1] for level in maps], strides


def unnormalised(processor: Any, pixel_values: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Undo what an image processor did to the values of images, and cut off their padding.

    Args:
        processor: The image processor.
        pixel_values: ``(B, 3, H, W)`` float.
        sizes: Of each image without its padding.

    Returns:
        ``(3, height, width)`` float32 RGB in [0, 1] each.
    """
    pixels = pixel_values.float()
    if processor.do_normalize:
        mean, std = (pixels.new_tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    if not processor.do_rescale:
        pixels = pixels / 255
    pixels = pixels.clamp(0, 1)
    return [image[:, :rows, :columns] for image, (rows, columns) in zip(pixels, sizes, strict=True)]


def training_input(host: Host, processor: Any, samples: Sequence[PhotoSample]) -> dict[str, Any]:
    """Bring photos and their objects into a host's training input.

    Args:
        host: How the model is read.
        processor: Its image processor.
        samples: Photos, all on one device.

    Returns:
        The model's keyword arguments on that device: ``pixel_values`` and, if the processor pads, ``pixel_mask``, with
        ``labels`` or with ``mask_labels`` and ``class_labels``. A mask that resizing leaves without a pixel stays.
    """
    device = samples[0].image.device
    images = [sample.image for sample in samples]
    inputs = dict(processor(images, return_tensors="pt", input_data_format="channels_first"))
    inputs = {name: value.to(device) for name, value in inputs.items() if name in ("pixel_values", "pixel_mask")}
    padded, sizes = input_sizes(inputs["pixel_values"], inputs.get("pixel_mask"))
    masks = []
    for sample, size in zip(samples, sizes, strict=True):
        of_image = torch.zeros((len(sample.masks), *padded), device=device)
        if len(sample.masks):
            given = (sample.masks.shape[1], sample.masks.shape[2])
            of_image[:, : size[0], : size[1]] = resize(sample.masks.float(), given, given, size) >= 0.5
        masks.append(of_image)
    if not host.boxes:
        return inputs | {"mask_labels": masks, "class_labels": [sample.labels for sample in samples]}
    labels = []
    for sample, of_image in zip(samples, masks, strict=True):
        height, width = sample.image.shape[1:]
        boxes = boxes_from_masks(sample.masks)
        fractions = box_convert(boxes / boxes.new_tensor([width, height, width, height]), "xyxy", "cxcywh")
        labels.append({"class_labels": sample.labels, "boxes": fractions, "masks": of_image})
    return inputs | {"labels": labels}


def pixel_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Boxes ``(N, 4)`` cxcywh in fractions of an image as ``(N, 4)`` float32 xyxy in its pixels."""
    boxes = box_convert(boxes.float(), "cxcywh", "xyxy")
    return boxes * boxes.new_tensor([size[1], size[0], size[1], size[0]])


def resize(maps: Tensor, padded: Size, size: Size, target: Size) -> Tensor:
    """Stretch maps ``(N, h, w)`` over a padded input, and give the image in it at its target size."""
    if size != padded:
        maps = _interpolate(maps, padded)[:, : size[0], : size[1]]
    return maps if tuple(maps.shape[1:]) == target else _interpolate(maps, target)


def _interpolate(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]
