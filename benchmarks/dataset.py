"""Data sets for the benchmarks: photos with ground truth and a detector's masks, paired instance by instance.

A set is a folder with ``images/``, ``annotations.json`` (COCO) and ``detections.json`` (COCO results, each with
``soft28``: its 28×28 probabilities in the box frame as base64 of uint8, probability × 255).
"""

from __future__ import annotations

import base64
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation import match_detections
from transfiner_refine.functional.rle import decode_batch

DATA = Path(os.environ.get("TRANSFINER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
"""Folder of the sets; ``--data`` or the environment variable ``TRANSFINER_DATA`` name another."""

ECSSD_VALIDATION = frozenset(Path(__file__).with_name("ecssd_validation.txt").read_text().split())
"""The photos of ``ecssd`` that are never trained on."""


@dataclass(frozen=True)
class MatchedImage:
    """One photo and those of its N objects that the detector found.

    Attributes:
        file_name: Name of the photo.
        image: ``(H, W, 3)`` uint8 RGB.
        truth: ``(N, H, W)`` bool ground truth.
        coarse: ``(N, H, W)`` bool, the matched detections' masks.
        boxes: ``(N, 4)`` float32, the matched detections' boxes, xyxy pixels.
        box_probs: ``(N, 28, 28)`` float32, the matched detections' probabilities in the box frame.
    """

    file_name: str
    image: np.ndarray
    truth: np.ndarray
    coarse: np.ndarray
    boxes: np.ndarray
    box_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.truth)


class MatchedSet:
    """The photos of a set on which the detector found an object; iterating reads them one by one.

    Args:
        folder: The set.
        limit: Photos to read, spread evenly over the set; None reads all.
        keep: Which photos count, by file name; None keeps all.

    Raises:
        InvalidInputError: If the folder holds no such set.
    """

    def __init__(self, folder: Path, limit: int | None = None, keep: Callable[[str], bool] | None = None):
        for name in ("annotations.json", "detections.json"):
            if not (folder / name).is_file():
                raise InvalidInputError(
                    f"expected {name} in {folder}, got none: name the folder of the sets with --data or TRANSFINER_DATA"
                )
        annotations = json.loads((folder / "annotations.json").read_text())
        self.folder = folder
        self.truth = _by_image(annotations["annotations"])
        self.detections = _by_image(json.loads((folder / "detections.json").read_text()))
        self.images: list[dict] = [x for x in annotations["images"] if keep is None or keep(x["file_name"])]
        if limit is not None and limit < len(self.images):
            # Neighbours are often frames of one scene.
            self.images = [self.images[i] for i in np.linspace(0, len(self.images) - 1, limit).round().astype(int)]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[MatchedImage]:
        for image in self.images:
            size = (image["height"], image["width"])
            detections = self.detections[image["id"]]
            truth = decode_batch([x["segmentation"] for x in self.truth[image["id"]] if not x.get("iscrowd")], size)
            coarse = decode_batch([x["segmentation"] for x in detections], size)
            matches = match_detections(truth, coarse)
            if not len(matches):
                continue
            found = [detections[i] for i in matches.detection]
            corners = np.array([x["bbox"] for x in found], np.float32)  # xywh
            corners[:, 2:] += corners[:, :2]
            yield MatchedImage(
                file_name=image["file_name"],
                image=np.asarray(Image.open(self.folder / "images" / image["file_name"]).convert("RGB")),
                truth=truth[matches.truth],
                coarse=coarse[matches.detection],
                boxes=corners,
                box_probs=np.stack([_probs(x["soft28"]) for x in found]),
            )


def open_set(data: Path, name: str, limit: int | None = None) -> MatchedSet:
    """Open a set by name; ``ecssd_validation`` are those photos of ``ecssd`` that are never trained on.

    Args:
        data: Folder of the sets.
        name: Name of the set.
        limit: Photos to read, spread evenly over the set; None reads all.
    """
    if name == "ecssd_validation":
        return MatchedSet(data / "ecssd", limit, ECSSD_VALIDATION.__contains__)
    return MatchedSet(data / name, limit)


def _by_image(entries: list[dict]) -> defaultdict[int, list[dict]]:
    grouped: defaultdict[int, list[dict]] = defaultdict(list)
    for entry in entries:
        grouped[entry["image_id"]].append(entry)
    return grouped


def _probs(soft: str) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(soft), np.uint8).reshape(ROOT_SIDE, ROOT_SIDE)
    return values.astype(np.float32) / 255
