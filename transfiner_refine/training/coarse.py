"""Coarse masks as detectors make them: ground truth in, a detector-like mask, box and soft map out.

Real heads do not err by white noise. They predict on a small grid (28×28 in the box, or prototypes at a quarter of the
image), so outlines are over-smoothed and thin parts vanish; the outline as a whole wanders by a few per cent of the
object; parts are missed, background is caught, and everything outside a misplaced box is cut off. All of these are
edits of one signed distance field, which stays cheap: it lives on the head's own grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import InvalidInputError


@dataclass(frozen=True)
class CoarseErrors:
    """How often and how strongly each error occurs; lengths are shares of the object's size ``sqrt(w·h)``.

    The defaults are fitted to the masks of YOLOv8n-seg on 850 photographs of ECSSD and CCP, matched to ground truth at
    IoU > 0.5: without the nearly exact masks, the means and the 10th, 50th and 90th percentiles of IoU and of boundary
    IoU agree with the real ones to about 0.02, boundary IoU of CCP to 0.07 at the extremes.

    Attributes:
        untouched: Probability that the mask is ground truth itself.
        one_pixel: Probability that the mask is ground truth with about one pixel of noise along the outline.
        box_head: Probability of the 28×28 grid of a box head; otherwise prototypes over the whole image.
        prototype_cells: Range of the object's longer side in prototype cells (log-uniform).
        smoothing: Range of the Gaussian blur's sigma.
        displacement: Median amplitude of the smooth displacement of the outline.
        displacement_spread: Sigma of that amplitude's log-normal distribution.
        offset: Standard deviation of the displacement common to the whole outline (a mask too thin or too fat).
        thinning: Probability that parts thinner than ``thin_width`` are lost, in patches.
        thin_width: Range of the width below which parts are lost.
        missing: Expected number of blobs missing from the object.
        leaks: Expected number of blobs of background caught.
        merges: Probability that part of a neighbour is caught, where there is one.
        blob_radius: Range of those blobs' radius.
        box_noise: Scale of the Laplace noise of each box side, as a share of the box's width or height.
        box_slip: Probability that a box side is badly placed.
        box_slip_noise: Scale of the noise of a badly placed side.
        min_iou: Least IoU with ground truth; a worse draw would not be matched to its object, and is drawn again.
    """

    untouched: float = 0.12
    one_pixel: float = 0.08
    box_head: float = 0.4
    prototype_cells: tuple[float, float] = (40.0, 160.0)
    smoothing: tuple[float, float] = (0.0, 0.018)
    displacement: float = 0.006
    displacement_spread: float = 0.25
    offset: float = 0.006
    thinning: float = 0.4
    thin_width: tuple[float, float] = (0.02, 0.1)
    missing: float = 0.15
    leaks: float = 0.4
    merges: float = 0.4
    blob_radius: tuple[float, float] = (0.05, 0.38)
    box_noise: float = 0.018
    box_slip: float = 0.09
    box_slip_noise: float = 0.14
    min_iou: float = 0.5


@dataclass(frozen=True)
class SimulatedCoarse:
    """What a detector would return for one object.

    Attributes:
        mask: ``(H, W)`` bool coarse mask in the frame of the ground truth, cut off at the box.
        box: ``(4,)`` float32 xyxy box in pixels of that frame, half-open.
        soft: ``(28, 28)`` float32 probabilities in the box frame, before the threshold.
    """

    mask: np.ndarray
    box: np.ndarray
    soft: np.ndarray


DEFAULT_ERRORS = CoarseErrors()


def simulate_coarse(
    mask: np.ndarray,
    rng: np.random.Generator,
    errors: CoarseErrors = DEFAULT_ERRORS,
    neighbour: np.ndarray | None = None,
) -> SimulatedCoarse:
    """Turn ground truth into what a detector would have returned for the object.

    Args:
        mask: ``(H, W)`` bool ground truth with at least one true pixel; some context around the object lets leaks and
            generous boxes show.
        rng: Source of every random choice; equal states give equal results.
        errors: Which errors, how often and how strong.
        neighbour: ``(H, W)`` bool, other objects of the kind that a head takes for part of this one; None if there are
            none.

    Returns:
        The coarse mask, its box and its soft map. The IoU with ground truth is at least ``errors.min_iou``: an object
        too small or thin to survive its errors comes back whole.

    Raises:
        InvalidInputError: If ``mask`` is not a two-dimensional boolean array, or is empty.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_ or not mask.any():
        raise InvalidInputError(
            f"expected a (H, W) bool mask with at least one true pixel, got {mask.dtype} {mask.shape} "
            f"with {np.count_nonzero(mask)}: compare with 0 and skip empty objects"
        )
    tight = _tight_box(mask)
    distance = _signed_distance(mask)
    kind = rng.random()
    for _ in range(4):
        if kind < errors.untouched:
            break
        if kind < errors.untouched + errors.one_pixel:
            coarse = _nearly_exact(distance, tight, rng.uniform(0.3, 1.2), rng, errors)
        else:
            seen = distance
            if neighbour is not None and rng.random() < errors.merges:
                seen = _merge(distance, neighbour, float(np.sqrt((tight[2:] - tight[:2]).prod())), rng, errors)
            coarse = _cut(_head_field(seen, tight, rng, errors), _noisy_box(tight, mask.shape, rng, errors))
        overlap = np.count_nonzero(coarse.mask & mask) / np.count_nonzero(coarse.mask | mask)
        if overlap >= errors.min_iou:
            return coarse
    return _nearly_exact(distance, tight, 0.0, rng, errors)


def _nearly_exact(
    distance: np.ndarray, tight: np.ndarray, noise_pixels: float, rng: np.random.Generator, errors: CoarseErrors
) -> SimulatedCoarse:
    """Ground truth, or ground truth with noise of about a pixel, in a box that cuts nothing off."""
    field = distance
    if noise_pixels:
        grain = cv2.GaussianBlur(rng.standard_normal(distance.shape, dtype=np.float32), (0, 0), 1.5)
        field = distance + (noise_pixels / grain.std()) * grain
    generous = np.abs(_noisy_box(tight, distance.shape, rng, errors) - tight)
    box = np.concatenate([tight[:2] - generous[:2], tight[2:] + generous[2:]])
    return _cut(field, _clip_box(box, distance.shape))


def _merge(
    distance: np.ndarray, neighbour: np.ndarray, size: float, rng: np.random.Generator, errors: CoarseErrors
) -> np.ndarray:
    """Take part of a neighbour for the object: what a disc around a place of contact shows of it."""
    contact = np.argwhere(neighbour & (distance > -0.06 * size))
    if not len(contact):
        return distance
    row, column = contact[rng.integers(len(contact))]
    radius = size * np.exp(rng.uniform(np.log(errors.blob_radius[0]), np.log(2 * errors.blob_radius[1])))
    away = np.hypot(
        np.arange(neighbour.shape[0], dtype=np.float32)[:, None] - np.float32(row),
        np.arange(neighbour.shape[1], dtype=np.float32)[None] - np.float32(column),
    )
    return np.maximum(distance, np.minimum(np.float32(radius) - away, _signed_distance(neighbour)))


def _head_field(distance: np.ndarray, tight: np.ndarray, rng: np.random.Generator, errors: CoarseErrors) -> np.ndarray:
    """Signed distance field of the mask that a head of low resolution sees; ``(H, W)`` float32 pixels, inside > 0."""
    height, width = distance.shape
    box_width, box_height = tight[2] - tight[0], tight[3] - tight[1]
    size = float(np.sqrt(box_width * box_height))

    if rng.random() < errors.thinning:
        distance = _lose_thin_parts(distance, 0.5 * size * rng.uniform(*errors.thin_width), rng)

    if rng.random() < errors.box_head:
        cell = np.array([box_width, box_height]) / ROOT_SIDE
    else:
        cells = np.exp(rng.uniform(*np.log(errors.prototype_cells)))
        cell = np.full(2, max(box_width, box_height) / cells)
    columns, rows = (int(np.clip(round(n / c), 4, n)) for n, c in zip((width, height), cell, strict=True))

    # Beyond a fifth of the object the distance says nothing about its outline, and would drown thin neighbours in blur.
    limit = 0.2 * size
    field = cv2.resize(np.clip(distance, -limit, limit), (columns, rows), interpolation=cv2.INTER_AREA)
    sigma = size * rng.uniform(*errors.smoothing)
    if sigma > 0:
        sigma_x, sigma_y = max(sigma * columns / width, 0.1), max(sigma * rows / height, 0.1)  # grid cells
        field = cv2.GaussianBlur(field, (0, 0), sigma_x, sigmaY=sigma_y)
    field = _edit_blobs(field, (height, width), size, rng, errors)
    amplitude = size * errors.displacement * float(np.exp(errors.displacement_spread * rng.standard_normal()))
    wave = rng.uniform(0.08, 0.4) * size
    field = field + amplitude * _smooth_noise(field.shape, wave * rows / height, wave * columns / width, rng)
    field = field + np.float32(size * errors.offset * rng.standard_normal())
    return cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR)


def _lose_thin_parts(distance: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Open the shape by a disc of ``radius`` pixels, in patches: heads lose one leg of a chair and keep another."""
    core = distance > radius
    if not core.any():
        return distance
    opened = np.minimum(distance, radius - cv2.distanceTransform((~core).view(np.uint8), cv2.DIST_L2, 3))
    patches = rng.standard_normal((4, 4), dtype=np.float32)
    patches = cv2.resize(patches, distance.shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.where(patches > rng.uniform(-1.0, 0.5), opened, distance)


def _edit_blobs(
    field: np.ndarray, frame: tuple[int, int], size: float, rng: np.random.Generator, errors: CoarseErrors
) -> np.ndarray:
    """Cut blobs out of the object and add blobs of background, all centred near the outline or inside."""
    rows, columns = field.shape
    scale_y, scale_x = frame[0] / rows, frame[1] / columns
    for count, missing in ((rng.poisson(errors.missing), True), (rng.poisson(errors.leaks), False)):
        # Missing parts may lie anywhere inside; leaks start at the outline.
        candidates = np.argwhere(field > 0) if missing else np.argwhere(np.abs(field) < 0.05 * size)
        if not len(candidates):
            continue
        for _ in range(count):
            row, column = candidates[rng.integers(len(candidates))]
            low, high = errors.blob_radius
            radius = size * low * (high / low) ** rng.random()
            aspect, angle = np.exp(0.4 * rng.standard_normal()), rng.uniform(0, np.pi)
            dy = ((np.arange(rows, dtype=np.float32) - row) * scale_y)[:, None]
            dx = ((np.arange(columns, dtype=np.float32) - column) * scale_x)[None, :]
            along, across = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
            inside = np.float32(radius) - np.sqrt((along / aspect) ** 2 + (across * aspect) ** 2).astype(np.float32)
            field = np.minimum(field, -inside) if missing else np.maximum(field, inside)
    return field


def _smooth_noise(shape: tuple[int, int], wave_y: float, wave_x: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian field of unit variance whose bumps are about ``wave`` cells long, with a half of finer detail."""
    noise = np.zeros(shape, np.float32)
    for octave, gain in ((1.0, 0.9), (0.4, 0.45)):
        knots = tuple(int(np.ceil(n / max(w * octave, 1.0))) + 1 for n, w in zip(shape, (wave_y, wave_x), strict=True))
        values = rng.standard_normal(knots, dtype=np.float32)
        # Cubic interpolation between independent knots keeps about two thirds of their standard deviation.
        noise += (gain / 0.67) * cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return noise


def _noisy_box(tight: np.ndarray, frame: tuple[int, ...], rng: np.random.Generator, errors: CoarseErrors) -> np.ndarray:
    """Move each side of the box by Laplace noise, some sides by far more."""
    slipped = rng.random(4) < errors.box_slip
    noise = rng.laplace(size=4) * np.where(slipped, errors.box_slip_noise, errors.box_noise)
    # A badly placed side of a real box cuts the object off far more often than it adds background.
    noise[slipped] = np.where(rng.random(int(slipped.sum())) < 0.75, -1, 1) * np.abs(noise[slipped])
    noise = np.clip(noise, -0.4, 0.4) * np.tile(tight[2:] - tight[:2], 2)
    return _clip_box(tight + noise * np.array([-1, -1, 1, 1]), frame)


def _clip_box(box: np.ndarray, frame: tuple[int, ...]) -> np.ndarray:
    """Clip to the frame and keep at least two pixels of width and height."""
    height, width = frame[:2]
    x0, y0 = np.clip(box[:2], 0, [max(width - 2, 0), max(height - 2, 0)])
    x1, y1 = np.clip(box[2:], [min(x0 + 2, width), min(y0 + 2, height)], [width, height])
    return np.array([x0, y0, x1, y1], np.float32)


def _cut(field: np.ndarray, box: np.ndarray) -> SimulatedCoarse:
    """Threshold the field inside the box and read the head's soft map from it."""
    height, width = field.shape
    mask = np.zeros((height, width), np.bool_)
    x0, y0, x1, y1 = np.round(box).astype(int)
    mask[y0:y1, x0:x1] = field[y0:y1, x0:x1] > 0
    span = (box[2:] - box[:2]) / ROOT_SIDE
    # Half-pixel rule: cell j of the soft map has its centre at box.x0 + (j + 0.5)·span; OpenCV counts pixel centres as
    # whole numbers, hence the 0.5 taken off.
    affine = np.array([[span[0], 0, box[0] + 0.5 * span[0] - 0.5], [0, span[1], box[1] + 0.5 * span[1] - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    values = cv2.warpAffine(field, affine, (ROOT_SIDE, ROOT_SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    # A head's probability climbs from 0.1 to 0.9 within about one and a half of its cells.
    soft = 1.0 / (1.0 + np.exp(-np.clip(3.0 * values / float(span.mean()), -30, 30)))
    return SimulatedCoarse(mask=mask, box=box, soft=soft.astype(np.float32))


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, positive inside; half a pixel is the centre of an outline pixel."""
    inner = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 5)
    outer = cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, 5)
    # cv2 returns a huge constant where the other class does not exist (an object that fills its frame).
    return np.clip(np.where(mask, inner - 0.5, 0.5 - outer), -sum(mask.shape), sum(mask.shape)).astype(np.float32)


def _tight_box(mask: np.ndarray) -> np.ndarray:
    """Half-open xyxy box of the true pixels, ``(4,)`` float32."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
