"""Files that every kind of model is kept in: a JSON config and safetensors weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from transfiner_refine.errors import WeightsError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

SCALE = ".int8_scale"
"""Ends the name of what the rows of a tensor of bytes are multiplied by."""

LEAST_PACKED = 16384
"""Numbers of the smallest tensor that is stored as bytes."""


def read_config(directory: Path, remedy: str) -> Any:
    """Parse ``config.json``.

    Args:
        directory: The model's directory.
        remedy: What to do about a file that is not JSON, as the message ends.

    Raises:
        WeightsError: If the file is missing or not JSON.
    """
    path = directory / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"expected {CONFIG} and {WEIGHTS} in {directory}, {CONFIG} is missing") from error
    except (ValueError, OSError) as error:
        raise WeightsError(f"expected JSON in {path}: {error}; {remedy}") from error


def packed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as signed bytes, a quarter of float32.

    Each row of a large tensor (an output channel of a layer) has a scale of its own, under the same name with ``SCALE``
    behind it; vectors and small tensors are stored as float16.

    Args:
        weights: Finite floating tensors by name.
    """
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.ndim < 2 or value.numel() < LEAST_PACKED:
            stored[name] = value.half()
            continue
        rows = value.float().flatten(1)
        scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
        stored[name] = (rows / scale[:, None]).round().to(torch.int8).view_as(value).contiguous()
        stored[name + SCALE] = scale
    return stored


def unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`packed` was given, less its rounding; other weights as they are.

    Bytes without their scale, and scales without bytes, are left as they are.
    """
    weights = dict(stored)
    for name, value in stored.items():
        scale = stored.get(name + SCALE)
        if value.dtype == torch.int8 and value.ndim > 1 and scale is not None and scale.shape == value.shape[:1]:
            weights[name] = (value.flatten(1) * scale.float()[:, None]).view_as(value)
            del weights[name + SCALE]
    return weights


def write_weights(path: Path, weights: Mapping[str, Tensor], **metadata: str) -> None:
    """Write contiguous CPU tensors as safetensors, with the permissions of any new file.

    Args:
        path: The file.
        weights: Tensors by name.
        **metadata: What the file's header says of them.

    Note:
        safetensors' own ``save_file`` makes files that only their owner can read.
    """
    path.write_bytes(save(dict(weights), metadata={"format": "pt", **metadata}))
