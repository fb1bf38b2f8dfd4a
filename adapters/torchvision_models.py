"""Mask R-CNN of torchvision by name: built, given weights, given the classes of a data set.

K classes of a data set, without the background.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from transfiner_refine.adapters.torchvision import TorchvisionAdapter
from transfiner_refine.errors import InvalidInputError, WeightsError

PRETRAINED = "DEFAULT"
"""Name of torchvision's own weights, which it downloads."""

CLASSES = "roi_heads.box_predictor.cls_score.weight"
"""The weight that has a row for each class and for the background."""

COUNTER = ".num_batches_tracked"
"""End of the name of a buffer that a trained normalisation has, and a frozen one has not."""


def build(name: str, options: Mapping[str, Any], classes: int, weights: str | None = None) -> TorchvisionAdapter:
    """Build a detector for a data set.

    Args:
        name: A function of ``torchvision.models.detection`` that makes a Mask R-CNN.
        options: Its arguments, such as ``min_size``.
        classes: K.
        weights: A file of a state dict, ``.safetensors`` or ``.pth``, ``"DEFAULT"`` for torchvision's own weights, or
            None for random ones. Class layers of another number of classes become new ones.

    Raises:
        InvalidInputError: If there is no such detector, or it does not take an option.
        WeightsError: If the weights are missing, damaged, or of another architecture.
    """
    if weights == PRETRAINED:
        model = _call(name, {**options, "weights": PRETRAINED})
        if len(model.get_parameter("roi_heads.box_predictor.cls_score.bias")) != classes + 1:
            _replace_classes(model, classes)
    else:
        state = None if weights is None else read_state(Path(weights))
        model = rebuild(name, options, classes, state, weights)
    adapter = TorchvisionAdapter(model)
    # What downloads weights has no part in building the detector again for weights of its own.
    kept = {key: value for key, value in options.items() if key not in ("weights", "weights_backbone")}
    adapter.recipe = {"name": name, "options": kept, "classes": classes}
    return adapter


def restore(recipe: Mapping[str, Any], weights: Path) -> TorchvisionAdapter:
    """Build a detector again that was saved with its refiner.

    Args:
        recipe: That of its adapter.
        weights: The file that was saved with it.

    Raises:
        WeightsError: If the weights are missing, damaged, or of another architecture.
    """
    adapter = TorchvisionAdapter(rebuild(**recipe, state=read_state(weights), source=weights))
    adapter.recipe = dict(recipe)
    return adapter


def rebuild(
    name: str, options: Mapping[str, Any], classes: int, state: dict[str, Tensor] | None, source: str | Path | None
) -> MaskRCNN:
    """Build a detector around a state dict, or with random weights.

    Args:
        name: See :func:`build`; also ``options`` and ``classes``.
        options: See there.
        classes: See there.
        state: Weights by name; layers that were normalised by frozen statistics are so again.
        source: Where they came from, for messages.

    Raises:
        WeightsError: If they are of another architecture.
    """
    of_file = classes + 1
    if state is not None and CLASSES in state:
        of_file = len(state[CLASSES])
    values = {"weights": None, "weights_backbone": None, **options, "num_classes": of_file}
    if state is not None:
        values["weights_backbone"] = None
    model = _call(name, values)
    if state is not None:
        _freeze_statistics(model, state)
        _load(model, state, name, source)
        if of_file != classes + 1:
            _replace_classes(model, classes)
    return model


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict; of a checkpoint of torchvision's own training scripts, its ``model``.

    Raises:
        WeightsError: If the file is missing, damaged, or holds something else.
    """
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(
            f"expected a file of weights, got {path}, which does not exist: check the path, or give DEFAULT for "
            "torchvision's own"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"expected a state dict in {path}, as .safetensors or .pth of tensors alone, got: {reason}; save it with "
            "torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(
            f"expected a state dict in {path}, got {type(state).__name__}: save it with "
            "torch.save(model.state_dict(), path)"
        )
    return state


def _call(name: str, values: dict[str, Any]) -> MaskRCNN:
    known = sorted(key for key in vars(detection) if key.startswith("maskrcnn_") and callable(getattr(detection, key)))
    if name not in known:
        raise InvalidInputError(f"expected a Mask R-CNN of torchvision, {', '.join(known)}, got {name!r}")
    function = getattr(detection, name)
    accepted = inspect.signature(function).parameters.keys() | inspect.signature(MaskRCNN).parameters.keys()
    if unknown := sorted(values.keys() - accepted):
        raise InvalidInputError(
            f"expected options of torchvision's {name}, got {unknown[0]!r}: its arguments are "
            f"{', '.join(sorted(accepted - {'kwargs', 'backbone'}))}"
        )
    defaults = inspect.signature(MaskRCNN).parameters
    for key, value in values.items():
        if key in defaults and isinstance(defaults[key].default, (int, float)) and not _is_number(key, value):
            raise InvalidInputError(f"expected a number for {key} of torchvision's {name}, got {value!r}")
    try:
        return function(**values)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"expected options that torchvision's {name} takes, got: {error}") from error
    except OSError as error:  # of the download, for which torchvision uses urllib
        raise WeightsError(
            f"torchvision's weights of {name} could not be downloaded ({error}): connect once, or give a file"
        ) from error


def _is_number(key: str, value: Any) -> bool:
    """Whether a value, of JSON or of Python, is a number; ``min_size`` may be several."""
    if key == "min_size" and isinstance(value, (list, tuple)):
        return len(value) > 0 and all(_is_number("", one) for one in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _replace_classes(model: MaskRCNN, classes: int) -> None:
    """Put new layers in the place of those that tell classes apart."""
    heads: Any = model.roi_heads
    heads.box_predictor = FastRCNNPredictor(heads.box_predictor.cls_score.in_features, classes + 1)
    hidden: nn.ConvTranspose2d = heads.mask_predictor.conv5_mask
    heads.mask_predictor = MaskRCNNPredictor(hidden.in_channels, hidden.out_channels, classes + 1)


def _freeze_statistics(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make those batch norms frozen ones that were frozen in the model that the weights are of."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and f"{name}.running_mean" in state and name + COUNTER not in state:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FrozenBatchNorm2d(module.num_features, module.eps))


def _load(model: nn.Module, state: dict[str, Tensor], name: str, source: str | Path | None) -> None:
    expected = {key: value.shape for key, value in model.state_dict().items()}
    found = {key: value.shape for key, value in state.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise WeightsError(
            f"{source} does not fit torchvision's {name}: {len(wrong)} of {len(expected)} tensors are missing, "
            f"unexpected or of another shape, the first is {wrong[0]!r}; name the detector that the file is of"
        )
    model.load_state_dict(state)
