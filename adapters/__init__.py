"""Adapters that refine the masks of a host framework's detector.

One module per host framework. Importing this package imports no framework; importing a module imports its own only.

    adapter = adapt(detector)
    predictions = adapter.detect(images)
    model = adapter.with_refiner(refiner)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transfiner_refine.errors import InvalidInputError

if TYPE_CHECKING:
    from transfiner_refine.adapters.protocol import Adapter

HOSTS = {
    "torchvision": ("torchvision.models.detection", "TorchvisionAdapter"),
    "detectron2": ("detectron2", "Detectron2Adapter"),
    "mmdet": ("mmdet", "MMDetAdapter"),
    "transformers": ("transformers", "TransformersAdapter"),
}
"""Module here: the package in which its detectors are defined, and its class."""


def adapt(model: Any) -> Adapter:
    """Choose the adapter of a detector by its type, without importing any other framework.

    Args:
        model: A detector with masks: torchvision ``MaskRCNN``, a Detectron2 or MMDetection model, DETR, Mask2Former or
            MaskFormer of transformers, or a subclass of one.

    Raises:
        InvalidInputError: If it is none of these, or is one that gives no masks.
    """
    for base in type(model).__mro__:
        if base.__module__.startswith("torch.jit"):
            raise InvalidInputError(
                "expected a detector as a Python module, got a torchscripted one: adapt it before it is scripted"
            )
        for name, (package, adapter) in HOSTS.items():
            if base.__module__ == package or base.__module__.startswith(f"{package}."):
                return getattr(import_module(f"transfiner_refine.adapters.{name}"), adapter)(model)
    inner = next((name for name in ("module", "_orig_mod", "model") if hasattr(model, name)), None)
    remedy = (
        f"pass the detector inside of it, its attribute .{inner}"
        if inner
        else "refine its boxes and masks with Refiner.refine"
    )
    raise InvalidInputError(
        f"expected a detector of torchvision, Detectron2, MMDetection or transformers, got {type(model).__name__} of "
        f"{type(model).__module__}: {remedy}"
    )
