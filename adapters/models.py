"""Detectors by name, for those who have none in a variable: built for a data set, or loaded with their refiner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transfiner_refine.adapters.joint import RefinedDetector
from transfiner_refine.adapters.protocol import Adapter
from transfiner_refine.adapters.saving import ADAPTER, DETECTOR
from transfiner_refine.errors import InvalidInputError, WeightsError

BUILDERS = ("torchvision", "transformers")
"""Host frameworks whose detectors are built here; each has a module of this name and ``_models``."""

FORMS = "torchvision:NAME[,key=value...], transformers:DIRECTORY_OR_ID, or the directory of a model that was saved"


def build_detector(name: str, categories: Sequence[dict[str, Any]], weights: str | None = None) -> Adapter:
    """Build a detector for a data set.

    Args:
        name: ``"torchvision:NAME,key=value"``: a function of ``torchvision.models.detection`` with arguments of its
            own; or ``"transformers:NAME"``, a directory or Hub id, whose weights are loaded with it.
        categories: COCO records of the classes in the order of their labels.
        weights: Of torchvision's: a file of a state dict, or ``"DEFAULT"`` for torchvision's own; None for random ones.

    Returns:
        The detector's adapter, which knows its ``recipe`` and its ``categories``.

    Raises:
        InvalidInputError: If the name or an option is not of this form, or unknown.
        WeightsError: If the weights are missing, damaged, or of another architecture.
        MissingDependencyError: If the host framework is not installed.
    """
    host, _, rest = name.partition(":")
    if host in ("detectron2", "mmdet"):
        adapter = {"detectron2": "Detectron2", "mmdet": "MMDetection"}[host]
        raise InvalidInputError(
            f"expected a detector as {FORMS}, got {name!r}: {adapter} trains a detector with a refiner by its own "
            f"trainer, see docs/adapters/{host}.md"
        )
    if host not in BUILDERS or not rest:
        raise InvalidInputError(f"expected a detector as {FORMS}, got {name!r}")
    if host == "torchvision":
        rest, *pairs = rest.split(",")
        adapter = _models(host).build(rest, dict(map(_option, pairs)), len(categories), weights)
    elif weights is not None:
        raise InvalidInputError(f"expected no weights beside {name!r}, which has its own, got {weights!r}")
    else:
        adapter = _models(host).build(rest, categories)
    adapter.categories = tuple(categories)
    return adapter


def load_refined(directory: str | Path, **options: Any) -> RefinedDetector:
    """Load a detector that was trained by name, with its refiner.

    Args:
        directory: What ``save_pretrained`` of such a model wrote.
        **options: Of :meth:`Adapter.with_refiner <transfiner_refine.adapters.protocol.Adapter.with_refiner>`.

    Returns:
        The model, in evaluation mode; its ``adapter.categories`` say what the labels mean.

    Raises:
        WeightsError: If a file is missing, damaged, or of another architecture.
        InvalidInputError: If the directory does not say how its detector is built.
        MissingDependencyError: If the host framework is not installed.
    """
    directory = Path(directory)
    record = read_record(directory)
    if "detector" not in record:
        raise InvalidInputError(
            f"expected {ADAPTER} in {directory} to say how the detector is built, got none: build it, and load the "
            f"refiner with adapt(detector).with_refiner({str(directory)!r})"
        )
    adapter: Adapter = _models(record["adapter"]).restore(record["detector"], directory / DETECTOR)
    adapter.model.eval()
    adapter.categories = tuple(record["categories"]) if "categories" in record else None
    return adapter.with_refiner(directory, **options)


def read_record(directory: Path) -> dict[str, Any]:
    """What ``adapter.json`` says of a model that was saved with its detector.

    Raises:
        WeightsError: If the file is missing or damaged.
    """
    path = directory / ADAPTER
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(
            f"expected {ADAPTER} in {directory}, it is missing: name the directory of a detector that was saved with "
            "its refiner, such as best/ of a run"
        ) from error
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}): save the model again") from error
    return record


def _models(host: str) -> Any:
    if host not in BUILDERS:
        raise InvalidInputError(
            f"expected a detector of {' or '.join(BUILDERS)}, got one of {host!r}: build it, adapt it"
        )
    return import_module(f"transfiner_refine.adapters.{host}_models")


def _option(pair: str) -> tuple[str, Any]:
    """``key=value``, the value as JSON where it is, and as text elsewhere."""
    key, equals, value = pair.partition("=")
    if not equals or not key.isidentifier():
        raise InvalidInputError(f"expected an option as key=value, got {pair!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
