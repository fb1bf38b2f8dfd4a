"""Files that every kind of model is kept in: a JSON config and safetensors weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from transfiner_refine.errors import WeightsError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


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
