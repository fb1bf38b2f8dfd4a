"""Composites: objects of other photos in front of, behind, and beside an object, and other photos as its background.

A few thousand annotated objects show few touching neighbours, thin occluders and cluttered backgrounds. Pasting
cut-outs makes as many as one likes, with labels as exact as their alpha.

A composite is described first and drawn later: the coarse mask is made in the frame of the object's cut-out, the pixels
are drawn in the crop that the network sees, each layer warped once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from transfiner_refine.data.augment import compose, photometric, warp_crop
from transfiner_refine.errors import InvalidInputError

MAX_STAMP_SIDE = 320

Affine = np.ndarray
"""``(2, 3)`` float64, continuous pixels to continuous pixels."""


class CutOut(NamedTuple):
    """Pixels with their coverage.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB.
        alpha: ``(H, W)`` uint8, 255 where the object covers the whole pixel.
    """

    image: np.ndarray
    alpha: np.ndarray


@dataclass(frozen=True)
class CompositeShares:
    """How often samples are composed, and of what.

    Attributes:
        stamp: Share of samples whose object is a stamp (a cut-out with true alpha) on another photo.
        background: Share of the other samples whose object stands before another photo.
        neighbour: Probability of a pasted object that touches or overlaps; drawn twice.
        in_front: Probability that a pasted object hides part of the object instead of being hidden by it.
        poles: Probability of thin occluders.
        neighbour_side: Range of a pasted object's longer side, in sides of the object (log-uniform).
        hidden: Most of the object that a pasted one may hide.
        alike: Share of pasted objects that are of the object's own data set, as tall as it is, and stand beside it: a
            pedestrian among others.
    """

    stamp: float = 0.08
    background: float = 0.2
    neighbour: float = 0.15
    in_front: float = 0.5
    poles: float = 0.06
    neighbour_side: tuple[float, float] = (0.25, 1.4)
    hidden: float = 0.5
    alike: float = 0.0


class Layer(NamedTuple):
    """A pasted cut-out.

    Attributes:
        cut: Its pixels.
        affine: Its pixels to those of the object's cut-out.
        in_front: Whether it hides the object.
    """

    cut: CutOut
    affine: Affine
    in_front: bool


@dataclass
class Scene:
    """An object with what was pasted around it, in the frame of the object's cut-out.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB, the object's cut-out.
        alpha: ``(H, W)`` uint8, the object before anything hides it.
        coverage: ``(H, W)`` uint8, what is seen of it.
        neighbour: ``(H, W)`` uint8, what is seen of the pasted objects.
        is_own: Whether the object is the sample's own, no stamp.
        background: Another photo and the affine map of its pixels to the object's cut-out; None keeps the own one.
        layers: Pasted cut-outs, those behind the object first.
    """

    image: np.ndarray
    alpha: np.ndarray
    coverage: np.ndarray
    neighbour: np.ndarray
    is_own: bool = True
    background: tuple[np.ndarray, Affine] | None = None
    layers: list[Layer] = field(default_factory=list)


def load_stamps(folder: str | Path, min_colours: float = 0.3, min_area: int = 2000) -> list[CutOut]:
    """Read the photographic cut-outs of a folder of PNG files with alpha.

    Drawings are told by their few colours: a photograph has nearly as many as it has pixels.

    Args:
        folder: Searched with all its folders, but for those called ``symbols`` and ``cartoon``.
        min_colours: Least number of colours per opaque pixel.
        min_area: Least number of opaque pixels.

    Returns:
        The cut-outs by path, each cropped to what is visible, the longer side at most ``MAX_STAMP_SIDE``.

    Raises:
        InvalidInputError: If the folder holds none.
    """
    stamps = []
    for path in sorted(Path(folder).rglob("*.png")):
        if {"symbols", "cartoon"} & set(path.parts):
            continue
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 4 or pixels.dtype != np.uint8:
            continue
        opaque = pixels[..., 3] > 250
        colours = pixels[opaque][:, :3].astype(np.uint32) @ np.array([1, 1 << 8, 1 << 16], np.uint32)
        if opaque.sum() < min_area or len(np.unique(colours)) < min_colours * opaque.sum():
            continue
        rows, columns = np.flatnonzero(pixels[..., 3].any(1)), np.flatnonzero(pixels[..., 3].any(0))
        pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        shrink = MAX_STAMP_SIDE / max(pixels.shape[:2])
        if shrink < 1:
            size = max(1, round(pixels.shape[1] * shrink)), max(1, round(pixels.shape[0] * shrink))
            # Shrunk with the colours of transparent pixels left out, or they would bleed into the rim.
            alpha = pixels[..., 3:].astype(np.float32) / 255
            small = cv2.resize(np.concatenate([pixels[..., :3] * alpha, alpha], 2), size, interpolation=cv2.INTER_AREA)
            colour = small[..., :3] / np.maximum(small[..., 3:], 1e-3)
            pixels = np.concatenate([colour, small[..., 3:] * 255], 2).clip(0, 255).round().astype(np.uint8)
        stamps.append(CutOut(np.ascontiguousarray(pixels[..., 2::-1]), np.ascontiguousarray(pixels[..., 3])))
    if not stamps:
        raise InvalidInputError(f"expected photographic PNG files with alpha in {folder}, got none: check the folder")
    return stamps


class Composer:
    """Makes scenes.

    Args:
        objects: Number of objects that can be pasted or whose photos can be backgrounds.
        cut_out: The ``index``-th object, with its surroundings.
        stamps: Cut-outs with true alpha.
        shares: How often and of what.
        kinds: The kind of each object, for those that are alike; empty where all are of one.
    """

    def __init__(
        self,
        objects: int,
        cut_out: Callable[[int], CutOut],
        stamps: Sequence[CutOut] = (),
        shares: CompositeShares | None = None,
        kinds: Sequence[int] = (),
    ) -> None:
        self._objects, self._cut_out, self._stamps = objects, cut_out, stamps
        self._kinds = np.asarray(kinds, np.int64) if len(kinds) else np.zeros(objects, np.int64)
        self.shares = CompositeShares() if shares is None else shares

    def scene(self, own: CutOut, rng: np.random.Generator, kind: int = 0) -> Scene | None:
        """Perhaps put an object into a scene.

        Args:
            own: The object; replaced by a stamp in some of the scenes.
            rng: Source of every random choice.
            kind: The object's kind.

        Returns:
            None where the sample stays as it is.
        """
        shares = self.shares
        stamp = bool(self._stamps) and rng.random() < shares.stamp
        if stamp:
            own = _framed(self._stamps[int(rng.integers(len(self._stamps)))], rng)
        scene = Scene(own.image, own.alpha, own.alpha.copy(), np.zeros_like(own.alpha), not stamp)
        if stamp or rng.random() < shares.background:
            scene.background = self._background(own.alpha.shape, rng)
        tight = tight_box(own.alpha)
        for _ in range(2):
            if rng.random() < shares.neighbour:
                if shares.alike and not stamp and rng.random() < shares.alike:
                    self._paste_beside(scene, self._alike(kind, rng), tight, rng)
                else:
                    self._paste(scene, self._neighbour(rng), tight, rng)
        if rng.random() < shares.poles:
            self._poles(scene, tight, rng)
        scene.layers.sort(key=lambda layer: layer.in_front)
        return scene if scene.background is not None or scene.layers else None

    def _neighbour(self, rng: np.random.Generator) -> CutOut:
        """A random object, cropped to what it covers."""
        if self._stamps and rng.random() < 0.3:
            return self._stamps[int(rng.integers(len(self._stamps)))]
        return _cropped(self._cut_out(int(rng.integers(self._objects))))

    def _alike(self, kind: int, rng: np.random.Generator) -> CutOut:
        """A random object of a kind, cropped to what it covers."""
        return _cropped(self._cut_out(int(rng.choice(np.flatnonzero(self._kinds == kind)))))

    def _background(self, size: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, Affine]:
        """A random photo, enlarged at random so that it covers three times the cut-out's sides, and its place."""
        photo = self._cut_out(int(rng.integers(self._objects))).image
        cover = 1.5 * max(size[0] / photo.shape[0], size[1] / photo.shape[1])
        scale = np.array([cover * rng.choice([-1.0, 1.0]), cover])
        middle = np.array(photo.shape[1::-1]) / 2
        target = np.array(size[::-1]) * rng.uniform(0.35, 0.65, 2)
        return photo, np.column_stack([np.diag(scale), target - scale * middle])

    def _paste(self, scene: Scene, cut: CutOut, tight: np.ndarray, rng: np.random.Generator) -> None:
        """Place a cut-out so that it meets the object's outline; drop it if it hides too much."""
        side = float((tight[2:] - tight[:2]).max()) * np.exp(rng.uniform(*np.log(self.shares.neighbour_side)))
        scale = side / max(cut.alpha.shape) * np.array([rng.choice([-1.0, 1.0]), 1.0])
        angle = rng.uniform(-0.5, 0.5)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
        outline = np.argwhere(cv2.morphologyEx(scene.alpha, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0)
        if not len(outline):  # the object fills its cut-out
            return
        anchor = outline[rng.integers(len(outline))][::-1] + 0.5
        # Some point of the cut-out's middle, or of its rim, comes to lie on the outline.
        grip = np.array(cut.alpha.shape[::-1]) * rng.uniform(-0.05, 1.05, 2)
        self._add(scene, Layer(cut, np.column_stack([turn, anchor - turn @ grip]), rng.random() < self.shares.in_front))

    def _paste_beside(self, scene: Scene, cut: CutOut, tight: np.ndarray, rng: np.random.Generator) -> None:
        """Place a cut-out upright beside the object, as tall and on the same ground; drop it if it hides too much."""
        height = tight[3] - tight[1]
        scale = height / cut.alpha.shape[0] * np.exp(rng.uniform(-0.2, 0.2))
        turn = np.diag(scale * np.array([rng.choice([-1.0, 1.0]), 1.0]))
        apart = (tight[2] - tight[0] + scale * cut.alpha.shape[1]) / 2 * rng.uniform(0.45, 1.05) * rng.choice([-1, 1])
        foot = np.array([(tight[0] + tight[2]) / 2 + apart, tight[3] + height * rng.uniform(-0.08, 0.08)])
        grip = np.array([cut.alpha.shape[1] / 2, cut.alpha.shape[0]])
        self._add(scene, Layer(cut, np.column_stack([turn, foot - turn @ grip]), rng.random() < self.shares.in_front))

    def _add(self, scene: Scene, layer: Layer) -> None:
        size = (scene.alpha.shape[0], scene.alpha.shape[1])
        alpha = warp_crop(layer.cut.alpha, layer.affine, size, 0)
        hidden = cv2.multiply(scene.coverage, alpha, scale=1 / 255)
        if layer.in_front:
            if int(hidden.sum(dtype=np.int64)) > self.shares.hidden * int(scene.alpha.sum(dtype=np.int64)):
                return
            scene.coverage = scene.coverage - hidden
            scene.neighbour = np.maximum(scene.neighbour, alpha)
        else:
            scene.neighbour = np.maximum(scene.neighbour, alpha - hidden)
        scene.layers.append(layer)

    def _poles(self, scene: Scene, tight: np.ndarray, rng: np.random.Generator) -> None:
        """Hide the object behind one to three thin bars with another photo's texture."""
        height, width = scene.alpha.shape
        size = float(np.sqrt((tight[2:] - tight[:2]).prod()))
        bars = np.zeros((height, width), np.uint8)
        for _ in range(int(rng.integers(1, 4))):
            through, angle = rng.uniform(tight[:2], tight[2:]), rng.normal(np.pi / 2, 0.5)
            reach = np.array([np.cos(angle), np.sin(angle)]) * (height + width)
            ends = [tuple(np.round((through + sign * reach) * 8).astype(int).tolist()) for sign in (-1, 1)]
            thickness = max(1, round(size * np.exp(rng.uniform(np.log(0.008), np.log(0.07)))))
            cv2.line(bars, ends[0], ends[1], 255, thickness, cv2.LINE_AA, shift=3)
        texture = cv2.resize(self._cut_out(int(rng.integers(self._objects))).image, (width, height))
        if rng.random() < 0.5:  # a painted pole has one colour
            texture = np.broadcast_to(texture[height // 2, width // 2], texture.shape).copy()
        self._add(scene, Layer(CutOut(texture, bars), np.eye(2, 3), True))


def draw_scene(scene: Scene, affine: Affine, side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: The scene.
        affine: The object's cut-out to the crop.
        side: Side of the crop.
        rng: Source of each layer's change of colours.

    Returns:
        ``(side, side, 3)`` uint8 RGB.
    """
    size = (side, side)
    own = warp_crop(scene.alpha, affine, size, 0)
    crop = warp_crop(scene.image, affine, size)
    if scene.background is not None:
        photo, place = scene.background
        below = warp_crop(photo, compose(affine, place), size)
        crop = _blend(photometric(below, rng), photometric(crop, rng), _feather(own, rng))
    for layer in scene.layers:
        place = compose(affine, layer.affine)
        alpha = _feather(warp_crop(layer.cut.alpha, place, size, 0), rng)
        if not layer.in_front:
            alpha = cv2.multiply(alpha, 255 - own, scale=1 / 255)
        if alpha.any():
            crop = _blend(crop, photometric(warp_crop(layer.cut.image, place, size), rng), alpha)
    return crop


def _feather(alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soften the rim at random: lenses and motion do, scissors do not."""
    return cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.5, 1.2)) if rng.random() < 0.6 else alpha


def _blend(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha.astype(np.float32) / 255
    return cv2.blendLinear(above, below, weight, 1 - weight)


def _cropped(found: CutOut) -> CutOut:
    x0, y0, x1, y1 = tight_box(found.alpha)
    part = np.s_[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2]  # the rim keeps its own surroundings
    return CutOut(found.image[part], found.alpha[part])


def _framed(stamp: CutOut, rng: np.random.Generator) -> CutOut:
    """Give a stamp the room around it that crops of it can show, and sometimes a mirror image."""
    height, width = stamp.alpha.shape
    room = round(0.9 * max(height, width))
    framed = [cv2.copyMakeBorder(plane, room, room, room, room, cv2.BORDER_CONSTANT) for plane in stamp]
    if rng.random() < 0.5:
        framed = [np.ascontiguousarray(plane[:, ::-1]) for plane in framed]
    return CutOut(*framed)


def tight_box(alpha: np.ndarray) -> np.ndarray:
    """Half-open xyxy box of what is at least half covered, ``(4,)`` int64."""
    covered = alpha >= 128
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    if not len(rows):
        return np.array([0, 0, alpha.shape[1], alpha.shape[0]])
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
