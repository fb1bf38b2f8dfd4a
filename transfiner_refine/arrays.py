"""Arrays as callers hold them, taken as tensors: what ``types`` and ``inputs`` share."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfiner_refine.errors import InvalidInputError

ROUNDING = 1e-3
"""How far a value may lie outside [0, 1]: interpolated probabilities exceed 1 by rounding, in half precision most."""


def check_image_size(image_size: Any) -> tuple[int, int]:
    """Check ``(H, W)``: two integers above 0."""
    try:
        height, width = (operator.index(side) for side in image_size)
    except (TypeError, ValueError):
        raise InvalidInputError(f"expected image_size (height, width) of two integers, got {image_size!r}") from None
    if height < 1 or width < 1:
        raise InvalidInputError(f"expected image_size (height, width) of at least 1, got {height, width}: it is empty")
    return height, width


def to_tensor(value: Any, name: str) -> Tensor:
    """Take a tensor, a numpy array or nested sequences of either as a tensor, without a copy where that is possible.

    Args:
        value: Tensor, array, or sequence of numbers, arrays, images or tensors of one shape.
        name: What it is, for the message.

    Raises:
        InvalidInputError: If it is none of these, is ragged, is not of numbers, or is a single number.
    """
    try:
        if isinstance(value, Tensor):
            tensor = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
            tensor = torch.stack(list(value))
        else:
            # torch refuses negative strides and warns of read-only memory: such arrays are copied.
            array = np.require(value, requirements=["C", "W"])
            if array.dtype.kind not in "biuf":
                raise TypeError(f"its dtype {array.dtype} is not a number")
            tensor = torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"expected {name} as a tensor, a numpy array, or a list of those of one shape, "
            f"got {type(value).__name__}: {error}"
        ) from None
    if not tensor.ndim:
        raise InvalidInputError(f"expected {name} of at least one dimension, got the single value {tensor.item()}")
    return tensor


def unit_range(values: Tensor, name: str, remedy: str) -> Tensor:
    """Take float values of [0, 1] as float32.

    Args:
        values: Any shape, float.
        name: What they are, for the message.
        remedy: What to do if they lie outside, for the message.

    Returns:
        The same shape, float32, within [0, 1].

    Raises:
        InvalidInputError: If a value is NaN, or outside by more than the rounding of an interpolation.
    """
    if not values.numel():
        return values.to(torch.float32)
    low, high = (value.item() for value in torch.aminmax(values.detach()))
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # not the other way round, so that NaN fails too
        raise InvalidInputError(f"expected {name} in [0, 1], got values from {low:g} to {high:g}: {remedy}")
    values = values.to(torch.float32)
    return values if low >= 0 and high <= 1 else values.clamp(0, 1)


def mask_values(masks: Tensor) -> Tensor:
    """Bring masks of any accepted dtype to bool, or to float32 probabilities.

    Args:
        masks: Any shape: bool; integers 0 and 1, or 0 and 255; or float in [0, 1].

    Returns:
        The same shape, bool or float32; the memory of ``masks`` where its dtype allows that.

    Raises:
        InvalidInputError: If a value is out of range.
    """
    if masks.dtype == torch.bool:
        return masks
    if masks.is_complex() or masks.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise InvalidInputError(f"expected masks of bool, uint8 or float, got {masks.dtype}: convert them first")
    if masks.is_floating_point():
        return unit_range(masks, "float masks", "apply a sigmoid to logits")
    if not masks.numel():
        return masks.to(torch.bool)
    low, high = (int(value) for value in torch.aminmax(masks))
    if low >= 0 and high <= 1:
        return masks.view(torch.bool) if masks.dtype == torch.uint8 else masks.to(torch.bool)
    binary = masks != 0
    if high == 255 and torch.equal(masks, binary.to(masks.dtype).mul_(255)):
        return binary
    raise InvalidInputError(
        f"expected integer masks of 0 and 1, or of 0 and 255, got values from {low} to {high}: "
        "divide probabilities of 0 to 255 by 255, and split an image of instance numbers into one mask per number"
    )
