"""Ways to improve a detector's masks, each a function from a photo with coarse masks to better masks.

Those that need no training work one mask at a time, within a window around its box. ``tune_peers.py`` chose their
parameters on ECSSD photos that no figure is from.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

import cv2
import numpy as np
import torch
from dataset import MatchedImage

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import MissingDependencyError
from transfiner_refine.functional.paste import crop_masks, paste
from transfiner_refine.inputs import boxes_from_masks

SURROUNDINGS = 0.25
"""Share of the box side added on each side to the window that a method sees."""

GRABCUT_BAND = 0.02
"""Half-width of the band that GrabCut decides, as a share of ``sqrt(w·h)`` of the box."""

GUIDED_RADIUS = 0.1
"""Radius of the guided filter's window, as a share of ``sqrt(w·h)`` of the box."""

GUIDED_EPS = 1e-4
"""Regularisation of the guided filter, in squared intensities of [0, 1]."""

CRF_CONFIDENCE = 0.7
"""Probability that the coarse label of a pixel is right, the unary potential of the dense CRF."""

CRF_REACH = 0.1
"""Deviation of the bilateral kernel in space, as a share of ``sqrt(w·h)`` of the box."""

CRF_COLOUR = 10.0
"""Deviation of the bilateral kernel in colour, in steps of 8 bits."""

CRF_COMPATIBILITY = 5.0
"""Weight of the bilateral kernel."""

CRF_STEPS = 5
"""Mean-field iterations."""


class Coarse(str, Enum):
    """The masks that every method starts from."""

    detector = "detector"
    box = "box"
    truth = "truth"


Method = Callable[[MatchedImage], np.ndarray]
"""``(N, H, W)`` bool masks of a photo's N objects."""

Labels = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""RGB window ``(h, w, 3)`` uint8, its coarse mask ``(h, w)`` bool and the object's size in pixels to a better mask."""


def start_from(sample: MatchedImage, coarse: Coarse) -> MatchedImage:
    """The photo with other coarse masks.

    Args:
        sample: A photo with a detector's masks.
        coarse: ``detector`` keeps them; ``box`` takes its 28×28 probabilities, pasted as a detector without a refiner
            pastes them; ``truth`` takes the ground truth and its own boxes: masks that cannot be improved, only harmed.
    """
    if coarse is Coarse.detector:
        return sample
    if coarse is Coarse.box:
        return replace(sample, coarse=bilinear(sample))
    truth = torch.from_numpy(sample.truth)
    boxes = boxes_from_masks(truth)
    probs = crop_masks(truth, boxes, ROOT_SIDE)
    return replace(sample, coarse=sample.truth, boxes=boxes.numpy(), box_probs=probs.numpy())


def bilinear(sample: MatchedImage) -> np.ndarray:
    """Paste the 28×28 probabilities bilinearly, as a box head's detector does without a refiner."""
    masks = torch.zeros(sample.coarse.shape, dtype=torch.bool)
    paste(torch.from_numpy(sample.box_probs), torch.from_numpy(sample.boxes), masks)
    return masks.numpy()


def grabcut(sample: MatchedImage, band: float = GRABCUT_BAND, surroundings: float = SURROUNDINGS) -> np.ndarray:
    """Cut each object out by OpenCV's GrabCut, five iterations, started from its coarse mask.

    Colours decide a band along the outline: inside of it is object for sure, outside of it background.

    Args:
        sample: A photo with coarse masks.
        band: See ``GRABCUT_BAND``.
        surroundings: See ``SURROUNDINGS``; a large number shows it the whole photo.
    """

    def labels(rgb: np.ndarray, coarse: np.ndarray, size: float) -> np.ndarray:
        radius = max(1, round(band * size))
        square = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
        inside = coarse.astype(np.uint8)
        labels = np.where(inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        labels[cv2.erode(inside, square) == 1] = cv2.GC_FGD
        labels[cv2.dilate(inside, square) == 0] = cv2.GC_BGD
        cv2.setRNGSeed(0)  # its colour clusters start at random
        models = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        cv2.grabCut(bgr, labels, (0, 0, 0, 0), *models, 5, cv2.GC_INIT_WITH_MASK)
        return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)

    return in_windows(sample, labels, surroundings)


def guided_filter(sample: MatchedImage, radius: float = GUIDED_RADIUS, eps: float = GUIDED_EPS) -> np.ndarray:
    """Smooth each coarse mask along the photo's colours by a guided filter, and threshold it.

    He, Sun, Tang, *Guided Image Filtering*, TPAMI 2013, Sec. 3.5, with a colour photo as the guide.
    """

    def labels(rgb: np.ndarray, coarse: np.ndarray, size: float) -> np.ndarray:
        side = 2 * max(1, round(radius * size)) + 1

        def mean(values: np.ndarray) -> np.ndarray:
            flat = cv2.boxFilter(values.reshape(*coarse.shape, -1), -1, (side, side))
            return flat.reshape(values.shape)

        guide, mask = rgb.astype(np.float32) / 255, coarse.astype(np.float32)
        mean_guide, mean_mask = mean(guide), mean(mask)
        pairs = [mean(guide * guide[..., i : i + 1]) for i in range(3)]
        covariance = np.stack(pairs, -1) - mean_guide[..., None] * mean_guide[..., None, :]  # (h, w, 3, 3)
        shared = mean(guide * mask[..., None]) - mean_guide * mean_mask[..., None]  # (h, w, 3)
        slope = np.linalg.solve(covariance + eps * np.eye(3, dtype=np.float32), shared[..., None])[..., 0]
        offset = mean_mask - (slope * mean_guide).sum(-1)
        return (mean(slope) * guide).sum(-1) + mean(offset) >= 0.5

    return in_windows(sample, labels)


def dense_crf(
    sample: MatchedImage,
    confidence: float = CRF_CONFIDENCE,
    reach: float = CRF_REACH,
    colour: float = CRF_COLOUR,
    compatibility: float = CRF_COMPATIBILITY,
) -> np.ndarray:
    """Label each window by a fully connected CRF whose unary potential is the coarse mask.

    Krähenbühl, Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*, NIPS 2011, in the
    implementation of the authors behind ``pydensecrf2``.

    Raises:
        MissingDependencyError: If ``pydensecrf2`` is not installed.
    """
    try:
        from pydensecrf.densecrf import DenseCRF2D  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            "expected the package pydensecrf2 for the dense CRF, got none: pip install pydensecrf2 (it is compiled, "
            "which needs a C++ compiler), or --skip crf"
        ) from error

    def labels(rgb: np.ndarray, coarse: np.ndarray, size: float) -> np.ndarray:
        height, width = coarse.shape
        probability = np.where(coarse, confidence, 1 - confidence).astype(np.float32)
        unary = -np.log(np.stack([1 - probability, probability])).reshape(2, -1)
        crf = DenseCRF2D(width, height, 2)
        crf.setUnaryEnergy(np.ascontiguousarray(unary))
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=reach * size, srgb=colour, rgbim=rgb, compat=compatibility)
        return np.argmax(crf.inference(CRF_STEPS), axis=0).reshape(height, width) == 1

    return in_windows(sample, labels)


def is_installed(method: Method) -> bool:
    """Whether the package that a method needs is there."""
    return method is not dense_crf or importlib.util.find_spec("pydensecrf") is not None


def in_windows(sample: MatchedImage, labels: Labels, surroundings: float = SURROUNDINGS) -> np.ndarray:
    """Let a method label a window around each box; the rest of the photo is background.

    A window that is all object or all background is left as it is: there are no colours to tell apart.
    """
    out = sample.coarse.copy()
    for mask, coarse, box in zip(out, sample.coarse, sample.boxes, strict=True):
        sides = box[2:] - box[:2]
        left, top = np.floor(np.maximum(box[:2] - surroundings * sides, 0)).astype(int)
        right, bottom = np.ceil(box[2:] + surroundings * sides).astype(int)
        window = np.s_[top:bottom, left:right]
        inside = coarse[window]
        if inside.all() or not inside.any():
            continue
        mask[:] = False
        mask[window] = labels(sample.image[window].copy(), inside, float(np.sqrt(sides.prod())))
    return out


def oracle(sample: MatchedImage) -> np.ndarray:
    """Fill the incoherent cells of the box's 28×28 grid, and their neighbours, with ground truth.

    A cell is incoherent where the ground truth within it is not all alike. This is what a refiner of these cells could
    reach at most.
    """
    return np.stack([_oracle(*one) for one in zip(sample.coarse, sample.truth, sample.boxes, strict=True)])


def _oracle(coarse: np.ndarray, truth: np.ndarray, box: np.ndarray) -> np.ndarray:
    height, width = coarse.shape
    column = np.floor((np.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * ROOT_SIDE).astype(int)
    row = np.floor((np.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * ROOT_SIDE).astype(int)
    inside = np.ix_((row >= 0) & (row < ROOT_SIDE), (column >= 0) & (column < ROOT_SIDE))
    cell = (row[:, None] * ROOT_SIDE + column)[inside]
    pixels = np.bincount(cell.ravel(), minlength=ROOT_SIDE**2)
    filled = np.bincount(cell.ravel(), weights=truth[inside].ravel(), minlength=ROOT_SIDE**2)
    incoherent = ((filled > 0) & (filled < pixels)).astype(np.uint8).reshape(ROOT_SIDE, ROOT_SIDE)
    near = cv2.dilate(incoherent, np.ones((3, 3), np.uint8)).ravel() == 1
    out = coarse.copy()
    out[inside] = np.where(near[cell], truth[inside], coarse[inside])
    return out


def refined(refiner: Refiner, coarse: Coarse = Coarse.detector, options: RefineOptions | None = None) -> Method:
    """A refiner as a method, through its public interface; from ``Coarse.box`` it starts in the frame of the boxes."""
    frame = "box" if coarse is Coarse.box else "image"

    def refine(sample: MatchedImage) -> np.ndarray:
        masks = sample.box_probs if frame == "box" else sample.coarse
        out = refiner.refine(sample.image, boxes=sample.boxes, masks=masks, mask_frame=frame, options=options)
        return np.asarray(out.masks.cpu())

    return refine


def with_and_without(refiner: Refiner, coarse: Coarse = Coarse.detector, name: str = "refined") -> dict[str, Method]:
    """A refiner as it is, and, if it has a segmenter, without it."""
    methods = {name: refined(refiner, coarse)}
    if refiner.model.segmenter is not None:
        methods[f"{name}, no segmenter"] = refined(refiner, coarse, RefineOptions(segment=False))
    return methods
