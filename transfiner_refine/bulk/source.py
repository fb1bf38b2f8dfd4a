"""What a bulk job reads and writes: images, their coarse masks, and the same thing again with refined masks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from transfiner_refine.types import Instances


@dataclass(frozen=True, eq=False)
class Loaded:
    """One image, ready to be refined.

    Attributes:
        photo: ``(3, H, W)`` uint8 or float RGB.
        coarse: Its N coarse instances.
        entries: Whatever the source needs to write their records.
    """

    photo: Tensor
    coarse: Instances
    entries: Any = None


class Source(ABC):
    """Images with coarse masks, numbered from 0, and where the refined masks go.

    A *record* is one mask as bytes, and all that belongs to it. Records have positions, in the order of the output;
    those of one image need not be neighbours. A source is pickled for the workers of a cluster: it holds where things
    are, not the things.

    Attributes:
        noun: What an image's label is, as ``image_id``.
        path: Where the coarse masks are; errors name it.
        record_count: Records of all images.
    """

    noun: ClassVar[str]
    path: Path
    record_count: int

    @abstractmethod
    def __len__(self) -> int:
        """Count the images."""

    @abstractmethod
    def label(self, index: int) -> int | str:
        """Name an image as the user knows it."""

    @abstractmethod
    def positions(self, index: int) -> Sequence[int]:
        """Positions of an image's N records."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Describe the input in plain JSON values: a job goes on only with an input of the same description."""

    @abstractmethod
    def load(self, index: int) -> Loaded:
        """Read one image and its coarse masks; called by several threads at once.

        Raises:
            InvalidInputError: If the image cannot be refined: it or a mask is missing or damaged.
        """

    @abstractmethod
    def refined(self, index: int, loaded: Loaded, refined: Instances) -> list[bytes]:
        """Make the N records of a refined image."""

    @abstractmethod
    def unrefined(self, index: int) -> list[bytes]:
        """Make the N records of an image that could not be refined: what came, as it came."""

    @abstractmethod
    def check_target(self, output: Path) -> Path:
        """Make sure that the output can be written, before the work that it waits for.

        Returns:
            The path with links resolved.

        Raises:
            InvalidInputError: If it cannot.
        """

    @abstractmethod
    def write(self, target: Path, records: Iterator[bytes], scratch: Path) -> None:
        """Write the whole output, in a stream.

        Args:
            target: File or folder, which does not exist; it is moved to its place when complete.
            records: All records in the order of their positions.
            scratch: Existing folder for what is needed on the way.
        """


def stat_digest(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of what the file system says of files: names relative to ``folder``, sizes and times of change."""
    digest = hashlib.sha256()
    for path in files:
        state = path.stat()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
