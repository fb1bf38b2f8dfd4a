"""One bulk job from its source to its output."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from transfiner_refine.bulk.figures import Figures
from transfiner_refine.bulk.parts import Parts, pack
from transfiner_refine.bulk.source import file_digest
from transfiner_refine.bulk.work import Work
from transfiner_refine.data.coco import write_json_atomic
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.files import CONFIG, WEIGHTS
from transfiner_refine.modeling.hub import find_model

SHARD_IMAGES = 64
"""Images of a shard: what a killed job does again, at most once per worker."""

Advance = Callable[[int], None]
"""Called with the number of images that are finished."""


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        images: Images, skipped ones included.
        masks: Masks of all images.
        figures: What refinement did to those that were refined.
        skipped: Label of each image that could not be refined, and why.
        noun: What these labels are, as ``image_id``.
        resumed: Images that an earlier, interrupted run had finished.
        seconds: Time that the others took.
    """

    images: int
    masks: int
    figures: Figures
    skipped: list[tuple[int | str, str]]
    noun: str
    resumed: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Speed of this run."""
        return (self.images - self.resumed) / self.seconds if self.seconds else 0.0

    def skipped_entries(self) -> list[dict[str, Any]]:
        """One object for each skipped image: its label, and the reason."""
        return [{self.noun: label, "reason": reason} for label, reason in self.skipped]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        refined = self.figures.masks
        return {
            "images": self.images,
            "masks": self.masks,
            "refined_images": self.figures.images,
            "skipped_images": len(self.skipped),
            "kept_coarse": self.figures.kept_coarse,
            "kept_coarse_share": self.figures.kept_coarse / refined if refined else None,
            "sizes": {name: sums.means() for name, sums in self.figures.sizes.items()},
            "resumed_images": self.resumed,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "skipped": self.skipped_entries(),
        }


def skipped_path(output: Path) -> Path:
    """The file that lists the images that could not be refined."""
    return output.with_name(f"{output.name}.skipped.json")


def run(
    work: Work,
    output: Path,
    *,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    shard_images: int = SHARD_IMAGES,
    begin: Callable[[int, int], None] = lambda finished, total: None,
    advance: Advance = lambda images: None,
) -> Summary:
    """Refine all images of a source, and write the output.

    A job that was interrupted goes on from its last finished shard, and comes to the same output. Images that could not
    be refined are in it as they came, and are listed in ``OUTPUT.skipped.json``.

    Args:
        work: What to refine, and how; its ``threads`` are set here.
        output: File or folder to write.
        engine: ``"local"``, this process, or ``"ray"``, the workers of a Ray cluster.
        address: Of the cluster, ``"auto"`` for the one that this machine is part of; None starts one here.
        workers: Refiners of the cluster; None for as many as it has room for.
        threads: Threads of each refiner; None for those of the job that goes on, or else torch's own number.
        shard_images: Images of a shard.
        begin: Called once with the images that are finished, and with all.
        advance: Called with the images that were finished since.

    Returns:
        What was done.

    Raises:
        TransfinerError: If an input, the model, the output or an option is of no use, the unfinished job beside the
            output is another or damaged, an image cannot be refined in a strict job, or not one could be refined.
    """
    source = work.source
    output = source.check_target(output)
    parts = Parts(output, source, shard_images)
    work = replace(work, threads=threads or parts.recorded("threads") or torch.get_num_threads())
    # Cluster workers load their own; here it is made sure that they can, without the device that only they may have.
    refiner = (work if engine == "local" else replace(work, device=None)).load_refiner()
    parts.open(manifest(work, shard_images))
    try:
        _check_finished(work, parts)
        pending = parts.pending()
        left = sum(len(parts.images_of(shard)) for shard in pending)
        begin(len(source) - left, len(source))
        start = time.perf_counter()
        if engine == "ray":
            from transfiner_refine.bulk.ray_engine import shards_on_ray

            finished = shards_on_ray(work, parts, pending, address, workers)
        else:
            finished = _shards_here(work, refiner, parts, pending, advance)
        for shard, content in finished:
            parts.add(shard, content)
            return_free_memory()
            if engine == "ray":
                advance(len(parts.images_of(shard)))
        summary = _summary(work, parts, len(source) - left, time.perf_counter() - start)
        parts.assemble(output)
    except BaseException:
        parts.leave()
        raise
    _list_skipped(summary, output)
    parts.remove()
    return summary


def return_free_memory() -> None:
    """Give freed memory back to the system, where the C library is one that keeps it.

    glibc has a heap for each thread. Masks that one thread allocates and another frees leave holes in them, which grow
    with the number of images.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def manifest(work: Work, shard_images: int) -> dict[str, Any]:
    """Describe a job: two of the same description have the same output, on CPUs of one kind."""
    model = find_model(work.model)
    return {
        "format": 1,
        **work.source.fingerprint(),
        "model": [file_digest(model / name) for name in (CONFIG, WEIGHTS)],
        "versions": [version("transfiner-refine"), torch.__version__],
        "device": str(torch.device(work.device or "cpu").type),
        "threads": work.threads,
        "shard_images": shard_images,
        **asdict(work.options),
    }


def _shards_here(work: Work, refiner: Any, parts: Parts, pending: list[int], advance: Advance) -> Iterator[Any]:
    """Refine the shards one after the other, without a pause between them."""
    outcomes = work.run(refiner, (index for shard in pending for index in parts.images_of(shard)))
    for shard in pending:
        finished = []
        for outcome in islice(outcomes, len(parts.images_of(shard))):
            finished.append(outcome)
            advance(1)
        yield shard, pack(finished)


def _check_finished(work: Work, parts: Parts) -> None:
    """Make sure that what an earlier run has finished is whole and, in a strict job, has no skipped image."""
    for header in parts.headers(parts.finished()):
        if work.strict and header.skipped:
            source, (index, reason) = work.source, header.skipped[0]
            raise InvalidInputError(
                f"{source.path}, {source.noun} {source.label(index)!r}: {reason}; skipped by an earlier run: "
                f"mend it and delete {parts.folder} to start anew, or leave out --strict"
            )


def _summary(work: Work, parts: Parts, resumed: int, seconds: float) -> Summary:
    source = work.source
    headers = list(parts.headers(parts.shards))
    skipped = [(source.label(index), reason) for header in headers for index, reason in header.skipped]
    if skipped and len(skipped) == len(source):
        label, reason = skipped[0]
        parts.remove()
        raise InvalidInputError(
            f"expected at least one image of {source.path} that can be refined, got none of {len(source)}; the first, "
            f"{source.noun} {label!r}: {reason}"
        )
    figures = Figures.total(header.figures for header in headers)
    return Summary(len(source), source.record_count, figures, skipped, source.noun, resumed, seconds)


def _list_skipped(summary: Summary, output: Path) -> None:
    """Write the list, or remove that of an earlier job."""
    path = skipped_path(output)
    if summary.skipped:
        write_json_atomic(path, summary.skipped_entries())
    elif path.exists():
        os.unlink(path)
