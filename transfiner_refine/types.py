"""The typed values that cross the package's borders, validated where they are made.

Letters: B images, N instances of an image, R RoIs, C channels, H W image pixels, S RoI side, K nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfiner_refine.arrays import check_image_size, mask_values, to_tensor
from transfiner_refine.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class FeaturePyramid:
    """Feature maps of a batch of images, and how the image lies in them.

    A point of the image is found in the network's input at ``network_xy = (image_xy - origin) * scale``, and in the
    map of stride ``s`` at ``network_xy / s``, all in continuous pixels.

    Attributes:
        maps: ``(B, C, H_l, W_l)`` float each, finest first; ``H_l`` is the network input's height over the stride. A
            dict of them, as torchvision's FPN returns, becomes a tuple.
        strides: Network pixels per cell of each map: powers of two, each twice the one before.
        scale: ``(B, 2)`` float, network pixels per image pixel in x and y; None means 1.
        origin: ``(B, 2)`` float, position in the image of the network input's upper left corner; None means 0.
        source: What made the features: ``"image_encoder"`` or the name of an adapter.

    Raises:
        InvalidInputError: If the maps, strides, scale and origin do not fit each other.
    """

    maps: tuple[Tensor, ...]
    strides: tuple[int, ...]
    scale: Tensor | None = None
    origin: Tensor | None = None
    source: str = "detector"

    def __post_init__(self) -> None:
        maps = tuple(self.maps.values() if isinstance(self.maps, Mapping) else self.maps)
        if wrong := [type(level).__name__ for level in maps if not isinstance(level, Tensor)]:
            raise InvalidInputError(
                f"expected maps as tensors, finest first, got {wrong[0]}: convert arrays with torch.from_numpy"
            )
        object.__setattr__(self, "maps", maps)
        object.__setattr__(self, "strides", tuple(operator.index(stride) for stride in self.strides))
        self._check_strides()
        self._check_maps()
        self._check_per_image("scale", self.scale)
        self._check_per_image("origin", self.origin)
        if self.scale is not None and not bool((self.scale > 0).all()):
            raise InvalidInputError(
                f"expected a scale above 0, got {self.scale.tolist()}: scale is network pixels per image pixel"
            )

    @property
    def batch_size(self) -> int:
        """Images in the batch, B."""
        return self.maps[0].shape[0]

    @property
    def channels(self) -> int:
        """Channels of every map, C."""
        return self.maps[0].shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FeaturePyramid:
        """Move everything to a device, and the maps (positions keep their precision) to a dtype."""
        return replace(
            self,
            maps=tuple(level.to(device=device, dtype=dtype) for level in self.maps),
            scale=None if self.scale is None else self.scale.to(device=device),
            origin=None if self.origin is None else self.origin.to(device=device),
        )

    def to_network(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Carry boxes from the image to the network's input.

        Args:
            boxes: ``(R, 4)`` float xyxy, image pixels.
            image_index: ``(R,)`` long, the image of each box.

        Returns:
            ``(R, 4)`` float xyxy, network pixels.
        """
        corners = boxes.reshape(-1, 2, 2)
        if self.origin is not None:
            corners = corners - self.origin[image_index].unsqueeze(1)
        if self.scale is not None:
            corners = corners * self.scale[image_index].unsqueeze(1)
        return corners.reshape(-1, 4)

    def _check_strides(self) -> None:
        strides = self.strides
        if not strides or len(strides) != len(self.maps):
            raise InvalidInputError(
                f"expected at least one map and one stride per map, got {len(self.maps)} maps and strides {strides}"
            )
        doubling = all(fine * 2 == coarse for fine, coarse in pairwise(strides))
        if strides[0] < 1 or strides[0] & (strides[0] - 1) or not doubling:
            raise InvalidInputError(
                f"expected strides that are powers of two and double from map to map, got {strides}: "
                "give the maps finest first and leave out those between which a level is missing"
            )

    def _check_maps(self) -> None:
        shapes = [tuple(level.shape) for level in self.maps]
        first = self.maps[0]
        if any(level.ndim != 4 or not level.is_floating_point() for level in self.maps):
            kinds = [f"{shape} {level.dtype}" for shape, level in zip(shapes, self.maps, strict=True)]
            raise InvalidInputError(f"expected float maps of shape (B, C, H, W), got {', '.join(kinds)}")
        if any(shape[:2] != shapes[0][:2] for shape in shapes):
            raise InvalidInputError(f"expected maps of one batch size and one number of channels, got shapes {shapes}")
        if any(level.device != first.device or level.dtype != first.dtype for level in self.maps):
            kinds = [f"{level.dtype} on {level.device}" for level in self.maps]
            raise InvalidInputError(f"expected maps of one dtype on one device, got {', '.join(kinds)}: use .to(...)")
        for fine, coarse in pairwise(shapes):
            # Hosts pad and round differently, so that a map may be one cell off the exact half.
            if 0 in coarse[2:] or any(abs(2 * c - f) > 2 for f, c in zip(fine[2:], coarse[2:], strict=True)):
                raise InvalidInputError(
                    f"expected maps finest first, each half the size of the one before for strides {self.strides}, "
                    f"got shapes {shapes}"
                )

    def _check_per_image(self, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        device = self.maps[0].device
        if value.shape != (self.batch_size, 2) or not value.is_floating_point() or value.device != device:
            raise InvalidInputError(
                f"expected {name} of shape ({self.batch_size}, 2), x and y per image, float, on {device} as the maps, "
                f"got {tuple(value.shape)} {value.dtype} on {value.device}"
            )
        if not bool(torch.isfinite(value).all()):
            raise InvalidInputError(f"expected a finite {name}, got {value.tolist()}")


@dataclass(frozen=True, eq=False)
class LevelNodes:
    """The nodes of one quadtree level, of a batch of RoIs.

    Attributes:
        roi: ``(K,)`` long, the RoI of each node.
        row: ``(K,)`` long, its row in the level's grid.
        col: ``(K,)`` long, its column in the level's grid.
        parent: ``(K,)`` long, its parent's index among the nodes of the coarser level; -1 at level 0.
        logits: ``(K,)`` float, the incoherence detector's output.
        side: Cells on a side of the level's grid: 28, 56, ...

    Raises:
        InvalidInputError: If the columns differ in length.
    """

    roi: Tensor
    row: Tensor
    col: Tensor
    parent: Tensor
    logits: Tensor
    side: int

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("roi", "row", "col", "parent", "logits")}
        if self.roi.ndim != 1 or any(shape != shapes["roi"] for shape in shapes.values()):
            raise InvalidInputError(f"expected node columns of one shape (K,), got {shapes}")

    def __len__(self) -> int:
        return len(self.roi)

    def to(self, device: torch.device | str) -> LevelNodes:
        """Move every tensor to a device."""
        return _moved(self, device)


@dataclass(frozen=True, eq=False)
class RefineDetails:
    """What happened inside a refinement, for pictures and analysis.

    Attributes:
        incoherence: ``(N, 28, 28)`` float, the incoherence detector's probabilities at level 0, RoI frame.
        quadtree: Nodes of each level, coarsest first; ``roi`` counts instances.
        coarse_probs: ``(N, S, S)`` float, the coarse mask in the RoI frame.
        node_probs: ``(K,)`` float for each level, the nodes' refined probabilities.

    Raises:
        InvalidInputError: If the parts differ in length.
    """

    incoherence: Tensor
    quadtree: tuple[LevelNodes, ...]
    coarse_probs: Tensor
    node_probs: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len(self.incoherence) != len(self.coarse_probs):
            raise InvalidInputError(
                f"expected one incoherence map per coarse mask, got {len(self.incoherence)} maps "
                f"and {len(self.coarse_probs)} masks"
            )
        nodes, probs = [len(level) for level in self.quadtree], [len(level) for level in self.node_probs]
        if nodes != probs:
            raise InvalidInputError(f"expected one probability per node, got {nodes} nodes and {probs} probabilities")

    def __len__(self) -> int:
        return len(self.incoherence)

    def to(self, device: torch.device | str) -> RefineDetails:
        """Move every tensor to a device."""
        quadtree = tuple(level.to(device) for level in self.quadtree)
        node_probs = tuple(level.to(device) for level in self.node_probs)
        return RefineDetails(self.incoherence.to(device), quadtree, self.coarse_probs.to(device), node_probs)

    def select(self, index: Tensor) -> RefineDetails:
        """Keep some instances, in the given order, with their nodes; parent links are renumbered.

        Args:
            index: ``(M,)`` long, instances to keep; one may appear more than once.
        """
        quadtree: list[LevelNodes] = []
        node_probs: list[Tensor] = []
        rank_in_roi = first_kept = index  # of the coarser level; level 0 has none, and reads neither
        for level, probs in zip(self.quadtree, self.node_probs, strict=True):
            counts = torch.bincount(level.roi, minlength=len(self))
            starts = counts.cumsum(0) - counts
            grouped = torch.argsort(level.roi, stable=True)
            kept_counts = counts[index]
            kept_starts = kept_counts.cumsum(0) - kept_counts
            roi = torch.repeat_interleave(kept_counts)
            nodes = grouped[torch.arange(len(roi), device=roi.device) - kept_starts[roi] + starts[index][roi]]
            parent = level.parent[nodes]
            if quadtree:
                # A parent keeps its rank among its RoI's nodes; only where the RoI's nodes begin has changed.
                parent = first_kept[roi] + rank_in_roi[parent]
            row, col, logits = level.row[nodes], level.col[nodes], level.logits[nodes]
            quadtree.append(LevelNodes(roi, row, col, parent, logits, level.side))
            node_probs.append(probs[nodes])
            rank_in_roi = torch.empty_like(grouped)
            rank_in_roi[grouped] = torch.arange(len(grouped), device=grouped.device) - starts[level.roi[grouped]]
            first_kept = kept_starts
        return RefineDetails(self.incoherence[index], tuple(quadtree), self.coarse_probs[index], tuple(node_probs))


@dataclass(frozen=True, eq=False)
class Instances:
    """The instances of one image: boxes and masks, coarse on the way in and refined on the way out.

    Every array may be given as a tensor or as numpy; all are held as tensors, on one device. Iterating and indexing
    give ``Instances`` again: an integer gives one of length 1; a slice, a mask or a list of indices gives a selection.

    Attributes:
        boxes: ``(N, 4)`` float32 xyxy, image pixels.
        masks: ``(N, H, W)``, image frame: bool, or float32 probabilities in [0, 1]. Integers 0 and 1, or 0 and 255,
            become bool.
        image_size: ``(H, W)``.
        scores: ``(N,)`` float32.
        labels: ``(N,)`` int64.
        probs: ``(N, S, S)`` float, refined probabilities in the RoI frame.
        rois: ``(N, 4)`` float32 xyxy, image pixels: where ``probs`` lies, that is the box with its margin.
        kept_coarse: ``(N,)`` bool, true where the coarse mask was kept because the refined one strayed too far or
            promised too little.
        predicted_gain: ``(N,)`` float32, Boundary IoU that the refinement is expected to win, if the model predicts it;
            0 where there was nothing to refine.
        details: Incoherence maps and quadtrees, if they were asked for.

    Raises:
        InvalidInputError: If lengths, shapes, dtypes or devices do not fit each other.
    """

    boxes: Tensor
    masks: Tensor
    image_size: tuple[int, int]
    scores: Tensor | None = None
    labels: Tensor | None = None
    probs: Tensor | None = None
    rois: Tensor | None = None
    kept_coarse: Tensor | None = None
    details: RefineDetails | None = None
    predicted_gain: Tensor | None = None

    def __post_init__(self) -> None:
        size = check_image_size(self.image_size)
        masks = mask_values(to_tensor(self.masks, "masks"))
        if masks.shape == (0,):
            masks = masks.new_empty((0, *size), dtype=torch.bool)  # an empty list
        if masks.ndim != 3 or tuple(masks.shape[1:]) != size:
            raise InvalidInputError(
                f"expected masks of shape (N, {size[0]}, {size[1]}) for image_size {size}, got {tuple(masks.shape)}: "
                "masks are in the image frame, and image_size is (height, width)"
            )
        object.__setattr__(self, "image_size", size)
        object.__setattr__(self, "masks", masks)
        self._hold("boxes", torch.float32, (4,))
        self._hold("scores", torch.float32)
        self._hold("labels", torch.int64)
        self._hold("rois", torch.float32, (4,))
        self._hold("kept_coarse", torch.bool)
        self._hold("predicted_gain", torch.float32)
        self._hold("probs", None, None)
        if self.details is not None and len(self.details) != len(masks):
            raise InvalidInputError(f"expected details of {len(masks)} instances, got {len(self.details)}")

    def _hold(self, name: str, dtype: torch.dtype | None, shape: tuple[int, ...] | None = ()) -> None:
        """Set a field to a tensor of N rows of a shape and a dtype; None is any (S, S), or any dtype."""
        if getattr(self, name) is None and name != "boxes":
            return
        value = to_tensor(getattr(self, name), name)
        if shape is not None and value.shape == (0,):
            value = value.new_empty((0, *shape))  # an empty list
        columns = tuple(value.shape[1:])
        if len(value) != len(self.masks) or (len(columns) != 2 if shape is None else columns != shape):
            expected = f"({len(self.masks)}, S, S)" if shape is None else str((len(self.masks), *shape))
            raise InvalidInputError(f"expected {name} of shape {expected}, one for each mask, got {tuple(value.shape)}")
        if dtype == torch.int64 and (value.is_floating_point() or value.dtype == torch.bool) and len(value):
            raise InvalidInputError(f"expected integer {name}, got {value.dtype}: map class names to numbers first")
        if value.device != self.masks.device:
            raise InvalidInputError(f"expected {name} on {self.masks.device} as the masks, got {value.device}")
        object.__setattr__(self, name, value if dtype is None else value.to(dtype))

    def __len__(self) -> int:
        return len(self.masks)

    def __iter__(self) -> Iterator[Instances]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        optional = ("scores", "labels", "probs", "rois", "kept_coarse", "predicted_gain", "details")
        given = ", ".join(name for name in optional if getattr(self, name) is not None)
        return (
            f"Instances({len(self)} of image_size={self.image_size}, masks {self.masks.dtype} on {self.masks.device}"
            f"{', with ' * bool(given)}{given})"
        )

    def __getitem__(self, item: Any) -> Instances:
        index = self._as_index(item)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        selected = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **selected, details=None if self.details is None else self.details.select(index))

    def _as_index(self, item: Any) -> Tensor:
        """Turn anything that selects instances into ``(M,)`` long."""
        everything = torch.arange(len(self), device=self.masks.device)
        if isinstance(item, slice):
            return everything[list(range(len(self))[item])]  # a tensor takes no negative step
        if np.ndim(item) == 0:
            return everything[[operator.index(item)]]
        chosen = to_tensor(item, "index").to(everything.device)
        if chosen.dtype == torch.bool and len(chosen) != len(self):
            raise InvalidInputError(f"expected {len(self)} booleans as index, got {len(chosen)}")
        return everything[chosen if len(chosen) else chosen.long()]  # an empty list has no integer dtype

    def to(self, device: torch.device | str) -> Instances:
        """Move every tensor to a device."""
        return _moved(self, device)

    def to_rle(self) -> list[dict[str, Any]]:
        """Encode the masks as compressed COCO run lengths.

        Returns:
            N dicts with ``size`` ``[H, W]`` and ``counts`` as str, ready for JSON.

        Raises:
            InvalidInputError: If the masks are probabilities.
        """
        # Not at the top: modules of `functional` take the types of this one.
        from transfiner_refine.functional import rle

        if self.masks.dtype != torch.bool:
            raise InvalidInputError(
                f"expected bool masks to encode, got {self.masks.dtype} probabilities: threshold them, masks >= 0.5"
            )
        return rle.encode(self.masks.numpy(force=True))

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Write the instances as COCO results.

        Args:
            image_id: The image's id in the data set.

        Returns:
            N dicts of plain Python values: ``image_id``, ``category_id`` (the label; 1 without labels), ``bbox`` (xywh,
            image pixels), ``score`` (1.0 without scores) and ``segmentation`` (compressed run lengths).

        Raises:
            InvalidInputError: If the masks are probabilities.
        """
        image_id = image_id if isinstance(image_id, str) else operator.index(image_id)
        corners, sides = self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]
        boxes = torch.cat([corners, sides], dim=1).tolist()
        labels = [1] * len(self) if self.labels is None else self.labels.tolist()
        scores = [1.0] * len(self) if self.scores is None else self.scores.tolist()
        return [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score, "segmentation": segmentation}
            for label, box, score, segmentation in zip(labels, boxes, scores, self.to_rle(), strict=True)
        ]


def _moved(value: Any, device: torch.device | str) -> Any:
    """Copy a dataclass with whatever can move on another device."""
    moved = {
        field.name: part.to(device)
        for field in fields(value)
        if isinstance(part := getattr(value, field.name), (Tensor, RefineDetails))
    }
    return replace(value, **moved)
