"""What a run keeps in its directory so that it can go on: which run it is, and where it stands."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transfiner_refine.data.coco import write_atomic
from transfiner_refine.errors import InvalidInputError

CHECKPOINT = "last.pt"
RECORD = "run.json"

MAY_CHANGE = frozenset({"steps", "workers", "validate_every", "save_every", "log_every", "patience", "max_skipped"})
"""Parts of a schedule that may differ when a run is resumed: they do not touch the steps already made."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: Steps made.
        best: Highest score of a validation.
        best_step: The step of that validation.
        stale: Validations since.
        skipped: Steps whose gradient was not finite, in all.
        skipped_in_a_row: The same, since the last sound step.
        losses: Sums of the losses since the last record.
        count: Steps in these sums.
    """

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    stale: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    count: int = 0


def check_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Refuse a directory that holds another run.

    Args:
        directory: The run's directory; may not exist yet.
        record: What makes the run what it is, by topic; see :func:`write_record`.

    Raises:
        InvalidInputError: If its ``run.json`` says something else, or it holds a checkpoint without one.
    """
    path = directory / RECORD
    if not path.exists():
        if (directory / CHECKPOINT).exists():
            raise InvalidInputError(f"expected {RECORD} beside {CHECKPOINT} in {directory}, got none: use a new folder")
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"expected JSON in {path}, got {error}: use a new folder") from error
    differing = sorted(_differences(known, json.loads(json.dumps(record))))
    if differing:
        raise InvalidInputError(
            f"expected a new folder, or that of the same run to go on with, got {directory}, whose run differs in "
            f"{', '.join(differing)}: choose another output, or repeat its settings, which {path} holds"
        )


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.json``: the schedule as ``train``, and whatever else makes the run what it is."""
    write_atomic(directory / RECORD, json.dumps(record, indent=2).encode())


def save_checkpoint(
    directory: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write everything that a resumed run needs, in one file that is complete or not there.

    The state of the random generators is not part of it: every step seeds them by its number.

    Raises:
        OSError: If the file cannot be written; an older one stays as it was.
    """
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    path = directory / CHECKPOINT
    # One name for all: a killed run leaves at most one unfinished file, which the next checkpoint takes over.
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(
    directory: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Take up a checkpoint, if there is one: the weights, their average and the optimiser are changed in place.

    Returns:
        Where the run stands, or None where there is no checkpoint.

    Raises:
        InvalidInputError: If the checkpoint is damaged or of a model of another architecture.
    """
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        progress = Progress(**state["progress"])
    except Exception as error:  # the reader of a damaged file can fail in any way
        raise InvalidInputError(
            f"expected a whole checkpoint in {path}, got a damaged one: restore the file, or choose another output"
        ) from error
    try:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise InvalidInputError(
            f"expected a checkpoint of this model in {path}, got another: {str(error).splitlines()[0]} "
            "Choose another output, or the model that it belongs to"
        ) from error
    return progress


def _differences(known: Any, wanted: Any, name: str = "") -> set[str]:
    """Dotted names of what differs between two JSON values, but for ``MAY_CHANGE``."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        return {
            difference
            for key in known.keys() | wanted.keys()
            if not (name == "train" and key in MAY_CHANGE)
            for difference in _differences(known.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        }
    return set() if known == wanted else {name}
