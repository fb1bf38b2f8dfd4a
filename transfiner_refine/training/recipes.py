"""How the paper trained: its data sets, batches and learning rates as ready configuration.

Mask Transfiner, implementation details (Sec. 4 and supplementary material).

    recipe = RECIPES["cityscapes"]
    dataset = load_dataset(recipe.layout, root, "train")
    optimizer = recipe.optimizer(model.parameters())
    schedule = recipe.schedule(optimizer, images=len(dataset))  # schedule.step() after each update
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from transfiner_refine.data.datasets import Layout
from transfiner_refine.errors import InvalidInputError


@dataclass(frozen=True)
class Recipe:
    """One training schedule; ``dataclasses.replace`` changes a part of it.

    Attributes:
        layout: Layout of the data set, for :func:`~transfiner_refine.data.datasets.load_dataset`.
        batch_size: Images of an update, on all devices together.
        learning_rate: Of the first phase; each further phase has a tenth of the one before.
        phases: Length of each phase.
        unit: What the phases count.
        short_sides: Lengths of the image's shorter side, in pixels; training draws one for each image.
        long_side: Longest side: an image that would exceed it is made smaller, its shape kept.
        test_short_side: Shorter side at inference.
        flip: Probability of a horizontal flip.
        momentum: Of SGD.
        weight_decay: Of SGD.
        warmup_updates: Updates at the start at ``warmup_factor`` times the learning rate.
        warmup_factor: The same factor throughout.

    Raises:
        InvalidInputError: If a value is out of its range.

    Note:
        The paper's warm-up is constant and its factor is not given: that of Detectron2, on which the released code
        stands, is a thousandth. The sides of COCO, and the longest sides, are those of the released configuration files
        too; at BDD100K, whose images are 1280×720, none exceeds 1280.
    """

    layout: Layout
    batch_size: int
    learning_rate: float
    phases: tuple[int, ...]
    unit: Literal["updates", "epochs"] = "updates"
    short_sides: tuple[int, ...] = tuple(range(640, 801, 32))
    long_side: int = 1333
    test_short_side: int = 800
    flip: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_updates: int = 1000
    warmup_factor: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "long_side", "test_short_side"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"expected {name} above 0, got {getattr(self, name)}")
        for name in ("phases", "short_sides"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise InvalidInputError(f"expected {name} as one or more integers of at least 1, got {values}")
        if self.unit not in ("updates", "epochs"):
            raise InvalidInputError(f'expected unit "updates" or "epochs", got {self.unit!r}')
        if not 0 <= self.flip <= 1:
            raise InvalidInputError(f"expected flip from 0 to 1, a probability, got {self.flip}")

    def phase_ends(self, images: int | None = None) -> tuple[int, ...]:
        """Updates after which each phase is over; the last is the length of the training.

        Args:
            images: Images of the training set, which epochs need.

        Raises:
            InvalidInputError: If the phases count epochs and ``images`` is missing.
        """
        ends = accumulate(self.phases)
        if self.unit == "updates":
            return tuple(ends)
        if images is None:
            raise InvalidInputError("expected the number of training images with phases in epochs, got None")
        return tuple(math.ceil(end * images / self.batch_size) for end in ends)

    def learning_rate_at(self, update: int, images: int | None = None) -> float:
        """Learning rate of an update, counted from 0; after the last phase, that of the last phase.

        Args:
            update: Updates made before it.
            images: As for :meth:`phase_ends`.
        """
        return self.learning_rate * self._factor(update, self.phase_ends(images))

    def _factor(self, update: int, ends: tuple[int, ...]) -> float:
        if update < self.warmup_updates:
            return self.warmup_factor
        return 0.1 ** bisect_right(ends[:-1], update)

    def optimizer(self, parameters: Iterable[Any]) -> SGD:
        """The optimizer at the first phase's learning rate.

        Args:
            parameters: Parameters, or groups of them as torch takes them; a group's own ``lr`` follows the schedule.
        """
        return SGD(parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)

    def schedule(self, optimizer: Optimizer, images: int | None = None) -> LambdaLR:
        """The schedule of the optimizer's learning rates, to be stepped after each update.

        Args:
            optimizer: As :meth:`optimizer` makes it.
            images: As for :meth:`phase_ends`.
        """
        ends = self.phase_ends(images)
        return LambdaLR(optimizer, lambda update: self._factor(update, ends))


RECIPES = {
    "coco": Recipe("coco", batch_size=16, learning_rate=0.02, phases=(60_000, 20_000, 10_000)),
    "coco-ablation": Recipe("coco", batch_size=8, learning_rate=0.01, phases=(8, 3, 1), unit="epochs"),
    "cityscapes": Recipe(
        "cityscapes",
        batch_size=8,
        learning_rate=0.01,
        phases=(18_000, 6_000),
        short_sides=tuple(range(800, 1025, 32)),
        long_side=2048,
        test_short_side=1024,
    ),
    "bdd100k": Recipe(
        "bdd100k",
        batch_size=16,
        learning_rate=0.02,
        phases=(22_000, 4_000, 4_000),
        short_sides=tuple(range(600, 721, 24)),
        long_side=1280,
        test_short_side=720,
    ),
}
"""The paper's schedules: for its results on COCO, Cityscapes and BDD100K, and the 12 epochs of its ablations."""
