"""Decoded objects on disk: one cut-out per annotated object, with its ground truth and its matched detections.

Decoding a JPEG and an RLE for every sample would cost more than everything else in it. Each object is therefore cut out
once, with the context that any crop around it can show, shrunk when it is large, and stored in one flat file that
loader workers share through the page cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.coco import Result, boxes_of, decode_masks, group_by_image, load_results, write_json_atomic
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.rle import decode
from transfiner_refine.inputs import boxes_from_masks

FORMAT = 2
CONTEXT = 2.6
"""Side of a cut-out in object sides: the widest crop (256 of 120 pixels) plus room for shift, rotation and margin."""

MATCH_IOU = 0.5

BOX_IOU = 0.5
"""A detection whose box overlaps the tight box of its own mask by less is taken to have a wrong one.

A cut-out spans the boxes of its object, so that a box far away would leave nothing of it. Of the results of real
detectors, 1 to 4 in a hundred are below.
"""


@dataclass(frozen=True)
class CropSource:
    """One COCO-format dataset and its part in the training mix.

    Attributes:
        directory: Holds ``annotations.json``, ``images/`` and, where there are real coarse masks, ``detections.json``.
        weight: Weight of the losses of these objects; below 1 where the ground truth is imprecise.
        min_area: Objects of fewer pixels are left out.
        exclude: File names of images that are left out, for instance a validation list.
    """

    directory: str | Path
    weight: float = 1.0
    min_area: float = 24 * 24
    exclude: Collection[str] = ()


@dataclass(frozen=True)
class CachedDetection:
    """A real coarse mask of an object.

    Attributes:
        offset: Where its ``(H, W)`` uint8 coverage starts in the flat file.
        box: xyxy, cut-out pixels.
        soft_offset: Where its ``(28, 28)`` uint8 box-frame probabilities (times 255) start, or None.
    """

    offset: int
    box: tuple[float, float, float, float]
    soft_offset: int | None


@dataclass(frozen=True)
class CachedObject:
    """One annotated object; its cut-out is a part of the image, shrunk if the object is large.

    Attributes:
        file_name: Image the object was cut from.
        annotation_id: COCO id of the annotation.
        size: ``(H, W)`` of the cut-out.
        offset: Where its ``(H, W, 3)`` uint8 RGB pixels start in the flat file; the ``(H, W)`` uint8 coverage of the
            ground truth follows.
        box: Tight xyxy box of the ground truth, cut-out pixels.
        detections: Real coarse masks matched to it, the best first.
    """

    file_name: str
    annotation_id: int
    size: tuple[int, int]
    offset: int
    box: tuple[float, float, float, float]
    detections: tuple[CachedDetection, ...]


class _Detection(NamedTuple):
    """A decoded result: ``(H, W)`` bool mask, ``(4,)`` xyxy box, and the bytes of its 28×28 soft map or none."""

    mask: np.ndarray
    box: np.ndarray
    soft: bytes


class ObjectCache:
    """Cut-outs of all objects of one dataset, built at first use and memory-mapped after.

    Args:
        source: The dataset.
        directory: Where the cache files are kept; created if absent.
        max_side: Objects whose longer side, with a margin of an eighth on both ends, exceeds this are shrunk to it.
        max_detections: Real coarse masks kept per object.

    Attributes:
        name: Of the cache files; another one if the dataset or its files are others. A photo is told by its size in
            bytes and its time of change, which are looked up at every start, so that all photos must stay in place.

    Raises:
        InvalidInputError: If the dataset's annotations, its detections or one of its images cannot be read.
    """

    def __init__(self, source: CropSource, directory: Path, max_side: int = 320, max_detections: int = 3) -> None:
        self.source = source
        self.name = f"{Path(source.directory).resolve().name}-{_digest(source, max_side, max_detections)}"
        self._data_path, index_path = directory / f"{self.name}.bin", directory / f"{self.name}.json"
        if not index_path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            objects = _build(source, self._data_path, max_side, max_detections)
            # Written last: an interrupted build is never taken for a whole one.
            write_json_atomic(index_path, [asdict(entry) for entry in objects])
        excluded = set(source.exclude)
        entries = json.loads(index_path.read_text())
        self.objects = [_from_json(entry) for entry in entries if entry["file_name"] not in excluded]
        self._data: np.memmap | None = None

    def __len__(self) -> int:
        return len(self.objects)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}  # a memory map is opened anew in each spawned worker

    def read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """View of a stored array.

        Args:
            offset: Where it starts.
            shape: Its shape.

        Returns:
            uint8 array of ``shape``, read-only.
        """
        if self._data is None:
            self._data = np.memmap(self._data_path, np.uint8, mode="r")
        return self._data[offset : offset + int(np.prod(shape))].reshape(shape)

    def image(self, item: CachedObject) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB cut-out of an object."""
        return self.read(item.offset, (*item.size, 3))

    def coverage(self, item: CachedObject) -> np.ndarray:
        """``(H, W)`` uint8 ground truth of an object: 255 where it covers the whole pixel."""
        return self.read(item.offset + 3 * item.size[0] * item.size[1], item.size)


@contextmanager
def errors_in(*places: object) -> Iterator[None]:
    """Say where an input is that cannot be used: the file first, then the place in it."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{', '.join(map(str, places))}: {error}") from None


def decode_soft(entry: Result) -> bytes:
    """Decode the soft map of a result.

    Returns:
        28 × 28 bytes, row by row; none if it has no ``soft28``.

    Raises:
        InvalidInputError: If ``soft28`` is not base64 of as many bytes.
    """
    text = entry.get("soft28") or ""
    try:
        soft = base64.b64decode(text)
    except (TypeError, ValueError):
        soft = None
    if soft is None or len(soft) not in (0, ROOT_SIDE**2):
        found = repr(text)[:60] if soft is None else f"{len(soft)} bytes"
        raise InvalidInputError(
            f"expected soft28 as base64 of {ROOT_SIDE}x{ROOT_SIDE} bytes, got {found}: encode the map again, or leave "
            "it out"
        )
    return soft


def _digest(source: CropSource, max_side: int, max_detections: int) -> str:
    """Hash of all that a cache depends on, with size and time of change of every file, photos too.

    Excluded files are no choice that counts, since they are dropped on reading.
    """
    root = Path(source.directory).resolve()
    files = [root / "annotations.json", root / "detections.json"]
    if not files[0].exists():
        raise InvalidInputError(f"expected a COCO-format dataset, got no file {files[0]}: point at its directory")
    files += [root / "images" / record["file_name"] for record in _load_annotations(files[0])["images"]]
    stamps = [_stamp(file) for file in files]
    parts = (FORMAT, str(root), stamps, source.min_area, max_side, max_detections)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _from_json(entry: dict[str, Any]) -> CachedObject:
    detections = tuple(CachedDetection(d["offset"], tuple(d["box"]), d["soft_offset"]) for d in entry["detections"])
    return CachedObject(**{**entry, "size": tuple(entry["size"]), "box": tuple(entry["box"]), "detections": detections})


def _build(source: CropSource, data_path: Path, max_side: int, max_detections: int) -> list[CachedObject]:
    """Cut out every object of a dataset and write the flat file."""
    root = Path(source.directory)
    document, detections = root / "annotations.json", root / "detections.json"
    annotations = _load_annotations(document)
    results = load_results(detections) if detections.exists() else []
    results_of, annotated = group_by_image(results), defaultdict(list)
    for annotation in annotations["annotations"]:
        if not annotation.get("iscrowd"):
            annotated[annotation["image_id"]].append(annotation)

    objects: list[CachedObject] = []
    temporary = data_path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            for record in annotations["images"]:
                if not annotated[record["id"]]:
                    continue
                image = _read_image(root / "images" / record["file_name"])
                try:
                    found = _detections(results, results_of.get(record["id"], []), image.shape[:2])
                except InvalidInputError as error:  # it begins with the entry
                    raise InvalidInputError(f"{detections}, {error}") from None
                for annotation in annotated[record["id"]]:
                    with errors_in(document, f"annotation {annotation.get('id')!r} of {record['file_name']}"):
                        mask = decode(annotation["segmentation"], image.shape[:2])
                    if np.count_nonzero(mask) < max(source.min_area, 1):
                        continue
                    matched = _match(mask, found)[:max_detections]
                    names = record["file_name"], annotation["id"]
                    objects.append(_write_object(out, image, mask, matched, names, max_side))
        temporary.replace(data_path)
    finally:
        temporary.unlink(missing_ok=True)
    return objects


def _read_image(path: Path) -> np.ndarray:
    """Decode to ``(H, W, 3)`` uint8 RGB, as stored: annotations refer to the pixels before any EXIF rotation."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None:
        raise InvalidInputError(f"expected a readable image, got {path}: restore the file or drop its entry")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _load_annotations(path: Path) -> dict[str, Any]:
    """Read an annotations file as far as the cache needs it."""
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidInputError(f"expected JSON in {path}, got {error}: write the file again") from error
    if not isinstance(document, dict) or not {"images", "annotations"} <= document.keys():
        raise InvalidInputError(f"expected COCO annotations in {path}, with images and annotations: check the file")
    return document


def _detections(results: list[dict[str, Any]], positions: list[int], size: tuple[int, int]) -> list[_Detection]:
    """Decode the results of one image; those with an empty mask are of no use as coarse masks.

    A wrong box is replaced by that of the mask, and its soft map, which lies in the wrong box, is left out.
    """
    masks = decode_masks(results, positions, size)
    kept = np.flatnonzero(masks.any((1, 2)))
    entries = [results[positions[i]] for i in kept]
    masks = masks[kept]
    tight = boxes_from_masks(torch.from_numpy(masks))
    given = boxes_of(entries, tight)
    fits = box_iou(given, tight).diagonal() >= BOX_IOU  # (N,)
    boxes = torch.where(fits[:, None], given, tight).double().numpy()
    softs = []
    for i, entry, fit in zip(kept, entries, fits.tolist(), strict=True):
        with errors_in(f"entry {positions[i]}"):
            soft = decode_soft(entry)
        softs.append(soft if fit else b"")
    return [_Detection(*parts) for parts in zip(masks, boxes, softs, strict=True)]


def _match(mask: np.ndarray, found: list[_Detection]) -> list[_Detection]:
    """Detections whose masks overlap an object by an IoU above one half, the best first."""
    overlap = np.array([np.count_nonzero(d.mask & mask) for d in found])
    union = np.array([np.count_nonzero(d.mask | mask) for d in found])
    ious = overlap / union  # never empty: the object has pixels
    return [found[i] for i in np.argsort(-ious, kind="stable") if ious[i] > MATCH_IOU]


def _write_object(
    out: BinaryIO,
    image: np.ndarray,
    mask: np.ndarray,
    matched: list[_Detection],
    names: tuple[str, int],
    max_side: int,
) -> CachedObject:
    """Cut one object out, shrink it if it is large, and append it to the flat file.

    ``names`` are its file name and annotation id; the other arguments are in the image frame.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
    whole = np.array([tight, *(d.box for d in matched)])
    whole = np.concatenate([whole[:, :2].min(0), whole[:, 2:].max(0)])
    long_side = 1.25 * float((whole[2:] - whole[:2]).max())

    height, width = mask.shape
    centre, reach = (whole[:2] + whole[2:]) / 2, CONTEXT * long_side / 2
    x0, y0 = np.maximum(np.floor(centre - reach), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(centre + reach), [width, height]).astype(int)
    shrink = min(1.0, max_side / long_side)
    size = max(1, round((x1 - x0) * shrink)), max(1, round((y1 - y0) * shrink))  # (W, H)
    # Sides are rounded to whole pixels, so the exact scale differs by axis.
    scale = np.tile([size[0] / (x1 - x0), size[1] / (y1 - y0)], 2)
    corner = np.array([x0, y0, x0, y0])

    def plane(full: np.ndarray) -> np.ndarray:
        cut = full[y0:y1, x0:x1]
        return cut if shrink == 1.0 else cv2.resize(cut, size, interpolation=cv2.INTER_AREA)

    def to_cut(box: np.ndarray) -> tuple[float, float, float, float]:
        a, b, c, d = ((box - corner) * scale).tolist()
        return a, b, c, d

    offset = out.tell()
    out.write(plane(image).tobytes())
    out.write(plane(mask.astype(np.uint8) * 255).tobytes())
    cached = []
    for detection in matched:
        start = out.tell()
        out.write(plane(detection.mask.astype(np.uint8) * 255).tobytes())
        soft_offset = out.tell() if detection.soft else None
        out.write(detection.soft)
        cached.append(CachedDetection(start, to_cut(detection.box), soft_offset))
    return CachedObject(*names, (size[1], size[0]), offset, to_cut(tight), tuple(cached))
