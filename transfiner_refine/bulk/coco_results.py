"""A COCO or LVIS results file, and the folder of its images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transfiner_refine.bulk.json_index import ResultsIndex
from transfiner_refine.bulk.source import Loaded, Source, file_digest
from transfiner_refine.data.coco import (
    ImageId,
    Result,
    check_output,
    decode_instances,
    find_images,
    load_image_index,
)
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_image
from transfiner_refine.types import Instances


class CocoResults(Source):
    """A results file; the output is the same with other segmentations.

    Held in memory are the place of each entry in the file (32 bytes) and the path of each image; entries are read when
    their image is.

    Args:
        images: Folder of the images.
        predictions: COCO results file.
        annotations: COCO or LVIS annotations that name the images; None for images that are named by their id.
        missing_ok: Whether some of the images may be missing; they count as images that cannot be refined.

    Raises:
        InvalidInputError: If a file is malformed, an image id is unknown or ambiguous, or images are missing.
    """

    noun: ClassVar[str] = "image_id"

    def __init__(self, images: Path, predictions: Path, annotations: Path | None = None, *, missing_ok: bool = True):
        self.images, self.path, self.annotations = images.resolve(), predictions, annotations
        self._file = predictions.resolve()
        self._index = ResultsIndex(self._file)
        names = None if annotations is None else load_image_index(annotations)
        self._paths = find_images(images, self._index.image_ids, names, missing_ok=missing_ok)
        # Workers of a cluster may run in another folder.
        self._paths = {image_id: path.absolute() for image_id, path in self._paths.items()}
        self.record_count = len(self._index.ranges)

    def __len__(self) -> int:
        return len(self._index.image_ids)

    def label(self, index: int) -> ImageId:
        """The ``image_id``."""
        return self._index.image_ids[index]

    def positions(self, index: int) -> Sequence[int]:
        """Positions of the image's entries in the file."""
        return self._index.of_image(index)

    def fingerprint(self) -> dict[str, Any]:
        """Checksums of the files; of the images, their folder alone."""
        return {
            "images": str(self.images),
            "predictions": file_digest(self._file),
            "annotations": None if self.annotations is None else file_digest(self.annotations),
        }

    def load(self, index: int) -> Loaded:
        """Read the image and decode its entries."""
        path = self._paths.get(self.label(index))
        if path is None:
            raise InvalidInputError(f"expected its image in {self.images}, got none: add the file")
        photo = as_image(path)
        positions = self.positions(index)
        entries = dict(zip(positions, map(_parsed, self._read(positions)), strict=True))
        coarse = decode_instances(entries, positions, (photo.shape[1], photo.shape[2]))
        return Loaded(photo, coarse, list(entries.values()))

    def refined(self, index: int, loaded: Loaded, refined: Instances) -> list[bytes]:
        """Entries with refined segmentations, as JSON."""
        pairs = zip(loaded.entries, refined.to_rle(), strict=True)
        return [json.dumps({**entry, "segmentation": code}).encode() for entry, code in pairs]

    def unrefined(self, index: int) -> list[bytes]:
        """Entries as the file has them."""
        return self._read(self.positions(index))

    def check_target(self, output: Path) -> Path:
        """A file, which is replaced."""
        return check_output(output)

    def write(self, target: Path, records: Iterator[bytes], scratch: Path) -> None:
        """One JSON list."""
        with target.open("wb") as file:
            separator = b"["
            for record in records:
                file.write(separator)
                file.write(record)
                separator = b", "
            file.write(b"]" if self.record_count else b"[]")

    def _read(self, positions: Sequence[int]) -> list[bytes]:
        """Read the text of some entries."""
        texts = []
        with self._file.open("rb") as file:
            for position in positions:
                start, end = self._index.ranges[position].tolist()
                file.seek(start)
                texts.append(file.read(end - start))
        return texts


def _parsed(text: bytes) -> Result:
    return json.loads(text)
