"""What refinement did to the masks of a bulk job, by COCO's size classes, as sums that can be added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from transfiner_refine.evaluation.boundary import mask_iou

SIZES = (("small", 32**2), ("medium", 96**2), ("large", float("inf")))
"""COCO's classes, and the area in pixels from which each ends; here the coarse mask's area counts."""


@dataclass
class SizeSums:
    """Sums over the masks of one size class.

    Attributes:
        masks: Masks.
        area_change: Sum of (refined area - coarse area) / coarse area.
        iou: Sum of the IoU of the refined mask and its coarse mask.
        kept_coarse: Masks that were left coarse because the refined one strayed too far or promised too little.
    """

    masks: int = 0
    area_change: float = 0.0
    iou: float = 0.0
    kept_coarse: int = 0

    def add(self, other: SizeSums) -> None:
        """Add another's sums."""
        self.masks += other.masks
        self.area_change += other.area_change
        self.iou += other.iou
        self.kept_coarse += other.kept_coarse

    def means(self) -> dict[str, Any]:
        """Means over the masks, None where there are none."""
        return {
            "masks": self.masks,
            "area_change": self.area_change / self.masks if self.masks else None,
            "iou_with_coarse": self.iou / self.masks if self.masks else None,
            "kept_coarse": self.kept_coarse,
        }


@dataclass
class Figures:
    """Sums over refined images.

    Attributes:
        images: Images that were refined.
        masks: Their masks, empty ones too, which belong to no size.
        sizes: Sums by size class.
    """

    images: int = 0
    masks: int = 0
    sizes: dict[str, SizeSums] = field(default_factory=lambda: {name: SizeSums() for name, _ in SIZES})

    @classmethod
    def of_image(cls, coarse: np.ndarray, refined: np.ndarray, kept_coarse: np.ndarray) -> Figures:
        """Compare the masks of one image.

        Args:
            coarse: ``(N, H, W)`` bool.
            refined: ``(N, H, W)`` bool.
            kept_coarse: ``(N,)`` bool.
        """
        figures = cls(images=1, masks=len(coarse))
        for before, after, iou, kept in zip(coarse, refined, mask_iou(coarse, refined), kept_coarse, strict=True):
            if area := int(np.count_nonzero(before)):
                name = next(name for name, end in SIZES if area < end)
                change = np.count_nonzero(after) / area - 1
                figures.sizes[name].add(SizeSums(1, float(change), float(iou), int(kept)))
        return figures

    @classmethod
    def total(cls, parts: Iterable[Figures]) -> Figures:
        """Add up; the order of ``parts`` decides the rounding."""
        total = cls()
        for part in parts:
            total.images += part.images
            total.masks += part.masks
            for name, sums in part.sizes.items():
                total.sizes[name].add(sums)
        return total

    @property
    def kept_coarse(self) -> int:
        """Masks that were left coarse."""
        return sum(sums.kept_coarse for sums in self.sizes.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Figures:
        """Undo :meth:`to_json`."""
        return cls(value["images"], value["masks"], {name: SizeSums(**sums) for name, sums in value["sizes"].items()})
