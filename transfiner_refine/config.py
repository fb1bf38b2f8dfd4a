"""The two configurations: ``TransfinerConfig`` shapes a model, ``RefineOptions`` shapes one call."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from transfiner_refine.errors import InvalidInputError

ROOT_SIDE = 28
"""Side of quadtree level 0, the resolution of the usual mask head."""

REFERENCE_SIDE = 14
"""Side of the grid of coarse reference tokens that head every node sequence."""

MAX_DEPTH = 4
"""Deepest quadtree: levels 28, 56, 112 and 224 (paper, Table 5)."""

MAX_PASSES = 4
"""Most refinements in a row."""

MAX_BOX_MARGIN = 1.0
"""Widest margin of a call: the RoI is three times as wide as its box."""

CUES = ("fine", "coarse", "context", "position", "guidance")

SWITCHES = (
    "level_embedding",
    "lower_level_guidance",
    "joint_levels",
    "tree_keys",
    "propagate",
    "segments",
    "predicts_gain",
)
"""Fields of :class:`TransfinerConfig` that are true or false."""


@dataclass(frozen=True)
class TransfinerConfig:
    """Architecture of one refiner; the defaults are the paper's model on a detector's FPN.

    Attributes:
        feature_source: What made the features: ``"image_encoder"`` or the name of an adapter.
        backbone: Backbone of the image encoder: ``"efficientnet_lite0"``, ``"efficientnet_lite2"``, or ``"tiny_vit"``,
            which knows objects of more kinds; without effect on a detector's features.
        feature_channels: Channels of every map of the feature pyramid.
        strides: Strides of the pyramid's maps in pixels, finest first, each twice the one before.
        canonical_level: Level of a RoI of 224 pixels (paper, RoI pyramid); a map of stride ``s`` is level ``log2(s)``.
        box_margin: Share of the box side added on each of its four sides before the RoI is cut.
        depth: Quadtree levels refined: 0 leaves the coarse mask, 3 ends at 112, 4 at 224.
        channels: Width of tokens and of the incoherence detector.
        layers: Layers of the sequence encoder.
        heads: Attention heads of each layer.
        ffn_channels: Hidden width of each layer's feed-forward network.
        node_cues: Cues that make a node's token. The paper's four are ``fine``, ``coarse``, ``context`` and
            ``position``; ``guidance`` adds the incoherence detector's own features of the node's root cell.
        level_embedding: Whether a learned vector per quadtree level is added to each token.
        decoder: ``"label"`` predicts the refined label (paper); ``"residual"`` predicts a correction to the coarse
            logit and starts at zero, so that an untrained model is the identity.
        context_scales: Scales at which the incoherence detector sees the whole RoI besides its 3×3 convolutions, each
            with half the side of the one before; 0 is the paper's detector.
        lower_level_guidance: Whether finer incoherence detectors see the coarser prediction (paper, Table 3).
        joint_levels: One sequence of all levels (paper) or one sequence per level (paper, Table 8).
        tree_keys: Whether attention sees one key for each tree of the quadtree, the mean of a root cell's node and all
            nodes below it, and for each 2×2 reference tokens, in place of a key of each token's own (paper). Its cost
            then grows with the number of nodes, no longer with their square.
        propagate: Whether refined values are handed down to the quadrants (paper, Table 8).
        pixel_widths: Channels of each scale of the pixel head, finest first, which moves outlines onto the edges of the
            photo after the last level; empty for none (paper). It needs the photo, so it goes with an image encoder.
        segments: Whether a segmenter proposes a mask of what is in each box before the first pass (not in the paper).
            It needs the photo, so it goes with an image encoder.
        passes: Passes of a call that names none (:attr:`RefineOptions.passes`), as many as the weights are good for; 1
            is the paper's.
        feature_fingerprint: SHA-256 of the detector's weights with which the refiner was saved by an adapter; None for
            an image encoder, or where it is not known.
        predicts_gain: Whether the model predicts what each refinement wins, so that a call can refuse the bad ones; set
            by calibration on photos that training did not see.
        format_version: Version of this layout, raised when old files can no longer be read.
    """

    feature_source: str = "detector"
    backbone: str = "efficientnet_lite0"
    feature_channels: int = 256
    strides: tuple[int, ...] = (4, 8, 16, 32)
    canonical_level: int = 4
    box_margin: float = 0.0
    depth: int = 3
    channels: int = 256
    layers: int = 3
    heads: int = 4
    ffn_channels: int = 1024
    node_cues: tuple[str, ...] = ("fine", "coarse", "context", "position")
    level_embedding: bool = False
    decoder: Literal["label", "residual"] = "label"
    context_scales: int = 0
    lower_level_guidance: bool = True
    joint_levels: bool = True
    tree_keys: bool = False
    propagate: bool = True
    predicts_gain: bool = False
    pixel_widths: tuple[int, ...] = ()
    segments: bool = False
    passes: int = 1
    feature_fingerprint: str | None = None
    format_version: int = 1

    def __post_init__(self) -> None:
        # JSON has no tuples: what comes back from config.json are lists.
        object.__setattr__(self, "strides", tuple(self.strides))
        object.__setattr__(self, "node_cues", tuple(self.node_cues))
        object.__setattr__(self, "pixel_widths", tuple(self.pixel_widths))
        if self.format_version != 1:
            raise InvalidInputError(
                f"expected format_version 1, got {self.format_version}: install the release that wrote this config"
            )
        for name in ("feature_channels", "channels", "layers", "heads", "ffn_channels"):
            value = getattr(self, name)
            if not _is_whole(value, 1):
                raise InvalidInputError(f"expected {name} as an integer of at least 1, got {value!r}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"expected {name} as true or false, got {getattr(self, name)!r}")
        for name in ("feature_source", "backbone"):
            if not isinstance(getattr(self, name), str):
                raise InvalidInputError(f"expected {name} as a name, got {getattr(self, name)!r}")
        if not isinstance(self.feature_fingerprint, str | None):
            raise InvalidInputError(f"expected feature_fingerprint as text or null, got {self.feature_fingerprint!r}")
        if not _is_whole(self.canonical_level, 0):
            raise InvalidInputError(f"expected canonical_level of at least 0, got {self.canonical_level!r}")
        if not _is_whole(self.depth, 0, MAX_DEPTH):
            raise InvalidInputError(f"expected depth 0 to {MAX_DEPTH}, got {self.depth!r}")
        if len(self.pixel_widths) > 5 or not all(_is_whole(width, 1) for width in self.pixel_widths):
            raise InvalidInputError(f"expected at most five pixel_widths, integers above 0, got {self.pixel_widths}")
        if not _is_whole(self.context_scales, 0, 2):
            raise InvalidInputError(f"expected context_scales 0 to 2, got {self.context_scales!r}")
        if not all(_is_whole(stride, 1) for stride in self.strides):
            raise InvalidInputError(f"expected strides as integers above 0, got {self.strides}")
        if not self.strides or any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise InvalidInputError(f"expected strides that double from map to map, got {self.strides}")
        if self.strides[0] & (self.strides[0] - 1):
            raise InvalidInputError(f"expected strides that are powers of two, got {self.strides}")
        if unknown := set(self.node_cues) - set(CUES):
            raise InvalidInputError(f"expected node_cues among {CUES}, got {sorted(unknown)}")
        if not set(self.node_cues) & {"fine", "coarse", "context", "guidance"}:
            raise InvalidInputError("expected at least one node cue besides position, got none")
        if self.decoder not in ("label", "residual"):
            raise InvalidInputError(f'expected decoder "label" or "residual", got {self.decoder!r}')
        if self.channels % self.heads or self.channels % 4:
            raise InvalidInputError(
                f"expected channels divisible by heads and by 4, got {self.channels} channels and {self.heads} heads"
            )
        _check_passes(self.passes)
        if not _is_number(self.box_margin, 0):
            raise InvalidInputError(f"expected box_margin of at least 0, got {self.box_margin!r}")


@dataclass(frozen=True)
class RefineOptions:
    """Choices of one ``refine`` call; each default says how to switch it off.

    Attributes:
        depth: Quadtree levels to refine, at most the model's; None takes the model's own depth, and ``"auto"`` as many
            for each instance as the long side of its box needs, at most the model's: 1 up to 28 pixels, 2 up to 56, 3
            up to 112.
        passes: Refinements in a row, each of the mask that the one before made, in a box grown to hold it: what the
            first uncovers, the next can follow further. None takes the model's own; 1 is the paper's.
        again_if_iou_below: A mask has a further pass only if its IoU with what it was before the last one is below
            this: those that a pass changed a lot are the ones that another one helps; 1 spares only those that have not
            changed at all.
        segment: Whether the segmenter proposes a mask of what is in each box, for the refinement to start from: it
            finds what the detector missed or took in far from any outline, and takes longer than the refinement of few
            instances. A proposal that is far from the coarse mask is left alone, and where the refinement of one is
            refused, that of the coarse mask is tried. Without effect on a model without a segmenter, and where there
            is no image.
        incoherence_threshold: Probability above which a cell is an incoherent node; 1.0 and above refines nothing.
        mask_threshold: Probability from which a pixel belongs to the mask.
        token_budget: Tokens held at once, which bounds memory: instances are refined in groups that fit. With the
            embedded model, a call holds less than 64 MB and 36 kB per token (``pipeline.working_memory``) beyond its
            inputs, its outputs and the copies in float32 that a photo needs; with ``segment``, up to 400 MB at first,
            whatever the budget. One instance is never split, so its own
            tokens may exceed a very small budget; ``max_nodes`` bounds those. A CPU takes six instances at once at
            most, as more would be slower.
        max_nodes: Nodes kept per instance and level, the most incoherent first; None keeps all.
        keep_if_iou_below: A refined mask whose IoU with its coarse mask is below this is replaced by the coarse mask
            and flagged in ``kept_coarse``; 0 accepts every refinement.
        keep_if_gain_below: A refined mask whose predicted gain of Boundary IoU is below this is replaced by the coarse
            mask and flagged in ``kept_coarse``; -1 accepts every refinement. Without effect on a model that does not
            predict gains.
        align_pixels: Whether the pixel head moves the refined outline onto the edges of the photo; False leaves what
            the quadtree gave. Without effect on a model without one, and where there is no image.
        box_margin: Share of the box side added on each of its four sides before the RoI is cut; None takes the model's
            own, which is what it was trained with. A wider one leaves room for what a tight box cuts off, at coarser
            cells.
        encode: How the image encoder, and the segmenter with its own, see the image: ``"crops"`` encodes each instance
            at a fixed scale, ``"image"`` the whole image once, ``"auto"`` whichever needs fewer pixels.
        return_quadtree: Whether the result carries incoherence maps and quadtrees, for pictures and analysis.
    """

    depth: int | Literal["auto"] | None = None
    passes: int | None = None
    again_if_iou_below: float = 0.85
    segment: bool = True
    incoherence_threshold: float = 0.5
    mask_threshold: float = 0.5
    token_budget: int = 16384
    max_nodes: int | None = None
    keep_if_iou_below: float = 0.5
    keep_if_gain_below: float = 0.005
    align_pixels: bool = True
    box_margin: float | None = None
    encode: Literal["auto", "image", "crops"] = "auto"
    return_quadtree: bool = False

    @property
    def proposes(self) -> bool:
        """Whether a segmenter is asked: not where nothing is to be refined, and masks come back as they were given."""
        return self.segment and self.incoherence_threshold < 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):
                object.__setattr__(self, field.name, value.item())
        if self.depth not in (None, "auto") and not _is_whole(self.depth, 0, MAX_DEPTH):
            raise InvalidInputError(f'expected depth 0 to {MAX_DEPTH}, "auto" or None, got {self.depth!r}')
        if self.passes is not None:
            _check_passes(self.passes)
        if not _is_whole(self.token_budget, 1):
            raise InvalidInputError(f"expected token_budget of at least 1, got {self.token_budget!r}")
        if self.max_nodes is not None and not _is_whole(self.max_nodes, 1):
            raise InvalidInputError(f"expected max_nodes of at least 1 or None, got {self.max_nodes!r}")
        if self.box_margin is not None and not _is_number(self.box_margin, 0, MAX_BOX_MARGIN):
            raise InvalidInputError(
                f"expected box_margin from 0 to {MAX_BOX_MARGIN:g} or None, got {self.box_margin!r}"
            )
        if not _is_number(self.incoherence_threshold, 0):
            raise InvalidInputError(f"expected incoherence_threshold of at least 0, got {self.incoherence_threshold!r}")
        if not _is_number(self.mask_threshold, 0, 1) or self.mask_threshold in (0, 1):
            raise InvalidInputError(f"expected mask_threshold between 0 and 1, got {self.mask_threshold!r}")
        for name, low in (("keep_if_iou_below", 0), ("keep_if_gain_below", -1), ("again_if_iou_below", 0)):
            if not _is_number(getattr(self, name), low, 1):
                raise InvalidInputError(f"expected {name} from {low} to 1, got {getattr(self, name)!r}")
        for name in ("segment", "align_pixels", "return_quadtree"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"expected {name} as True or False, got {getattr(self, name)!r}")
        if self.encode not in ("auto", "image", "crops"):
            raise InvalidInputError(f'expected encode "auto", "image" or "crops", got {self.encode!r}')


def _check_passes(passes: Any) -> None:
    if not _is_whole(passes, 1, MAX_PASSES):
        raise InvalidInputError(f"expected passes from 1 to {MAX_PASSES}, got {passes!r}")


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    """Whether a value is an integer within bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float = math.inf) -> bool:
    """Whether a value is a number within bounds; NaN is within none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
