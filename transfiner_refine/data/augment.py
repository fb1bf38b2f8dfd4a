"""Warps and photometric changes of image crops; numpy and OpenCV, uint8 RGB.

Affine maps are ``(2, 3)`` float64 over continuous pixels (pixel centres at +0.5), unlike OpenCV's own, which count
pixel centres as whole numbers.
"""

from __future__ import annotations

import cv2
import numpy as np

FILL = 127
"""Grey outside of the image: zero after the encoder's normalisation."""


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Affine map that applies ``inner`` first; all ``(2, 3)``."""
    return np.column_stack([outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2] + outer[:, 2]])


def warp(plane: np.ndarray, affine: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """Bilinear warp.

    Args:
        plane: ``(H, W)`` or ``(H, W, 3)`` uint8 or float32.
        affine: ``(2, 3)`` continuous pixels of ``plane`` to continuous pixels of the result.
        size: ``(H, W)`` of the result.
        fill: Value outside of ``plane``.

    Returns:
        Array of ``size``, same dtype.
    """
    half = np.full(2, 0.5)
    centred = np.column_stack([affine[:, :2], affine[:, :2] @ half + affine[:, 2] - half])
    value = (fill,) * (plane.shape[2] if plane.ndim == 3 else 1)
    return cv2.warpAffine(plane, centred, size[::-1], flags=cv2.INTER_LINEAR, borderValue=value)


def warp_crop(image: np.ndarray, affine: np.ndarray, size: tuple[int, int], fill: int = FILL) -> np.ndarray:
    """Warp an image into a crop: averages areas when shrinking, interpolates when enlarging.

    Args:
        image: ``(H, W)`` or ``(H, W, 3)`` uint8.
        affine: ``(2, 3)`` continuous pixels of ``image`` to continuous pixels of the crop.
        size: ``(H, W)`` of the crop.
        fill: Value outside of the image.

    Returns:
        uint8 array of ``size``.
    """
    scale = np.minimum(np.linalg.norm(affine[:, :2], axis=0), 1.0)  # of x and y
    if scale.min() >= 1.0:
        return warp(image, affine, size, fill)
    # Shrink the part that the crop shows by area averages, then warp what is left of the map at a scale of about one.
    height, width = size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], float)
    shown = (corners - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T
    low = np.maximum(np.floor(shown.min(0)) - 2, 0).astype(int)
    high = np.minimum(np.ceil(shown.max(0)) + 2, image.shape[1::-1]).astype(int)
    if (high <= low).any():
        return np.full(size + image.shape[2:], fill, np.uint8)
    small = np.maximum(np.round((high - low) * scale), 1).astype(int)
    part = cv2.resize(image[low[1] : high[1], low[0] : high[0]], small.tolist(), interpolation=cv2.INTER_AREA)
    back = np.column_stack([np.diag((high - low) / small), low.astype(float)])
    return warp(part, compose(affine, back), size, fill)


def photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, gamma and saturation; sometimes blur, add noise or compress.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        rng: Source of randomness.

    Returns:
        New ``(H, W, 3)`` uint8 RGB.
    """
    if rng.random() < 0.8:
        ramp = np.linspace(0, 1, 256) ** np.exp(rng.uniform(-0.35, 0.35))
        ramp = (ramp - 0.5) * rng.uniform(0.7, 1.3) + 0.5 + rng.uniform(-0.12, 0.12)
        # A slight cast per channel stands for white balance.
        table = ramp[:, None] * rng.uniform(0.93, 1.07, 3)
        image = cv2.LUT(image, np.clip(table * 255 + 0.5, 0, 255).astype(np.uint8)[None])
    kind = rng.random()
    if kind < 0.5:
        saturation = 0.0 if kind < 0.06 else rng.uniform(0.4, 1.5)
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        image = cv2.addWeighted(image, saturation, grey, 1 - saturation, 0)
    if rng.random() < 0.12:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))
    if rng.random() < 0.12:
        noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(2, 10))
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.15:
        _, packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 90))])
        image = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))
    return image
