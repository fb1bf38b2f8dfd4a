"""Refining in a stream: while the refiner works, threads read the next images and encode the last masks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from transfiner_refine.bulk.figures import Figures
from transfiner_refine.bulk.source import Loaded, Source
from transfiner_refine.config import RefineOptions
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.refiner import Refiner
from transfiner_refine.threads import torch_threads
from transfiner_refine.types import Instances

THREADS = 4
"""Threads that read and encode."""

AHEAD = 2
"""Images that wait at most before the refiner, and behind it."""

PRIMITIVES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
"""What oneDNN keeps of the shapes that it has met, unless the environment says otherwise; by default a thousand.

Nearly every photo brings new ones, and each is a piece of code that stays in memory. It is read when torch computes its
first convolution.
"""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one image.

    Attributes:
        index: Number of the image.
        records: Its records, refined or as they came.
        figures: What refinement did; nothing for a skipped image.
        skipped: Why it could not be refined; None if it was.
    """

    index: int
    records: list[bytes]
    figures: Figures
    skipped: str | None = None


@dataclass(frozen=True)
class Work:
    """What it takes to refine the images of a source; can be pickled.

    Attributes:
        source: The images.
        options: Choices of each call.
        model: Directory or Hub id of the refiner; None for the embedded one.
        device: Torch device; None for the CPU.
        threads: Threads that torch computes with, on which the last bits of its results depend.
        strict: Whether an image that cannot be refined is an error.
    """

    source: Source
    options: RefineOptions
    model: str | None = None
    device: str | None = None
    threads: int = 1
    strict: bool = False

    def load_refiner(self) -> Refiner:
        """Load the refiner, and make sure that it can do what is asked for.

        Raises:
            TransfinerError: If there is no such model, device or depth, or the model takes no images.
        """
        os.environ.setdefault(*PRIMITIVES)
        refiner = load_refiner(self.model, self.device)
        nothing = np.empty((0, 1, 1), bool)
        refiner.refine(np.zeros((1, 1, 3), np.uint8), boxes=np.empty((0, 4)), masks=nothing, options=self.options)
        return refiner

    def run(self, refiner: Refiner, indices: Iterable[int]) -> Iterator[Outcome]:
        """Refine images, each by itself: an outcome depends on no other image.

        Args:
            refiner: What :meth:`load_refiner` returned.
            indices: Numbers of the images.

        Yields:
            The outcomes in the order of ``indices``. At most about eight images are held with their masks.

        Raises:
            InvalidInputError: If ``strict`` and an image cannot be refined.
        """
        with (
            torch_threads(self.threads),
            ThreadPoolExecutor(THREADS, thread_name_prefix="transfiner") as pool,
        ):
            loaded = in_order(pool, self._load, indices)
            refined = (self._refine(refiner, *item) for item in loaded)
            yield from in_order(pool, self._encode, refined)

    def _load(self, index: int) -> tuple[int, Loaded | InvalidInputError]:
        try:
            return index, self.source.load(index)
        except InvalidInputError as error:
            return index, error

    def _refine(
        self, refiner: Refiner, index: int, loaded: Loaded | InvalidInputError
    ) -> tuple[int, Loaded | None, Instances | InvalidInputError]:
        if isinstance(loaded, InvalidInputError):
            return index, None, loaded
        try:
            coarse = loaded.coarse
            refined = refiner.refine(loaded.photo, boxes=coarse.boxes, masks=coarse.masks, options=self.options)
            return index, loaded, refined.to("cpu")
        except InvalidInputError as error:
            return index, None, error

    def _encode(self, item: tuple[int, Loaded | None, Instances | InvalidInputError]) -> Outcome:
        index, loaded, refined = item
        if loaded is None or isinstance(refined, InvalidInputError):
            if self.strict:
                source = self.source
                raise InvalidInputError(f"{source.path}, {source.noun} {source.label(index)!r}: {refined}")
            return Outcome(index, self.source.unrefined(index), Figures(), str(refined))
        coarse = loaded.coarse.masks
        if coarse.dtype != torch.bool:
            coarse = coarse >= self.options.mask_threshold
        kept = refined.kept_coarse
        kept = np.zeros(len(refined), bool) if kept is None else kept.numpy()
        figures = Figures.of_image(coarse.numpy(force=True), refined.masks.numpy(), kept)
        return Outcome(index, self.source.refined(index, loaded, refined), figures)


def load_refiner(model: str | None, device: str | None) -> Refiner:
    """Load a refiner, as :meth:`Refiner.from_pretrained` does, for a device named by the user.

    Raises:
        TransfinerError: If there is no such model or device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device it does not know, or lacks
        reason = str(error).splitlines()[0]
        raise InvalidInputError(f"expected a device that torch has here, as cpu, got {device!r}: {reason}") from error
    return Refiner.from_pretrained(model, device=device)


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Apply a function to each item in threads; results come in order, and items are taken as they are needed."""
    pending: deque[Future[U]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        while len(pending) > AHEAD or (pending and pending[0].done()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
