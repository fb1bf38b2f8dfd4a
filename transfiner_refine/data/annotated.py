"""A COCO-format data set to train on: photos, their annotated objects, and perhaps what a detector predicted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transfiner_refine.data.coco import (
    ImageId,
    Result,
    entry_fault,
    group_by_image,
    load_image_index,
    load_results,
    load_section,
    write_atomic,
)
from transfiner_refine.data.object_cache import decode_soft, errors_in
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle
from transfiner_refine.inputs import PILLOW_ERRORS

MIN_AREA = 24 * 24
"""Pixels of the smallest object that is worth training on: finer than that, its outline is the annotator's guess."""


@dataclass(frozen=True)
class DataFiles:
    """Where a data set is.

    Attributes:
        images: Folder of the photos.
        annotations: COCO annotations file; crowds and annotations without a segmentation are left out.
        predictions: COCO results file of a detector on these photos, or None.
    """

    images: Path
    annotations: Path
    predictions: Path | None = None

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each file, as ``annotations`` and ``predictions``; the photos are not part of it."""
        files = {"annotations": self.annotations, "predictions": self.predictions}
        return {role: hashlib.sha256(path.read_bytes()).hexdigest() for role, path in files.items() if path}


@dataclass(frozen=True)
class AnnotatedSet:
    """Photos with at least one object each.

    Attributes:
        paths: File of each photo.
        objects: Annotations of each photo, at least one.
        predictions: Results of each photo; a photo may have none.
    """

    paths: dict[ImageId, Path]
    objects: dict[ImageId, list[Result]]
    predictions: dict[ImageId, list[Result]]

    @classmethod
    def read(cls, files: DataFiles) -> AnnotatedSet:
        """Read a data set.

        Raises:
            InvalidInputError: If a file cannot be read or is malformed, no photo has an object, a photo is missing or
                damaged, a segmentation is not one of its photo, or no prediction is about an annotated photo.
        """
        names = load_image_index(files.annotations)
        entries = _annotated_objects(files.annotations)
        if not entries:
            raise InvalidInputError(
                f"expected annotated objects in {files.annotations}, got none: annotate at least one with a "
                "segmentation; crowds do not count"
            )
        objects = _by_image(entries.values())
        if unknown := [image_id for image_id in objects if image_id not in names]:
            raise InvalidInputError(
                f"expected every image_id of {files.annotations} among its images, got {len(unknown)} unknown, "
                f"{unknown[0]!r} the first: add them to images"
            )
        if not files.images.is_dir():
            raise InvalidInputError(f"expected a folder of images, got {files.images}: check the path")
        paths = {image_id: files.images / names[image_id] for image_id in objects}
        if missing := [path.name for path in paths.values() if not path.is_file()]:
            raise InvalidInputError(
                f"expected the annotated images in {files.images}, got {len(missing)} missing, {missing[0]!r} the "
                "first: check the folder"
            )
        sizes = {image_id: _size_of(path) for image_id, path in paths.items()}
        _check_masks(files.annotations, entries, names, sizes)
        predictions: dict[ImageId, list[Result]] = {}
        if files.predictions is not None:
            results = {i: x for i, x in enumerate(load_results(files.predictions)) if x["image_id"] in objects}
            _check_masks(files.predictions, results, names, sizes)
            predictions = _by_image(results.values())
            if not predictions:
                raise InvalidInputError(
                    f"expected predictions for the annotated images in {files.predictions}, got none: their image_id "
                    f"must be that of {files.annotations}, as {next(iter(objects))!r}"
                )
        return cls(paths, objects, predictions)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def count(self) -> int:
        """Objects."""
        return sum(map(len, self.objects.values()))

    def subset(self, image_ids: Iterable[ImageId]) -> AnnotatedSet:
        """Some of the photos, in the order of ``image_ids``."""
        ids = list(image_ids)
        return AnnotatedSet(
            paths={key: self.paths[key] for key in ids},
            objects={key: self.objects[key] for key in ids},
            predictions={key: self.predictions[key] for key in ids if key in self.predictions},
        )

    def spread(self, limit: int) -> AnnotatedSet:
        """At most ``limit`` of the photos, spread evenly over the set: neighbours are often frames of one scene."""
        ids = list(self.paths)
        if len(ids) <= limit:
            return self
        return self.subset(ids[i] for i in np.linspace(0, len(ids) - 1, limit).round().astype(int))

    def split(self, share: float, seed: int) -> tuple[AnnotatedSet, AnnotatedSet]:
        """Set a share of the photos apart, at random.

        Args:
            share: Share of the photos, between 0 and 1; at least one photo stays on either side.
            seed: The same seed gives the same split.

        Returns:
            What is left, and what was set apart.

        Raises:
            InvalidInputError: If ``share`` is out of range, or there is one photo only.
        """
        if not 0 < share < 1:
            raise InvalidInputError(f"expected a validation share between 0 and 1, got {share}")
        ids = sorted(self.paths, key=str)
        if len(ids) < 2:
            raise InvalidInputError(
                f"expected at least two annotated images to set some apart, got {len(ids)}: add images, or give "
                "validation files of their own"
            )
        order = np.random.default_rng(seed).permutation(len(ids)).tolist()
        apart = {ids[i] for i in order[: min(max(1, round(share * len(ids))), len(ids) - 1)]}
        return self.subset(x for x in self.paths if x not in apart), self.subset(x for x in self.paths if x in apart)

    def write(self, directory: Path) -> None:
        """Write ``annotations.json`` and, where there are predictions, ``detections.json``, with absolute file names.

        Files that would not change are left alone, so that what was made from them stays fresh.
        """
        images = [{"id": key, "file_name": str(path.resolve())} for key, path in self.paths.items()]
        entries = [{"id": i} | entry for i, entry in enumerate(x for part in self.objects.values() for x in part)]
        contents: dict[str, Any] = {"annotations.json": {"images": images, "annotations": entries}}
        if self.predictions:
            contents["detections.json"] = [x for part in self.predictions.values() for x in part]
        for name, value in contents.items():
            path, content = directory / name, json.dumps(value).encode()
            if not path.exists() or path.read_bytes() != content:
                write_atomic(path, content)


def _annotated_objects(path: Path) -> dict[int, Result]:
    """Read the annotations that are objects, by their place in the file."""
    objects = {}
    for place, entry in enumerate(load_section(path, "annotations")):
        # Without a segmentation it is no object, and as good as one of null.
        whole = {"segmentation": None} | entry if isinstance(entry, dict) else entry
        if fault := entry_fault(whole):
            raise InvalidInputError(f"{path}, entry {place}: {fault}")
        if entry.get("segmentation") and not entry.get("iscrowd"):
            objects[place] = entry
    return objects


def _size_of(path: Path) -> tuple[int, int]:
    """``(H, W)`` of a photo, as stored."""
    try:
        with Image.open(path) as photo:
            return photo.height, photo.width
    except PILLOW_ERRORS as error:
        raise InvalidInputError(f"expected a readable image, got {path}: restore the file or drop its entry") from error


def _check_masks(
    file: Path, entries: Mapping[int, Result], names: Mapping[ImageId, str], sizes: Mapping[ImageId, tuple[int, int]]
) -> None:
    """Make sure that what is drawn later can be: only here are the entries' places in the user's file known."""
    for place, entry in entries.items():
        image_id = entry["image_id"]
        with errors_in(file, f"entry {place}", names[image_id]):
            rle.compress(entry["segmentation"], sizes[image_id])
            decode_soft(entry)


def _by_image(entries: Iterable[Result]) -> dict[ImageId, list[Result]]:
    entries = list(entries)
    return {key: [entries[i] for i in positions] for key, positions in group_by_image(entries).items()}
