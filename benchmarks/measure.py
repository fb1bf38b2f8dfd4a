"""Judging methods side by side: on the same photos, by the same figures, with their time and memory."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
from dataset import MatchedSet
from methods import Coarse, Method, start_from
from rich.console import Console
from rich.progress import track
from scaling import process_memory, reset_peak
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation import PairedFigures, boundary_iou, figures_from_scores, mask_iou

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1 << 62)}
"""Areas of the ground truth in pixels, from (inclusive) and to, as COCO splits them."""

MEMORY_PHOTOS = 5
"""Photos on which memory is measured: the first of a set on which an object was found."""


@dataclass
class Scores:
    """What one method reached, instance by instance.

    Attributes:
        ious: Mask IoU of the instances of each photo.
        boundary_ious: Boundary IoU of the instances of each photo.
        seconds: Time of all calls, on the clock.
        processor_seconds: Time of all calls that processors worked; other programs disturb it less.
        peak: Most bytes that a call added to the process, its result included; None where that is not known.
    """

    ious: list[np.ndarray] = field(default_factory=list)
    boundary_ious: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak: int | None = None

    @property
    def count(self) -> int:
        """Instances."""
        return sum(map(len, self.ious))

    def figures(self, coarse: Scores, chosen: np.ndarray | None = None) -> PairedFigures:
        """Compare with the coarse masks.

        Args:
            coarse: Scores of the coarse masks.
            chosen: ``(N,)`` bool, the instances that count; None takes all.
        """
        columns = [coarse.ious, self.ious, coarse.boundary_ious, self.boundary_ious]
        scores = [np.concatenate(column) for column in columns]
        return figures_from_scores(*(x if chosen is None else x[chosen] for x in scores))


@dataclass(frozen=True)
class Result:
    """All methods on one set.

    Attributes:
        scores: By method; ``coarse`` is what the masks were before.
        areas: ``(N,)`` int64, pixels of each instance's ground truth.
    """

    scores: dict[str, Scores]
    areas: np.ndarray

    def of_size(self, size: str) -> np.ndarray:
        """``(N,)`` bool: the instances of a size."""
        low, high = SIZES[size]
        return (self.areas >= low) & (self.areas < high)

    def to_json(self) -> dict[str, dict]:
        """All figures by method."""
        coarse = self.scores["coarse"]
        return {
            method: {
                **asdict(score.figures(coarse)),
                "seconds_per_instance": score.seconds / score.count,
                "processor_seconds_per_instance": score.processor_seconds / score.count,
                "peak_bytes": score.peak,
                "by_size": {size: asdict(score.figures(coarse, self.of_size(size))) for size in SIZES},
            }
            for method, score in self.scores.items()
        }


def measure(
    samples: MatchedSet,
    methods: dict[str, Method],
    coarse: Coarse,
    dilation: float,
    console: Console,
    with_memory: bool = False,
) -> Result:
    """Run every method on every photo.

    Args:
        samples: The photos.
        methods: By name.
        coarse: The masks that they start from.
        dilation: Boundary's width as a share of the image diagonal.
        console: Shows the progress.
        with_memory: Whether the first photos are run once more, to measure memory.

    Raises:
        InvalidInputError: If no detection matches any object.
    """
    scores = {name: Scores() for name in ("coarse", *methods)}
    areas = []
    for matched in track(samples, "Refining", total=len(samples), console=console, transient=True):
        sample = start_from(matched, coarse)
        if not areas:  # the first call of a library is not its speed
            for method in methods.values():
                method(sample)
        results = {"coarse": sample.coarse}
        for name, method in methods.items():
            wall, processor = time.perf_counter(), time.process_time()
            results[name] = method(sample)
            scores[name].seconds += time.perf_counter() - wall
            scores[name].processor_seconds += time.process_time() - processor
            if with_memory and len(areas) < MEMORY_PHOTOS:
                peak = added_memory(partial(method, sample))
                scores[name].peak = None if peak is None else max(peak, scores[name].peak or 0)
        for name, masks in results.items():
            scores[name].ious.append(mask_iou(masks, sample.truth))
            scores[name].boundary_ious.append(boundary_iou(masks, sample.truth, dilation))
        areas.append(np.count_nonzero(sample.truth, axis=(1, 2)))
    if not areas:
        raise InvalidInputError(
            f"expected detections that match an object of {samples.folder}, got none among {len(samples)} photos"
        )
    return Result(scores, np.concatenate(areas))


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count floating-point operations, those of attention too: the fused kernel of CPUs not every torch counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def added_memory(call: Callable[[], object]) -> int | None:
    """Bytes that a call adds to the process at its peak, its result included; None where that cannot be read."""
    if sys.platform != "linux":
        return None
    # Freed memory that the C library keeps would count as held before the call.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = reset_peak()
    call()
    return process_memory("VmHWM") - before
