"""A folder of mask images, one object each, and the folder of the photos that they are masks of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from transfiner_refine.bulk.source import Loaded, Source, stat_digest
from transfiner_refine.data.coco import IMAGE_SUFFIXES, join_instances
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_image
from transfiner_refine.types import Instances

NUMBER = re.compile(r"_\d+$")


class MaskFolder(Source):
    """A folder of PNGs; the output is a folder of the same names, black and white.

    The masks of ``PHOTO.jpg`` are ``PHOTO.png``, ``PHOTO_0.png``, ``PHOTO_001.png`` ... and whatever is in the
    subfolder ``PHOTO``. A name that is a photo's own counts before one with a number: ``frame_001.png`` belongs to
    ``frame_001.jpg`` if there is one, and to ``frame.jpg`` otherwise.

    Args:
        images: Folder of the photos.
        predictions: Folder of the masks.
        missing_ok: Whether some of the photos may be missing; they count as images that cannot be refined.

    Raises:
        InvalidInputError: If one of them is no folder, both are the same, there are no masks or images that are no PNG
            among them, two photos have one name, or photos are missing.
    """

    noun: ClassVar[str] = "photo"

    def __init__(self, images: Path, predictions: Path, *, missing_ok: bool = True):
        for folder, kind in ((images, "images"), (predictions, "masks")):
            if not folder.is_dir():
                raise InvalidInputError(f"expected a folder of {kind}, got {folder}: check the path")
        self.images, self.path = images, predictions
        self._images, self._folder = images.resolve(), predictions.resolve()
        if self._images == self._folder:
            raise InvalidInputError(f"expected masks in a folder of their own, got {images} for photos and masks")
        self._photos = _photos(images)
        masks: dict[str, list[str]] = {}
        names = _masks(predictions)
        for name in names:
            masks.setdefault(self._photo_of(name), []).append(name)
        if not masks:
            raise InvalidInputError(f"expected masks as PNG files in {predictions}, got none: check the folder")
        missing = [label for label in masks if label not in self._photos]
        if missing and not (missing_ok and len(missing) < len(masks)):
            raise InvalidInputError(
                f"expected a photo in {images} for every mask in {predictions}, got none named {missing[0]!r} and "
                f"{len(missing) - 1} more: a mask is named PHOTO.png, PHOTO_000.png or PHOTO/anything.png"
            )
        self._labels = list(masks)
        self._masks = list(masks.values())
        self._starts = np.cumsum([0, *map(len, self._masks)])
        self.record_count = len(names)

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> str:
        """The photo's name without its suffix."""
        return self._labels[index]

    def positions(self, index: int) -> Sequence[int]:
        """The masks of a photo are neighbours."""
        return range(self._starts[index], self._starts[index + 1])

    def fingerprint(self) -> dict[str, Any]:
        """A checksum of the masks' names, sizes and times; of the photos, their folder alone."""
        files = (self._folder / name for names in self._masks for name in names)
        return {"images": str(self._images), "predictions": stat_digest(self._folder, files)}

    def load(self, index: int) -> Loaded:
        """Read the photo and its masks."""
        name = self._photos.get(self._labels[index])
        if name is None:
            raise InvalidInputError(f"expected the photo {self._labels[index]!r} in {self._images}, got none: add it")
        photo = as_image(self._images / name)
        size = (photo.shape[1], photo.shape[2])
        masks = np.stack([read_mask(self._folder / name, size) for name in self._masks[index]])
        return Loaded(photo, join_instances(masks, [{}] * len(masks)))

    def refined(self, index: int, loaded: Loaded, refined: Instances) -> list[bytes]:
        """Masks as PNG, 0 and 255."""
        return [encode_png(mask) for mask in refined.masks.numpy(force=True)]

    def unrefined(self, index: int) -> list[bytes]:
        """The files as they are."""
        return [(self._folder / name).read_bytes() for name in self._masks[index]]

    def check_target(self, output: Path) -> Path:
        """A folder that is empty, or to be made."""
        return check_new_folder(output)

    def write(self, target: Path, records: Iterator[bytes], scratch: Path) -> None:
        """One file for each mask, with its name."""
        target.mkdir()
        for names in self._masks:
            for name in names:
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(next(records))

    def _photo_of(self, name: str) -> str:
        """The name of a mask's photo, without suffix."""
        if "/" in name:
            return name.split("/")[0]
        stem = Path(name).stem
        return stem if stem in self._photos else NUMBER.sub("", stem)


def encode_png(mask: np.ndarray) -> bytes:
    """Encode a mask ``(H, W)`` bool as a PNG of 0 and 255."""
    return cv2.imencode(".png", mask.astype(np.uint8) * 255)[1].tobytes()


def check_new_folder(output: Path) -> Path:
    """Make sure that a folder can be made, or is there and empty.

    Returns:
        The path with links resolved.

    Raises:
        InvalidInputError: If it is a file, holds files, or lies where nothing can be written.
    """
    target = output.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInputError(f"expected a new or an empty folder to write, got {output}: give another --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"expected a folder for {output} that can be made, got: {error.strerror}") from error
    if not os.access(target.parent, os.W_OK):
        raise InvalidInputError(f"expected a folder that can be written to, got {target.parent}: check its permissions")
    return target


def _masks(folder: Path) -> list[str]:
    """File names of the masks, relative to the folder and in order."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if others := [name for name in names if not name.lower().endswith(".png")]:
        raise InvalidInputError(
            f"expected no images but PNG masks in {folder}, got {len(others)} others, {others[0]!r} the first: save "
            "them as PNG, or move them away"
        )
    return names


def _photos(folder: Path) -> dict[str, str]:
    """File names of the photos by their names without suffix."""
    photos: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            if path.stem in photos:
                raise InvalidInputError(
                    f"expected one photo of each name in {folder}, got {photos[path.stem]} and {path.name}"
                )
            photos[path.stem] = path.name
    return photos
