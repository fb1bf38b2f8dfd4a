"""Small models and scenes that the tests of the networks and of the façade share."""

import numpy as np
import torch
from torch import Tensor

from transfiner_refine.config import ROOT_SIDE, TransfinerConfig
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.coarse import coarse_levels
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.transfiner import MaskTransfiner, SelectNodes, TransfinerOutput, above_threshold
from transfiner_refine.types import FeaturePyramid, LevelNodes

ALL_CUES = ("fine", "coarse", "context", "position", "guidance")
CIRCLES = [(90.0, 120.0, 70.0), (190.0, 60.0, 40.0), (30.0, 30.0, 15.0), (200.0, 200.0, 25.0), (120.0, 128.0, 110.0)]
HALF = above_threshold(0.5)


def small_config(**changes) -> TransfinerConfig:
    """A model of a few thousand weights on a detector's features, with every cue and the residual decoder."""
    values: dict = {
        "feature_channels": 8,
        "strides": (4, 8, 16, 32),
        "depth": 3,
        "channels": 16,
        "layers": 2,
        "heads": 2,
        "ffn_channels": 32,
        "box_margin": 0.125,
        "node_cues": ALL_CUES,
        "level_embedding": True,
        "decoder": "residual",
    }
    return TransfinerConfig(**(values | changes))


def encoder_config(**changes) -> TransfinerConfig:
    """The same with an image encoder of its own."""
    return small_config(**({"feature_source": "image_encoder", "strides": (2, 4, 8, 16, 32)} | changes))


def random_pyramid(
    height: int,
    width: int,
    *,
    batch: int = 1,
    channels: int = 8,
    strides: tuple[int, ...] = (4, 8, 16, 32),
    seed: int = 0,
) -> FeaturePyramid:
    """Random features of a network input of ``height`` × ``width`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, channels, -(-height // s), -(-width // s), generator=generator) for s in strides]
    return FeaturePyramid(tuple(maps), strides)


def discs(height: int, width: int, circles: list[tuple[float, float, float]]) -> Tensor:
    """``(N, H, W)`` bool: filled circles ``(x, y, radius)`` in continuous pixels."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([(x - cx) ** 2 + (y - cy) ** 2 <= r * r for cx, cy, r in circles])


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """``(H, W, 3)`` uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def roi_scene(
    model: MaskTransfiner,
    circles: list[tuple[float, float, float]],
    depth: int | None = None,
    pyramid: FeaturePyramid | None = None,
) -> tuple[RoIPyramid, Tensor]:
    """RoIs around circles in an image of 256 × 256 pixels, on random features, and their coarse masks ``(R, S, S)``."""
    config = model.config
    masks = discs(256, 256, circles)
    rois = expand_boxes(boxes_from_masks(masks), config.box_margin)
    if pyramid is None:
        pyramid = random_pyramid(256, 256, channels=config.feature_channels, strides=config.strides)
    levels = config.depth if depth is None else depth
    coarse = crop_masks(masks, rois, ROOT_SIDE << max(levels - 1, 0))
    return model.roi_pyramid(pyramid, rois, torch.zeros(len(circles), dtype=torch.long)), coarse


def make_eventful(model: MaskTransfiner, share: float = 0.2, seed: int = 0, pyramid: FeaturePyramid | None = None):
    """Make an untrained model do something: about ``share`` of the cells are incoherent, and labels change.

    An untrained detector finds next to nothing, and an untrained residual decoder corrects nothing.

    Args:
        model: Changed in place, and returned.
        share: Share of the candidates that become nodes, on such features.
        seed: Of the new weights.
        pyramid: Features of an image of 256 × 256 pixels; None makes random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    detector, last = model.incoherence_detector, model.pixel_decoder.layers[2]
    classifiers = (detector.classifier, *detector.finer_classifier)
    with torch.no_grad():
        last.weight.copy_(8 * torch.randn(last.weight.shape, generator=generator))  # type: ignore[union-attr]
        for classifier in classifiers:
            classifier.weight.copy_(torch.randn(classifier.weight.shape, generator=generator))  # type: ignore[arg-type]
        depth = model.config.depth
        roi_pyramid, coarse = roi_scene(model, [(90.0, 120.0, 70.0), (190.0, 60.0, 40.0)], pyramid=pyramid)
        candidates = detector(roi_pyramid, coarse_levels(coarse, depth), depth, select_all).candidates
        for classifier, cells in zip(classifiers, candidates, strict=False):
            classifier.bias.sub_(torch.quantile(cells.logits, 1 - share))  # type: ignore[union-attr]
    return model


def eventful_model(config: TransfinerConfig, share: float = 0.2, seed: int = 0) -> RefinerModel:
    """An untrained model that finds nodes and changes labels; see :func:`make_eventful`."""
    torch.manual_seed(seed)
    model = RefinerModel(config).eval()
    pyramid = None
    if model.image_encoder is not None:
        image = torch.from_numpy(random_image(256, 256)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            pyramid = model.image_encoder(image)
    make_eventful(model.transfiner, share, seed, pyramid)
    return model


def select_all(level: int, candidates: LevelNodes) -> Tensor:
    """Every candidate becomes a node."""
    return torch.ones_like(candidates.roi, dtype=torch.bool)


def only_first(counts: list[int]) -> SelectNodes:
    """As many nodes of each RoI, at each level, as ``counts`` says (the first ones), so that sequences differ."""

    def select(level: int, candidates: LevelNodes) -> Tensor:
        keep = torch.zeros_like(candidates.roi, dtype=torch.bool)
        for roi, count in enumerate(counts):
            keep[(candidates.roi == roi).nonzero()[:count, 0]] = True
        return keep

    return select


def small_transfiner(eventful: bool = True, **changes) -> MaskTransfiner:
    torch.manual_seed(0)
    model = MaskTransfiner(small_config(**changes)).eval()
    return make_eventful(model) if eventful else model


def refine(
    model: MaskTransfiner,
    circles: list[tuple[float, float, float]] = CIRCLES,
    select: SelectNodes = HALF,
    depth: int | None = None,
    token_budget: int = 1 << 30,
) -> TransfinerOutput:
    roi_pyramid, coarse = roi_scene(model, circles, depth)
    with torch.no_grad():
        return model(roi_pyramid, coarse, model.config.depth if depth is None else depth, select, token_budget)
