"""The directory of a detector with its refiner, and the fingerprint that ties the two together.

Beside the refiner's own ``config.json`` and ``model.safetensors``, from which ``Refiner.from_pretrained`` loads, it
holds ``adapter.json``, and where they exist ``laterals.safetensors`` and the jointly trained ``detector.safetensors``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from transfiner_refine.errors import WeightsError
from transfiner_refine.modeling.files import write_weights
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel

ADAPTER = "adapter.json"
DETECTOR = "detector.safetensors"
LATERALS = "laterals.safetensors"


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of the names, dtypes, shapes and bytes of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)};".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_parts(
    directory: Path, refiner: RefinerModel, record: Mapping[str, Any], parts: Mapping[str, nn.Module], fingerprint: str
) -> Path:
    """Write a refiner and what belongs to it; each file is complete or untouched.

    Args:
        directory: Created if needed.
        refiner: The refiner; its weights are written in float32, so that loading gives equal outputs.
        record: Contents of ``adapter.json``.
        parts: Modules by file name.
        fingerprint: Of the detector's weights, for the refiner's config.

    Returns:
        The directory.
    """
    marked = copy.copy(refiner)  # shares the weights
    marked.config = replace(refiner.config, feature_fingerprint=fingerprint)
    save_model(marked, directory, torch.float32)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        temporary = Path(scratch)
        for name, part in parts.items():
            # Clones, because safetensors refuses weights that two names share.
            weights = {
                key: value.detach().to("cpu", copy=True).contiguous() for key, value in part.state_dict().items()
            }
            write_weights(temporary / name, weights)
        (temporary / ADAPTER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in list(temporary.iterdir()):
            os.replace(path, directory / path.name)
    for name in {DETECTOR, LATERALS} - parts.keys():
        (directory / name).unlink(missing_ok=True)  # of an earlier model that was saved here
    return directory


def load_part(module: nn.Module, path: Path) -> None:
    """Load a module's weights strictly, in place.

    Args:
        module: The module; keeps its device and dtypes.
        path: A file of :func:`save_parts`.

    Raises:
        WeightsError: If the file is missing or damaged, or the weights are of another architecture.
    """
    try:
        weights = load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"expected {path.name} in {path.parent}, it is missing: save the model again") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}): download or save the model again") from error
    expected = {name: value.shape for name, value in module.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise WeightsError(
            f"{path} does not fit {type(module).__name__}: {len(wrong)} of {len(expected)} tensors are missing, "
            f"unexpected or of another shape, the first is {wrong[0]!r}; build the detector as it was when saved"
        )
    module.load_state_dict(weights)
