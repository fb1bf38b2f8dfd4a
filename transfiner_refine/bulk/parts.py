"""The finished part of a bulk job: a folder of shards beside the output, from which a killed job goes on.

A shard holds a fixed number of images, so that neither its content nor the output depends on where a job was
interrupted. It is a line of JSON (what each record takes, what was skipped, the figures), and then the records.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from transfiner_refine.bulk.figures import Figures
from transfiner_refine.bulk.source import Source
from transfiner_refine.bulk.work import Outcome
from transfiner_refine.data.coco import load_json, write_atomic, write_json_atomic
from transfiner_refine.errors import InvalidInputError

MANIFEST = "manifest.json"
LOCK = "lock"


def pack(outcomes: Sequence[Outcome]) -> bytes:
    """Make the content of a shard."""
    header = {
        "lengths": [[len(record) for record in outcome.records] for outcome in outcomes],
        "skipped": [[outcome.index, outcome.skipped] for outcome in outcomes if outcome.skipped is not None],
        "figures": Figures.total(outcome.figures for outcome in outcomes).to_json(),
    }
    return b"".join([json.dumps(header).encode(), b"\n", *(x for outcome in outcomes for x in outcome.records)])


@dataclass(frozen=True)
class Header:
    """What a shard says of itself.

    Attributes:
        lengths: Bytes of each record, by image.
        skipped: Number of each skipped image, and why.
        figures: Sums over the other images.
        end: First byte of the first record.
    """

    lengths: list[list[int]]
    skipped: list[tuple[int, str]]
    figures: Figures
    end: int


class Parts:
    """The folder ``OUTPUT.parts``.

    Args:
        output: The job's output.
        source: Its images.
        shard_images: Images of a shard; the last may have fewer.
    """

    def __init__(self, output: Path, source: Source, shard_images: int):
        self.folder = output.with_name(f"{output.name}.parts")
        self.source = source
        self.shard_images = shard_images
        # Held by the process, not by the file: what a killed job leaves is free.
        self._lock = FileLock(self.folder / LOCK)
        self.shards = range(-(-len(source) // shard_images))

    def open(self, manifest: dict[str, Any]) -> None:
        """Make the folder, or go on with the one that is there.

        Args:
            manifest: What makes the job what it is, in plain JSON values.

        Raises:
            InvalidInputError: If the folder is of another job, the message says in what they differ; if another process
                works on it; or if it is damaged, or cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InvalidInputError(
                f"expected one job at a time in {self.folder}, got another process that works on it: wait for it, or "
                "give another --output"
            ) from None
        except OSError as error:
            raise InvalidInputError(
                f"expected the folder {self.folder} for what is finished, got: {error.strerror}; remove what is there, "
                "or give another --output"
            ) from error
        try:
            self._open(manifest)
        except InvalidInputError:
            self._lock.release()
            raise

    def _open(self, manifest: dict[str, Any]) -> None:
        found = self._manifest()
        if found is not None:
            if differences := _differences(found, manifest):
                raise InvalidInputError(
                    f"expected the unfinished job in {self.folder} to be this one, got another: {differences}; delete "
                    "that folder to start anew, or give another --output"
                )
            return
        # What was killed while it wrote the manifest has left a temporary file.
        if any(path.suffix != ".tmp" and path.name != LOCK for path in self.folder.iterdir()):
            raise InvalidInputError(
                f"expected an unfinished job in {self.folder}, got a folder without {MANIFEST}: move it away"
            )
        write_json_atomic(self.folder / MANIFEST, manifest)

    def _manifest(self) -> dict[str, Any] | None:
        """Read the manifest; None if there is no unfinished job."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        try:
            found = load_json(path)
        except InvalidInputError:
            found = None
        if not isinstance(found, dict):
            raise InvalidInputError(
                f"expected the description of an unfinished job in {path}, got a damaged file: delete {self.folder} to "
                "start anew, or give another --output"
            )
        return found

    def recorded(self, name: str) -> Any:
        """Look up a value of the manifest; None if there is no unfinished job.

        Raises:
            InvalidInputError: If the manifest is damaged.
        """
        return (self._manifest() or {}).get(name)

    def images_of(self, shard: int) -> range:
        """Numbers of a shard's images."""
        start = shard * self.shard_images
        return range(start, min(start + self.shard_images, len(self.source)))

    def pending(self) -> list[int]:
        """Shards that are not finished."""
        return [shard for shard in self.shards if not self._path(shard).is_file()]

    def finished(self) -> list[int]:
        """Shards that are finished."""
        return [shard for shard in self.shards if self._path(shard).is_file()]

    def add(self, shard: int, content: bytes) -> None:
        """Keep a finished shard: whole, or not at all."""
        write_atomic(self._path(shard), content)

    def remove(self) -> None:
        """Remove the folder; the manifest last, so that a removal that is interrupted can be repeated."""
        self._lock.release()
        for path in self.folder.iterdir():
            if path.name != MANIFEST:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.folder)

    def leave(self) -> None:
        """Let another job go on; leave no folder behind that holds no work."""
        self._lock.release()
        if self.folder.is_dir() and len(self.pending()) == len(self.shards):
            shutil.rmtree(self.folder)

    def headers(self, shards: Iterable[int]) -> Iterator[Header]:
        """Read the headers of finished shards.

        Raises:
            InvalidInputError: If a shard is damaged.
        """
        return map(self._header, shards)

    def _header(self, shard: int) -> Header:
        path, images = self._path(shard), self.images_of(shard)
        try:
            with path.open("rb") as file:
                line = file.readline()
                size = os.fstat(file.fileno()).st_size
            value = json.loads(line)
            skipped = [(index, reason) for index, reason in value["skipped"]]
            header = Header(value["lengths"], skipped, Figures.from_json(value["figures"]), len(line))
            counts = [len(self.source.positions(index)) for index in images]
            if list(map(len, header.lengths)) != counts or header.end + sum(map(sum, header.lengths)) != size:
                raise ValueError("other records than the header says")
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InvalidInputError(
                f"expected a whole shard of {len(images)} images in {path}, got a damaged file: delete it, and its "
                "images are refined again"
            ) from error
        return header

    def assemble(self, output: Path) -> None:
        """Write the output from the finished shards; it takes its place when it is complete.

        Raises:
            InvalidInputError: If the output cannot be written, as on a full disk, or a shard is damaged.
        """
        count = self.source.record_count
        shard_of, starts = np.zeros(count, np.int64), np.zeros(count, np.int64)
        lengths = np.zeros(count, np.int64)
        for shard, header in enumerate(self.headers(self.shards)):
            start = header.end
            for index, sizes in zip(self.images_of(shard), header.lengths, strict=True):
                for position, size in zip(self.source.positions(index), sizes, strict=True):
                    shard_of[position], starts[position], lengths[position] = shard, start, size
                    start += size

        def records() -> Iterator[bytes]:
            for shard, positions in groupby(range(count), shard_of.__getitem__):
                with self._path(shard).open("rb") as file:
                    for position in positions:
                        file.seek(starts[position])
                        yield file.read(lengths[position])

        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # of an assembly that was interrupted
        target = scratch / "output"
        try:
            scratch.mkdir()
            self.source.write(target, records(), scratch)
            os.replace(target, output)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise InvalidInputError(
                f"expected to write {output}, got: {error.strerror or error}; mend that, and the same command goes on "
                f"from {self.folder}"
            ) from error

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:06}"


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Name what differs between two manifests, with the values where these are short."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]

    def described(name: str) -> str:
        pair = f"{found.get(name)!r} instead of {expected.get(name)!r}"
        return f"{name} ({pair})" if len(pair) < 80 else name

    return ", ".join(map(described, names))
