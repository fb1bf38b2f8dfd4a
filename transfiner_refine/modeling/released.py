"""The released Mask Transfiner: the authors' COCO checkpoints as one model, without Detectron2.

:class:`ReleasedMaskTransfiner` takes an image and gives its instances with refined masks. :class:`ReleasedMaskBranch`
is its mask branch alone, for a detector whose FPN these weights were trained with.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.paste import paste
from transfiner_refine.inputs import as_image
from transfiner_refine.modeling.released_branch import TOKEN_BUDGET, ReleasedMaskBranch, ReleasedMasks
from transfiner_refine.modeling.released_detector import PIXEL_MEANS, ReleasedNetwork
from transfiner_refine.modeling.released_files import load_directory, translate_checkpoint
from transfiner_refine.modeling.released_hub import find_released
from transfiner_refine.modeling.released_layout import ReleasedConfig
from transfiner_refine.types import Instances

__all__ = [
    "COCO_CATEGORY_IDS",
    "ReleasedConfig",
    "ReleasedMaskBranch",
    "ReleasedMaskTransfiner",
    "ReleasedMasks",
]

MAX_SIZE = 1333
"""Longest side of the network's input; it wins over ``min_size``."""

PADDING = 32
"""Height and width of the network's input are padded to multiples of this, the stride of p5."""

COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""COCO's category id of each of the 80 labels."""


class ReleasedMaskTransfiner(ReleasedNetwork):
    """Mask R-CNN with the released mask branch: an image in, its instances with refined masks out.

    Inference only. Made by :meth:`from_pretrained` or :meth:`from_original`.
    """

    @classmethod
    def from_original(
        cls,
        state_dict: Mapping[str, Tensor],
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
        min_size: int = 800,
    ) -> "ReleasedMaskTransfiner":
        """Build the model from tensors with their original names.

        Args:
            state_dict: All tensors of a checkpoint; they tell the depth and the kind of convolution. Not modified, not
                shared.
            score_threshold: Detections have a score above it.
            detections_per_image: Most detections of an image.
            min_size: Pixels that the image's shorter side is resized to.

        Raises:
            WeightsError: If a tensor is missing, unknown or of another shape.
        """
        config = replace(
            ReleasedConfig.from_keys(state_dict),
            score_threshold=score_threshold,
            detections_per_image=detections_per_image,
            min_size=min_size,
        )
        return cls._from_weights(config, translate_checkpoint(config, state_dict)[0])

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "released/r101-dcn-3x",
        *,
        score_threshold: float | None = None,
        detections_per_image: int | None = None,
        min_size: int | None = None,
        device: torch.device | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> "ReleasedMaskTransfiner":
        """Load a released model.

        Args:
            name_or_path: ``"released/r50-3x"``, ``"released/r50-dcn-3x"`` or ``"released/r101-dcn-3x"``, downloaded and
                converted at first use and offline afterwards; a directory that ``transfiner-refine convert`` wrote; or
                a Hub id ``"org/name"`` of such a directory.
            score_threshold: Detections have a score above it; None takes the config's, here and below.
            detections_per_image: Most detections of an image.
            min_size: Pixels that the image's shorter side is resized to.
            device: Where to put the weights; None is the CPU.
            cache_dir: Where models by name are kept; None for the assets in huggingface_hub's cache.
            local_files_only: Whether to use what is there alone.
            token: Hub token.

        Raises:
            WeightsError: If the model is not there and cannot be had, or is damaged.
        """
        directory = find_released(name_or_path, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        config, weights = load_directory(directory)
        settings = {
            "score_threshold": score_threshold,
            "detections_per_image": detections_per_image,
            "min_size": min_size,
        }
        config = replace(config, **{name: value for name, value in settings.items() if value is not None})
        return cls._from_weights(config, weights).to(device)

    @classmethod
    def _from_weights(cls, config: ReleasedConfig, weights: Mapping[str, Tensor]) -> "ReleasedMaskTransfiner":
        """Build the model around tensors with our names, which it takes over."""
        # Built without storage: every tensor is given, so none is initialised for nothing.
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.box_head.fc1.weight.device

    @torch.no_grad()
    def forward(
        self,
        image: Any,
        max_instances: int | None = None,
        *,
        smooth: bool = False,
        token_budget: int = TOKEN_BUDGET,
    ) -> Instances:
        """Detect the instances of an image and refine their masks.

        Args:
            image: A path, a PIL image, ``(H, W, 3)`` uint8 RGB numpy, or a ``(3, H, W)`` RGB tensor, uint8 or float in
                [0, 1], which is rounded to 8 bits.
            max_instances: Instances that are refined, those of the highest scores; the others keep their coarse masks.
                None refines all; the released code stopped at 10.
            smooth: Whether to dilate the finest nodes and blur the refined masks, as the authors' demo does.
            token_budget: Tokens held at once, which bounds the memory of the refinement.

        Returns:
            The instances, highest score first, on the model's device: ``boxes``, ``masks`` (bool), ``scores``,
            ``labels`` 0 to 79 (``COCO_CATEGORY_IDS`` has COCO's own), ``probs`` ``(N, 112, 112)`` and ``rois``, which
            are the boxes.

        Raises:
            InvalidInputError: If it is not an image, or an option is out of range.
        """
        pixels = as_image(image)
        resized = network_input(pixels, self.config.min_size).to(self.device)
        size = (resized.shape[1], resized.shape[2])
        features = self.backbone(normalise(resized))
        proposals, _ = self.rpn_head.propose(features, size)
        hidden = self.box_head(features[:4], proposals)
        boxes, scores, labels = self.box_predictor.detect(
            hidden, proposals, size, self.config.score_threshold, self.config.detections_per_image
        )
        masks = self.mask_branch(
            features[:4], [boxes], [labels], max_instances, smooth=smooth, token_budget=token_budget
        )
        return in_image_frame(boxes, masks.probs, scores, labels, size, (pixels.shape[1], pixels.shape[2]))


def network_input(image: Tensor, min_size: int) -> Tensor:
    """Resize an image as Detectron2 does: the shorter side to ``min_size``, the longer to 1333 at most.

    Args:
        image: ``(3, H, W)`` RGB, uint8 or float in [0, 1].
        min_size: Pixels of the shorter side.

    Returns:
        ``(3, H', W')`` uint8 BGR on the CPU.
    """
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    height, width = image.shape[1:]
    scale = min(min_size / min(height, width), MAX_SIZE / max(height, width))
    size = (max(1, math.floor(width * scale + 0.5)), max(1, math.floor(height * scale + 0.5)))
    # Pillow averages over all pixels that a smaller one covers, in fixed point: another resize differs visibly.
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy(force=True))
    resized = np.asarray(pixels.resize(size, Image.Resampling.BILINEAR))
    return torch.from_numpy(resized[:, :, ::-1].copy()).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """Subtract the pixel means and pad right and below with zeros.

    Args:
        pixels: ``(3, H, W)`` uint8 BGR.

    Returns:
        ``(1, 3, H', W')`` float32, H' and W' multiples of 32.
    """
    centred = pixels.float() - torch.tensor(PIXEL_MEANS, device=pixels.device)[:, None, None]
    return F.pad(centred, (0, -pixels.shape[2] % PADDING, 0, -pixels.shape[1] % PADDING))[None]


def in_image_frame(
    boxes: Tensor,
    probs: Tensor,
    scores: Tensor,
    labels: Tensor,
    network_size: tuple[int, int],
    image_size: tuple[int, int],
) -> Instances:
    """Carry instances from the network's input to the image, and paste their masks.

    Args:
        boxes: ``(N, 4)`` float32 xyxy, network frame.
        probs: ``(N, 112, 112)`` float, box frame.
        scores: ``(N,)`` float32.
        labels: ``(N,)`` int64.
        network_size: Height and width of the network's input without padding.
        image_size: Height and width of the image.

    Returns:
        The instances whose boxes have area in the image.
    """
    (height, width), (network_height, network_width) = image_size, network_size
    limit = boxes.new_tensor([width, height, width, height])
    scale = boxes.new_tensor([width / network_width, height / network_height]).repeat(2)
    boxes = (boxes * scale).clamp(min=0).minimum(limit)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, probs, scores, labels = boxes[keep], probs[keep], scores[keep], labels[keep]
    masks = paste_crops(boxes, probs, image_size)
    return Instances(boxes, masks, image_size, scores=scores, labels=labels, probs=probs, rois=boxes)


def paste_crops(boxes: Tensor, probs: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Paste masks as Detectron2 does: interpolated as if zeros lay around, so that they fade out across the box edge.

    Args:
        boxes: ``(N, 4)`` float32 xyxy, image pixels.
        probs: ``(N, S, S)`` float, box frame.
        image_size: ``(H, W)``.

    Returns:
        ``(N, H, W)`` bool.
    """
    masks = torch.zeros((boxes.shape[0], *image_size), dtype=torch.bool, device=boxes.device)
    paste(F.pad(probs, (1, 1, 1, 1)), expand_boxes(boxes, 1 / probs.shape[-1]), masks)
    return masks
