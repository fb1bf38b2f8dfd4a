"""Training samples: one object in one fixed-size crop, at the scale that inference encodes it.

Every random choice of a sample depends on (seed, epoch, index) alone, so a run resumes exactly, with any number of
loader workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.augment import FILL, compose, photometric, warp, warp_crop
from transfiner_refine.data.composite import Composer, CompositeShares, CutOut, Scene, draw_scene, tight_box
from transfiner_refine.data.object_cache import CachedDetection, CachedObject, CropSource, ObjectCache
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.paste import crop_box_masks, crop_masks
from transfiner_refine.training.coarse import SimulatedCoarse, simulate_coarse

CROP_SIDE = 256
"""Side of the crop in pixels."""

SPAN = 216
"""Length of a RoI's long side in the crop at inference."""

NEAR_SPAN, ANY_SPAN = (196, 236), (110, 236)
"""Lengths in training, half of the samples each: as in crops, and as in whole images, where every RoI has its own."""

MAX_ROTATION = np.deg2rad(12.0)
MAX_STRETCH = 0.15

MIN_VISIBLE = 300
"""Pixels of its cut-out that an object shows at least in a composite."""


class CropSample(NamedTuple):
    """One object; the default collate function stacks each field.

    Attributes:
        image: ``(3, 256, 256)`` uint8 RGB; 127 outside of the image.
        roi: ``(4,)`` float32 xyxy, crop pixels: the coarse box grown by the margin.
        coarse: ``(side, side)`` float32 coarse mask probabilities, RoI frame; zero outside of the image.
        target: ``(2·side, 2·side)`` bool ground truth, RoI frame; false outside of the image.
        weight: ``()`` float32 weight of the object's losses.
        index: ``()`` int64 index of the object in the dataset.
    """

    image: Tensor
    roi: Tensor
    coarse: Tensor
    target: Tensor
    weight: Tensor
    index: Tensor


def init_worker(worker_id: int) -> None:
    """Keep OpenCV to one thread; the ``worker_init_fn`` of a ``DataLoader``, whose workers are the parallelism."""
    cv2.setNumThreads(0)


class _Work(NamedTuple):
    """An object in the frame in which its coarse mask was made: the cut-out itself, part of it, or a rotation of it.

    Attributes:
        truth: ``(H, W)`` float32 coverage of the ground truth.
        coarse: ``(H, W)`` float32 coarse mask, or ``(28, 28)`` float32 box-frame probabilities if ``soft``.
        soft: Whether ``coarse`` is in the box frame.
        box: ``(4,)`` float64 xyxy box of the coarse mask.
        affine: ``(2, 3)`` continuous pixels of the cut-out to continuous pixels of this frame.
    """

    truth: np.ndarray
    coarse: np.ndarray
    soft: bool
    box: np.ndarray
    affine: np.ndarray


class Draw(NamedTuple):
    """The random choices of one sample, before its pixels are drawn.

    Attributes:
        work: The object in the frame of its coarse mask.
        roi: ``(4,)`` float64 xyxy, work frame.
        placed: ``(2, 3)`` continuous pixels of the work frame to continuous pixels of the crop.
        photo: ``(H, W, 3)`` uint8 RGB, the object's photo.
        scene: What the sample is composed of, or None.
        weight: Weight of the object's losses.
        rng: Source of what else is random.
    """

    work: _Work
    roi: np.ndarray
    placed: np.ndarray
    photo: np.ndarray
    scene: Scene | None
    weight: float
    rng: np.random.Generator

    @property
    def crop_roi(self) -> np.ndarray:
        """``(4,)`` float64 xyxy, crop pixels."""
        corners = self.placed[:, :2] @ self.roi.reshape(2, 2).T + self.placed[:, 2:]  # x of both corners, then y
        return np.sort(corners, axis=1).T.reshape(4)


class CropDataset(Dataset[CropSample]):
    """Crops around the objects of one or more COCO-format datasets, with real and simulated coarse masks.

    Args:
        sources: The datasets.
        cache_dir: Where decoded cut-outs are kept; filled at first use.
        side: Cells per side of the coarse mask's RoI frame, the finest quadtree level's; the target has twice as many.
        box_margin: Share of the box side added on each of its four sides to make the RoI.
        augment: Whether place, scale, colours and boxes vary; otherwise the crop is the one of inference.
        real_share: Share of samples with a real coarse mask; an object without one always gets a simulated one.
        soft_share: Share of samples whose coarse mask is a soft 28×28 map in the box frame.
        shares: How often samples are composed of several photos; None never composes.
        stamps: Cut-outs with true alpha for the composites.
        seed: Seed of every random choice.

    Raises:
        InvalidInputError: If there is no object in ``sources``, or one of them cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[CropSource],
        cache_dir: str | Path,
        *,
        side: int = 112,
        box_margin: float = 0.125,
        augment: bool = True,
        real_share: float = 0.5,
        soft_share: float = 0.15,
        shares: CompositeShares | None = None,
        stamps: Sequence[CutOut] = (),
        seed: int = 0,
    ) -> None:
        self._caches = [ObjectCache(source, Path(cache_dir)) for source in sources]
        self._entries = [(cache, item) for cache in self._caches for item in cache.objects]
        self._kinds = [number for number, cache in enumerate(self._caches) for _ in cache.objects]
        if not self._entries:
            raise InvalidInputError(
                f"expected at least one object, got none in {[str(s.directory) for s in sources]}: lower min_area, or "
                "exclude fewer images"
            )
        self.side, self.box_margin, self.augment = side, box_margin, augment
        self.real_share, self.soft_share, self.seed = real_share, soft_share, seed
        self._composer = None
        if shares is not None:
            self._composer = Composer(len(self._entries), self._cut_out, stamps, shares, self._kinds)
        # Shared memory: persistent loader workers see the epoch that the trainer sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the random choices of the next pass over the data."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> CropSample:
        return self.sample(index, self.draw(index))

    def sample(self, index: int, draw: Draw) -> CropSample:
        """Make the sample of an object from its random choices."""
        coarse, target = self.masks(draw)
        return CropSample(
            image=self.pixels(draw, draw.placed, CROP_SIDE),
            roi=torch.from_numpy(draw.crop_roi).float(),
            coarse=coarse,
            target=target,
            weight=torch.tensor(draw.weight, dtype=torch.float32),
            index=torch.tensor(index),
        )

    def draw(self, index: int) -> Draw:
        """Make the random choices of a sample."""
        cache, item = self._entries[index]
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        scene = self._scene(index, rng)
        work = self._coarse(cache, item, scene, rng)
        roi = expand_boxes(torch.from_numpy(work.box[None]), self.box_margin)[0].numpy()
        return Draw(work, roi, self._place(roi, rng), cache.image(item), scene, cache.source.weight, rng)

    def pixels(self, draw: Draw, placed: np.ndarray, side: int) -> Tensor:
        """Draw a sample's photo.

        Args:
            draw: The sample.
            placed: ``(2, 3)`` continuous pixels of the work frame to continuous pixels of the result.
            side: Side of the result.

        Returns:
            ``(3, side, side)`` uint8 RGB.
        """
        image = self._image(draw.photo, draw.scene, compose(placed, draw.work.affine), draw.rng, side)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def masks(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Coarse probabilities ``(S, S)`` float32 and target ``(2·S, 2·S)`` bool of a sample, RoI frame."""
        coarse, target = self._roi_frame(draw.work, draw.roi)
        return (coarse.flip(1), target.flip(1)) if draw.placed[0, 0] < 0 else (coarse, target)

    def _cut_out(self, index: int) -> CutOut:
        cache, item = self._entries[index]
        return CutOut(cache.image(item), cache.coverage(item))

    def _scene(self, index: int, rng: np.random.Generator) -> Scene | None:
        """Perhaps compose the sample of several photos; not if next to nothing of the object would be seen."""
        if self._composer is None or not self.augment:
            return None
        scene = self._composer.scene(self._cut_out(index), rng, self._kinds[index])
        if scene is not None and np.count_nonzero(scene.coverage >= 128) < MIN_VISIBLE:
            return None
        return scene

    def _coarse(self, cache: ObjectCache, item: CachedObject, scene: Scene | None, rng: np.random.Generator) -> _Work:
        """Choose and make the object's coarse mask."""
        real, soft = rng.random() < self.real_share, rng.random() < self.soft_share
        # A real mask knows nothing of what was pasted; before another background it may stay.
        if real and item.detections and (scene is None or (scene.is_own and not scene.layers)):
            number = int(rng.integers(len(item.detections))) if self.augment else 0
            return self._real(cache, item, item.detections[number], soft, rng)
        if scene is None:
            coverage, box, neighbour = cache.coverage(item), np.array(item.box), None
        else:
            coverage, neighbour = scene.coverage, scene.neighbour if scene.neighbour.any() else None
            box = tight_box(coverage).astype(float)
        affine, size = self._window(coverage.shape, box, rng)
        truth = self._cut(coverage, affine, size).astype(np.float32) / 255
        if not (truth >= 0.5).any():  # an object thinner than a pixel of its cut-out
            truth = (truth >= truth.max()).astype(np.float32)
        other = None if neighbour is None else self._cut(neighbour, affine, size) >= 128
        return self._simulated(truth, simulate_coarse(truth >= 0.5, rng, neighbour=other), affine, soft, rng)

    def _real(
        self, cache: ObjectCache, item: CachedObject, found: CachedDetection, soft: bool, rng: np.random.Generator
    ) -> _Work:
        box = np.array(found.box)
        soft = soft and found.soft_offset is not None
        if soft and found.soft_offset is not None:
            plane = cache.read(found.soft_offset, (ROOT_SIDE, ROOT_SIDE))
        else:
            plane = cache.read(found.offset, item.size)
            box = self._jitter(box, rng)
        scaled = [p.astype(np.float32) / 255 for p in (cache.coverage(item), plane)]
        return _Work(scaled[0], scaled[1], soft, box, np.eye(2, 3))

    def _simulated(
        self, truth: np.ndarray, made: SimulatedCoarse, affine: np.ndarray, soft: bool, rng: np.random.Generator
    ) -> _Work:
        box = made.box.astype(float)
        if soft:
            return _Work(truth, made.soft, True, box, affine)
        return _Work(truth, made.mask.astype(np.float32), False, self._jitter(box, rng), affine)

    def _jitter(self, box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Move each side a little: annotators and trackers hand boxes that differ from the mask's own."""
        if not self.augment:
            return box
        return box + np.clip(rng.laplace(scale=0.012, size=4), -0.06, 0.06) * np.tile(box[2:] - box[:2], 2)

    def _window(
        self, frame: tuple[int, ...], box: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Part of the cut-out with context enough for leaks and generous boxes, sometimes rotated.

        Returns:
            The ``(2, 3)`` map from the cut-out to it, and its ``(H, W)``.
        """
        centre, reach = (box[:2] + box[2:]) / 2, 0.5 * (box[2:] - box[:2])
        angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION) if self.augment and rng.random() < 0.3 else 0.0
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        extent = (np.abs(turn) @ reach) * 1.5 + 4
        if angle == 0.0:
            # A plain cut keeps the image's border, where masks and boxes end.
            low = np.maximum(np.floor(centre - extent), 0).astype(int)
            high = np.minimum(np.ceil(centre + extent), frame[::-1]).astype(int)
            return np.column_stack([np.eye(2), -low]), (int(high[1] - low[1]), int(high[0] - low[0]))
        width, height = np.ceil(2 * extent).astype(int).tolist()
        return np.column_stack([turn, extent - turn @ centre]), (height, width)

    def _cut(self, plane: np.ndarray, affine: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A window of a plane of the cut-out."""
        if (affine[:, :2] == np.eye(2)).all():
            x, y = (-affine[:, 2]).astype(int)
            return plane[y : y + size[0], x : x + size[1]]
        return warp(plane, affine, size, 0)

    def _place(self, roi: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Affine map from the work frame to the crop; the RoI's long side takes ``SPAN`` pixels at inference."""
        size, centre = roi[2:] - roi[:2], (roi[:2] + roi[2:]) / 2
        span, stretch, flip, shift = float(SPAN), np.ones(2), 1.0, np.zeros(2)
        if self.augment:
            span = rng.uniform(*(NEAR_SPAN if rng.random() < 0.5 else ANY_SPAN))
            if rng.random() < 0.3:
                ratio = np.exp(rng.uniform(-MAX_STRETCH, MAX_STRETCH) / 2)
                stretch = np.array([ratio, 1 / ratio])
            flip = rng.choice([-1.0, 1.0])
        scale = stretch * span / float((size * stretch).max())
        if self.augment:
            # The RoI stays inside the crop but for a few pixels.
            shift = rng.uniform(-1, 1, 2) * (CROP_SIDE - size * scale + 8) / 2
        scale = scale * np.array([flip, 1.0])
        return np.column_stack([np.diag(scale), CROP_SIDE / 2 + shift - scale * centre])

    def _image(
        self, image: np.ndarray, scene: Scene | None, affine: np.ndarray, rng: np.random.Generator, side: int
    ) -> np.ndarray:
        """Crop and, in training, change the colours; ``(side, side, 3)`` uint8."""
        if scene is not None:
            crop = photometric(draw_scene(scene, affine, side, rng), rng)
            if scene.background is not None:  # it has no end within the crop
                return crop
        else:
            crop = warp_crop(image, affine, (side, side))
            if not self.augment:
                return crop
            crop = photometric(crop, rng)
        inside = warp(np.ones(image.shape[:2], np.uint8), affine, (side, side), 0)
        crop[inside == 0] = FILL  # outside of the image stays the encoder's zero
        return crop

    def _roi_frame(self, work: _Work, roi: np.ndarray) -> tuple[Tensor, Tensor]:
        """Coarse probabilities ``(side, side)`` float32 and target ``(2·side, 2·side)`` bool."""
        rois = torch.from_numpy(roi[None]).float()
        target = crop_masks(torch.from_numpy(work.truth)[None], rois, 2 * self.side)[0] >= 0.5
        plane = torch.from_numpy(work.coarse)[None]
        if work.soft:
            coarse = crop_box_masks(plane, torch.from_numpy(work.box[None]).float(), rois, self.side)
        else:
            coarse = crop_masks(plane, rois, self.side)
        return coarse[0], target
