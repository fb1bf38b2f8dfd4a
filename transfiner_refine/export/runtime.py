"""Refines masks with the exported ONNX graphs: numpy and onnxruntime, no torch.

The export puts a copy of this file beside the graphs as ``onnx_refiner.py``, so that it must not need the package.

N instances of an image, H×W image pixels, S RoI side. Boxes are half-open xyxy in continuous pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    from transfiner_refine.errors import InvalidInputError, MissingDependencyError
except ImportError:  # a copy of this file on a machine without the package, or without torch
    InvalidInputError, MissingDependencyError = ValueError, ImportError  # type: ignore[misc, assignment]

ROUNDING = 1e-3
"""How far outside [0, 1] a probability may lie."""

ANY_CHANGE = -1.0
"""In the place of ``least_change``: every pixel counts as changed."""

NO_PROPOSAL = -1.0
"""In the place of what the segmenter says: the refinement behind its proposal was refused, this one is without."""

FORMAT_VERSION = 1
"""Version of ``config.json`` that this runtime reads."""


@dataclass(frozen=True, eq=False)
class RefinedMasks:
    """The refined masks of one image.

    Attributes:
        masks: ``(N, H, W)`` bool.
        probs: ``(N, S, S)`` float32 refined probabilities, RoI frame; zeros for an instance that cannot be refined.
        rois: ``(N, 4)`` float32 xyxy, image pixels.
        kept_coarse: ``(N,)`` bool, where the refinement strayed too far or promised too little and was refused.
        predicted_gain: ``(N,)`` float32, or None if the model does not predict it.
    """

    masks: np.ndarray
    probs: np.ndarray
    rois: np.ndarray
    kept_coarse: np.ndarray
    predicted_gain: np.ndarray | None


class OnnxRefiner:
    """A refiner on onnxruntime.

    It does what ``Refiner.refine`` does with ``RefineOptions(encode="crops")`` and the options of the export.

    Args:
        directory: Folder that the export has written.
        threads: Threads of onnxruntime; 0 takes all cores.
        providers: onnxruntime's execution providers, the preferred one first.

    Raises:
        MissingDependencyError: If onnxruntime is not installed.
        InvalidInputError: If the folder holds no export that this runtime can read.

    Example:
        >>> refined = OnnxRefiner("exported").refine(image, boxes=boxes, masks=masks)
    """

    def __init__(
        self, directory: str | Path, *, threads: int = 0, providers: tuple[str, ...] = ("CPUExecutionProvider",)
    ):
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("onnxruntime is not installed: pip install onnxruntime") from error
        folder = Path(directory)
        self.config = _read_config(folder)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads

        def session(name: str) -> Any:
            return onnxruntime.InferenceSession(str(folder / name), settings, providers=list(providers))

        self._encoder, self._refiner = session("image_encoder.onnx"), session("refiner.onnx")
        self._segmenter = session("segmenter.onnx") if self.config.get("segmenter") else None
        self._outputs = [x.name for x in self._refiner.get_outputs()]

    def refine(self, image: np.ndarray, *, masks: np.ndarray, boxes: Any = None, batch_size: int = 4) -> RefinedMasks:
        """Refine the masks of one image.

        Args:
            image: ``(H, W, 3)`` uint8 RGB.
            masks: ``(N, H, W)`` bool, or float probabilities in [0, 1].
            boxes: ``(N, 4)`` xyxy pixels; None takes the boxes of the masks.
            batch_size: Instances that go through the graphs at once; time per instance hardly depends on it, memory
                does.

        Raises:
            InvalidInputError: If a shape, dtype or value cannot be used.
        """
        config = self.config
        threshold, side = config["mask_threshold"], config["roi_side"]
        image, masks = _checked(image, masks)
        refined = masks.copy() if masks.dtype == np.bool_ else masks >= threshold
        corners = _boxes_of(refined) if boxes is None else _checked_boxes(boxes, len(masks))
        if batch_size < 1:
            raise InvalidInputError(f"expected a batch_size of at least 1, got {batch_size}")
        size = corners[:, 2:] - corners[:, :2]
        inside = (corners[:, :2] < (masks.shape[2], masks.shape[1])).all(axis=1) & (corners[:, 2:] > 0).all(axis=1)
        usable = np.flatnonzero((size > 0).all(axis=1) & inside & refined.any(axis=(1, 2)))
        spans = corners.copy()
        spans[usable] = _within_reach(corners[usable], masks.shape[1:])
        result = RefinedMasks(
            refined,
            probs=np.zeros((len(masks), side, side), np.float32),
            rois=_grown(spans, config["box_margin"]),
            kept_coarse=np.zeros(len(masks), np.bool_),
            predicted_gain=np.zeros(len(masks), np.float32) if "gain" in self._outputs else None,
        )
        pyramid = _ImagePyramid(image, config["outside"])
        proposals = np.zeros((len(masks), 2), np.float32)
        proposed = np.zeros(len(masks), np.bool_)
        if self._segmenter is not None:
            for i in usable:
                proposals[i], new = self._propose(pyramid, refined[i], spans[i])
                if new is not None:
                    proposed[i], refined[i] = True, new
            spans[proposed] = _holding(spans[proposed], refined[proposed])
        settled = np.zeros(len(masks), np.bool_)

        def restore(index: np.ndarray) -> None:
            refined[index] = masks[index] if masks.dtype == np.bool_ else masks[index] >= threshold

        def run(number: int, chosen: np.ndarray) -> None:
            for start in range(0, len(chosen), batch_size):
                index = chosen[start : start + batch_size]
                rois = _grown(spans[index], config["box_margin"])
                pairs = list(zip(index, rois, strict=True))
                first = np.stack([_crop_mask(masks[i], roi, side) for i, roi in pairs])
                moved = proposed | (number > 0)
                coarse = np.stack(
                    [_crop_mask(refined[i], roi, side) if moved[i] else first[k] for k, (i, roi) in enumerate(pairs)]
                )
                # So thin that it has no cell, a proposal cannot be judged.
                empty = proposed[index] & (number == 0) & (coarse.max(axis=(1, 2)) < threshold)
                coarse[empty], proposed[index[empty]] = first[empty], False
                restore(index[empty])
                behind = proposed[index] & (number == 0)
                settled[index] = self._refine(
                    pyramid, index, rois, coarse, first, proposals[index], behind, number, result
                )

        run(0, usable)
        if len(refused := np.flatnonzero(proposed & result.kept_coarse)):  # it may win from the masks of the call
            restore(refused)
            spans[refused] = _within_reach(corners[refused], masks.shape[1:])
            proposed[refused], proposals[refused] = False, NO_PROPOSAL
            run(0, refused)
        for number in range(1, config.get("passes", 1)):  # from the refined masks, in boxes that hold them
            usable = np.array([i for i in usable if not settled[i] and refined[i].any()], np.int64)
            spans[usable] = _holding(spans[usable], refined[usable])
            run(number, usable)
        return result

    def _propose(
        self, pyramid: _ImagePyramid, mask: np.ndarray, box: np.ndarray
    ) -> tuple[tuple[float, float], np.ndarray | None]:
        """Ask the segmenter what is in a box ``(4,)``.

        Returns:
            The IoU of its proposal with the coarse mask ``(H, W)`` and the quality that it expects; and the mask
            ``(H, W)`` bool, None if it is too far from the coarse one.
        """
        config, threshold = self.config["segmenter"], self.config["mask_threshold"]
        crop_side = config["inputs"][0]["shape"][-1]
        height, width = mask.shape
        low, high = box[:2], box[2:]
        side = np.float32(min((high - low).max() * np.float32(crop_side / config["crop_span"]), max(mask.shape)))
        room = np.maximum(np.array([width, height], np.float32) - side, 0)
        origin = np.minimum(np.maximum((low + high - side) / 2, 0), room)
        window = np.concatenate([origin, origin + side]).astype(np.float32)
        pixels = pyramid.crop(window, crop_side)[None].astype(np.float32)
        inside = ((box - np.tile(origin, 2)) * (np.float32(crop_side) / side))[None].astype(np.float32)
        assert self._segmenter is not None
        logits, quality = (
            x[0] for x in self._segmenter.run(["logits", "quality"], {"pixels": pixels, "boxes": inside})
        )
        cells = logits.shape[-1]
        coarse = _crop_mask(mask, window, cells) >= threshold
        found = logits > 0
        agreement = (found & coarse).sum(axis=(1, 2)) / (found | coarse).sum(axis=(1, 2)).clip(min=1)
        best = int((quality * np.sqrt(agreement)).argmax())
        said = (float(agreement[best]), float(quality[best]))
        if agreement[best] < config["least_agreement"]:
            return said, None
        new = np.zeros(mask.shape, np.bool_)
        _paste(logits[best], logits[best], np.ones((cells, cells), np.bool_), window, new, 0.0, ANY_CHANGE)
        return said, new

    def _refine(
        self,
        pyramid: _ImagePyramid,
        index: np.ndarray,
        rois: np.ndarray,
        coarse: np.ndarray,
        first: np.ndarray,
        proposals: np.ndarray,
        proposed: np.ndarray,
        number: int,
        result: RefinedMasks,
    ) -> np.ndarray:
        """Refine n instances once, in pass ``number``, and write what they became into the result.

        ``coarse`` is what the pass starts from, ``first`` are the masks of the call; ``proposals`` is what the
        segmenter says of its own, ``proposed`` where ``coarse`` is one: elsewhere pixels that hardly change stay as
        they are.

        Returns:
            ``(n,)`` bool, where another pass would be wasted.
        """
        config = self.config
        threshold, side = config["mask_threshold"], config["roi_side"]
        outputs = self._run(pyramid, rois, coarse, first, proposals)
        found, touched = outputs["probs"], outputs["touched"]
        present = coarse.max(axis=(1, 2)) >= threshold
        agreement = _iou(found >= threshold, coarse >= threshold)
        refused = agreement < config["keep_if_iou_below"]
        refused |= _iou(found >= threshold, first >= threshold) < config["keep_if_iou_below"]
        if number == 0 and "gain" in outputs:
            refused |= outputs["gain"] < config["keep_if_gain_below"]
        keep = present & refused
        touched &= (present & ~refused)[:, None, None]
        probs = np.where(touched, found, coarse)
        if number == 0:
            probs = np.where(keep[:, None, None], first, probs)
        pasted, before = probs, coarse
        if "aligned" in outputs:
            pixel_side = config["pixel_side"]
            touched = touched.repeat(pixel_side // side, axis=1).repeat(pixel_side // side, axis=2)
            centres = (np.arange(pixel_side, dtype=np.float32) + np.float32(0.5)) * np.float32(side / pixel_side)
            enlarge = _interpolation(centres - np.float32(0.5), side)
            before = enlarge @ coarse @ enlarge.T
            pasted = np.where(touched, outputs["aligned"], before)
        least = np.where(proposed, ANY_CHANGE, config["least_change"])
        for i, new, old, where, roi, change in zip(index, pasted, before, touched, rois, least, strict=True):
            _paste(new, old, where, roi, result.masks[i], threshold, change)
        if number == 0:
            result.kept_coarse[index] = keep
            if result.predicted_gain is not None:
                result.predicted_gain[index] = outputs["gain"]
        accepted = ~keep | (number == 0)  # what a later pass refuses stays as the one before left it
        result.probs[index[accepted]], result.rois[index[accepted]] = probs[accepted], rois[accepted]
        return keep | (agreement >= config.get("again_if_iou_below", 1.0))

    def _run(
        self, pyramid: _ImagePyramid, rois: np.ndarray, coarse: np.ndarray, first: np.ndarray, proposals: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Encode a window around each of n RoIs, and refine: the graph's outputs by name."""
        crop_side = self.config["crop_side"]
        centre = (rois[:, :2] + rois[:, 2:]) / 2
        half = (rois[:, 2:] - rois[:, :2]).max(axis=1, keepdims=True) * (crop_side / self.config["crop_span"] / 2)
        windows = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
        pixels = np.stack([pyramid.crop(window, crop_side) for window in windows])
        maps = self._encoder.run(None, {"pixels": pixels})
        scale = crop_side / (windows[:, 2:] - windows[:, :2])
        in_window = (rois.reshape(-1, 2, 2) - windows[:, None, :2]) * scale[:, None]
        feed = {"rois": in_window.reshape(-1, 4), "image": np.arange(len(rois)), "coarse": coarse}
        names = [x["name"] for x in self.config["image_encoder"]["outputs"]]
        feed |= dict(zip(names, maps, strict=True))
        if "aligned" in self._outputs:
            feed["roi_pixels"] = np.stack([pyramid.crop(roi, self.config["pixel_side"], samples=None) for roi in rois])
        if self._segmenter is not None:
            feed |= {"given": first, "proposals": proposals}
        return dict(zip(self._outputs, self._refiner.run(None, feed), strict=True))


class _ImagePyramid:
    """An image and its halvings, made when a window asks for them."""

    def __init__(self, image: np.ndarray, outside: float):
        self.outside = np.float32(outside)
        # Relative to the grey that fills what lies beyond the border, where samples are zero.
        self.levels = [image.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - self.outside]

    def crop(self, window: np.ndarray, side: int, samples: int | None = 2) -> np.ndarray:
        """Resample a window ``(4,)`` to ``(3, side, side)`` float32 in [0, 1].

        Args:
            window: xyxy pixels.
            side: Side of the result.
            samples: Samples per pixel of the result and axis; None takes one for every pixel of the pyramid's level.
        """
        shrink = max(float((window[2:] - window[:2]).min()) / side, 1.0)
        level = int(np.log2(np.float32(shrink)))
        while len(self.levels) <= level:
            last = self.levels[-1]
            padded = np.pad(last, ((0, 0), (0, last.shape[1] % 2), (0, last.shape[2] % 2)))
            self.levels.append(padded.reshape(3, padded.shape[1] // 2, 2, padded.shape[2] // 2, 2).mean(axis=(2, 4)))
        pixels = self.levels[level]
        x0, y0, x1, y1 = window / np.float32(2**level)
        down, across = (samples or max(1, int(np.ceil(length / np.float32(side)))) for length in (y1 - y0, x1 - x0))
        rows, of_rows = _resampling(y0, y1, side, down, pixels.shape[1])
        columns, of_columns = _resampling(x0, x1, side, across, pixels.shape[2])
        return of_rows @ pixels[:, rows, columns] @ of_columns.T + self.outside


def _resampling(start: Any, end: Any, cells: int, samples: int, length: int) -> tuple[slice, np.ndarray]:
    """Averages over the cells of an interval of a line of ``length`` pixels, ``samples`` of them in each.

    Returns:
        The pixels that count, and ``(cells, pixels)`` float32 weights.
    """
    step = (end - start) / np.float32(cells * samples)
    positions = start + (np.arange(cells * samples, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    weights = _interpolation(positions, length)
    used = np.flatnonzero(weights.any(axis=0))
    pixels = slice(used[0], used[-1] + 1) if len(used) else slice(0, 1)
    return pixels, weights[:, pixels].reshape(cells, samples, -1).mean(axis=1)


def _interpolation(positions: np.ndarray, length: int) -> np.ndarray:
    """Weights of linear interpolation, with RoIAlign's rule at the border.

    Args:
        positions: ``(P,)`` float32 in cells, 0 at the centre of the first.
        length: Cells.

    Returns:
        ``(P, length)`` float32; zero more than one cell outside, the border's value up to there.
    """
    inside = (positions >= -1) & (positions <= length)
    clipped = positions.clip(0, length - 1)
    low = clipped.astype(np.int64)
    part = clipped - low
    weights = np.zeros((len(positions), length), np.float32)
    line = np.arange(len(positions))
    weights[line, low] = (1 - part) * inside
    weights[line, np.minimum(low + 1, length - 1)] += part * inside
    return weights


def _crop_mask(mask: np.ndarray, roi: np.ndarray, side: int) -> np.ndarray:
    """Average a mask ``(H, W)`` over the cells of a RoI: ``(side, side)`` float32."""
    x0, y0, x1, y1 = roi
    rows, of_rows = _resampling(y0, y1, side, int(np.ceil((y1 - y0) / np.float32(side))), mask.shape[0])
    columns, of_columns = _resampling(x0, x1, side, int(np.ceil((x1 - x0) / np.float32(side))), mask.shape[1])
    return of_rows @ mask[rows, columns].astype(np.float32) @ of_columns.T


def _paste(
    probs: np.ndarray,
    before: np.ndarray,
    where: np.ndarray,
    roi: np.ndarray,
    mask: np.ndarray,
    threshold: float,
    least_change: float,
) -> None:
    """Write the labels of ``probs``, ``(S, S)``, into the pixels of a mask ``(H, W)`` bool.

    Only pixels whose cell is in ``where`` are written, and only where the probability has changed by enough from
    ``before``.
    """
    side = len(probs)
    x0, y0, x1, y1 = np.ceil(roi - 0.5).clip(0, [*mask.shape[::-1], *mask.shape[::-1]]).astype(int)
    if x1 <= x0 or y1 <= y0:
        return
    cell = (roi[2:] - roi[:2]) / np.float32(side)
    u = (np.arange(x0, x1, dtype=np.float32) + np.float32(0.5) - roi[0]) / cell[0]
    v = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5) - roi[1]) / cell[1]
    rows, columns = (_interpolation(x - np.float32(0.5), side) for x in (v, u))
    values, was = rows @ probs @ columns.T, rows @ before @ columns.T
    chosen = where[np.ix_(v.astype(int).clip(max=side - 1), u.astype(int).clip(max=side - 1))]
    region = mask[y0:y1, x0:x1]
    chosen &= ((values >= threshold) != region) & (abs(values - was) > least_change)
    region[chosen] = (values >= threshold)[chosen]


def _boxes_of(masks: np.ndarray) -> np.ndarray:
    """Tight boxes ``(N, 4)`` float32 of ``(N, H, W)`` bool; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(columns):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _holding(boxes: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Boxes ``(n, 4)`` grown to hold masks ``(n, H, W)`` bool."""
    held = _boxes_of(masks)
    return np.concatenate([np.minimum(boxes[:, :2], held[:, :2]), np.maximum(boxes[:, 2:], held[:, 2:])], axis=1)


def _grown(boxes: np.ndarray, margin: float) -> np.ndarray:
    """Boxes ``(n, 4)`` with a margin on all sides, as a share of theirs."""
    size = np.float32(margin) * (boxes[:, 2:] - boxes[:, :2])
    return np.concatenate([boxes[:, :2] - size, boxes[:, 2:] + size], axis=1)


def _within_reach(boxes: np.ndarray, image_size: tuple[int, ...]) -> np.ndarray:
    """Boxes ``(n, 4)`` that reach into the image, less what is farther from it than it is wide or high."""
    size = np.array(image_size[::-1] * 2, np.float32)
    return np.clip(boxes, -size, 2 * size)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of ``(n, S, S)`` bool: ``(n,)``, one where both are empty."""
    union = (a | b).sum(axis=(1, 2))
    return np.where(union > 0, (a & b).sum(axis=(1, 2)) / union.clip(min=1), 1.0)


def _checked(image: Any, masks: Any) -> tuple[np.ndarray, np.ndarray]:
    image, masks = np.asarray(image), np.asarray(masks)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InvalidInputError(f"expected an image of shape (H, W, 3), uint8 RGB, got {image.shape} of {image.dtype}")
    if not len(masks):
        masks = np.zeros((0, *image.shape[:2]), np.bool_)
    if masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
        raise InvalidInputError(f"expected masks of shape (N, {image.shape[0]}, {image.shape[1]}), got {masks.shape}")
    if not image.size:
        raise InvalidInputError(f"expected an image of at least one pixel, got shape {image.shape}")
    if masks.dtype == np.bool_:
        return image, masks
    if not np.issubdtype(masks.dtype, np.floating):
        raise InvalidInputError(f"expected masks of bool or float, got {masks.dtype}: give masks > 0")
    low, high = masks.min(initial=0), masks.max(initial=1)
    # Interpolation rounds; not the other way round, so that NaN fails, too.
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise InvalidInputError(
            f"expected mask probabilities in [0, 1], got {low} to {high}: apply a sigmoid to logits"
        )
    return image, masks if low == 0 and high == 1 else masks.clip(0, 1)


def _checked_boxes(boxes: Any, count: int) -> np.ndarray:
    corners = np.asarray(boxes, np.float32)
    if not count and not corners.size:
        corners = np.zeros((0, 4), np.float32)
    if corners.shape != (count, 4):
        raise InvalidInputError(f"expected boxes of shape ({count}, 4), one per mask, got {corners.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(corners).all(axis=1))):
        raise InvalidInputError(f"expected finite boxes, got NaN or infinity at index {bad[:10].tolist()}")
    # Four zeros are the box of an empty mask.
    without_area = (corners[:, 2:] <= corners[:, :2]).any(axis=1) & corners.any(axis=1)
    if len(bad := np.flatnonzero(without_area)):
        raise InvalidInputError(
            f"expected boxes x1, y1, x2, y2 with x2 > x1 and y2 > y1, got others at index {bad[:10].tolist()}: from x, "
            "y, width, height add the corner to the size"
        )
    return corners


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"expected config.json of an export in {folder}, got: {error}") from error
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION or "max_nodes" not in config:
        raise InvalidInputError(f"expected an export of format {FORMAT_VERSION} in {folder}: export it again")
    if config["image_encoder"] is None:
        raise InvalidInputError(
            f"expected an export with an image encoder in {folder}, got one for the features of "
            f"{config['feature_source']!r}: run its refiner.onnx on that detector's maps"
        )
    wanted = ["image_encoder.onnx", "refiner.onnx"] + ["segmenter.onnx"] * bool(config.get("segmenter"))
    if missing := [x for x in wanted if not (folder / x).is_file()]:
        raise InvalidInputError(f"expected {' and '.join(missing)} in {folder}: export with the ONNX format")
    return config
