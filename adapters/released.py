"""The released mask branch in the place of a Detectron2 or torchvision detector's own masks.

The authors' checkpoints are a detector and a mask branch that was trained with it. A detector that has their backbone
and FPN, such as the one that ``transfiner-refine convert`` writes for Detectron2, can have its masks from that branch,
whatever else of it was changed since::

    model = with_released(adapt(detector), "released/r50-3x")

Both are called as the detector is. This is inference only; to train a refiner on a detector's features, see
:meth:`Adapter.with_refiner`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from transfiner_refine.adapters.protocol import Adapter, Prediction
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.released import (
    COCO_CATEGORY_IDS,
    ReleasedMaskBranch,
    ReleasedMaskTransfiner,
    paste_crops,
)
from transfiner_refine.modeling.released_branch import CHANNELS, CLASSES, STRIDES

LABELS: dict[str, Sequence[int]] = {"detectron2": range(CLASSES), "torchvision": COCO_CATEGORY_IDS}
"""Adapter: label that its COCO detectors give each of COCO's 80 classes."""


class _BoxHost(Protocol):
    """What this module needs of an adapter besides the protocol of all."""

    def predict(self, inputs: Any) -> list[Prediction]: ...

    def with_masks(self, prediction: Prediction, masks: Tensor) -> Any: ...


def with_released(
    adapter: Adapter,
    released: ReleasedMaskTransfiner | str | Path,
    *,
    max_instances: int | None = None,
    smooth: bool = False,
    labels: Sequence[int] | None = None,
    check_source: bool = True,
) -> ReleasedMaskDetector:
    """Join a detector and the mask branch of a released model in one module that is called as the detector is.

    Args:
        adapter: Of a Detectron2 or torchvision detector.
        released: The released model, or its name, directory or Hub id for ``ReleasedMaskTransfiner.from_pretrained``.
            Of it, only the mask branch is kept.
        max_instances: Instances of each image that are refined, the first ones; None refines all.
        smooth: Whether to dilate the finest nodes and blur the masks, as the authors' demo does.
        labels: The detector's label of each of COCO's 80 classes; None takes 0 to 79 with Detectron2, and COCO's
            category ids with torchvision, as their own COCO detectors count.
        check_source: Whether a detector is refused whose backbone and FPN have other weights.

    Raises:
        InvalidInputError: If the detector is of another host, its maps are not those of the FPN that the branch was
            trained with, or ``labels`` are not 80 different ones.

    Note:
        Weights are compared, not what surrounds them: Detectron2's backbone takes BGR less the pixel means
        (103.53, 116.28, 123.675), undivided, and has its strides in the 1×1 convolutions. A torchvision detector needs
        a backbone that does the same.
    """
    if adapter.name not in LABELS:
        raise InvalidInputError(f"expected a detector of {' or '.join(LABELS)}, got one of {adapter.name}")
    if (adapter.channels, adapter.strides) != (CHANNELS, STRIDES):
        raise InvalidInputError(
            f"expected an FPN of {CHANNELS} channels at strides {STRIDES}, the released models' own, got "
            f"{adapter.channels} channels at strides {adapter.strides}: train a refiner on this detector instead"
        )
    if not isinstance(released, ReleasedMaskTransfiner):
        released = ReleasedMaskTransfiner.from_pretrained(released)
    if check_source and (found := backbone_fingerprint(adapter.backbone)) != (
        expected := backbone_fingerprint(released.backbone)
    ):
        raise InvalidInputError(
            f"expected the backbone and FPN that the released mask branch was trained with, SHA-256 {expected}, got "
            f"those of {found}: load the detector that transfiner-refine convert writes, or pass check_source=False if "
            "the features are the same"
        )
    chosen = LABELS[adapter.name] if labels is None else labels
    if len(chosen) != CLASSES or len(set(chosen)) != CLASSES:
        raise InvalidInputError(f"expected the labels of COCO's {CLASSES} classes, all different, got {list(chosen)}")
    return ReleasedMaskDetector(adapter, released.mask_branch, chosen, max_instances, smooth)


class ReleasedMaskDetector(nn.Module):
    """A detector with the masks of the released branch; made by :func:`with_released`.

    Attributes:
        detector: The detector, the same object that the adapter was made for.
        mask_branch: The released mask branch.
        adapter: The adapter.
    """

    def __init__(
        self,
        adapter: Adapter,
        mask_branch: ReleasedMaskBranch,
        labels: Sequence[int],
        max_instances: int | None,
        smooth: bool,
    ) -> None:
        super().__init__()
        self.detector = adapter.model
        self.mask_branch = mask_branch.to(next(self.detector.parameters()).device)
        self.adapter = adapter
        self.classes = {label: index for index, label in enumerate(labels)}
        self.max_instances = max_instances
        self.smooth = smooth
        self.train(self.detector.training)

    @torch.no_grad()
    def forward(self, inputs: Sequence[Any]) -> list[Any]:
        """Call the detector.

        Args:
            inputs: As the detector takes them.

        Returns:
            The detector's output, every mask being the released branch's.

        Raises:
            InvalidInputError: In training mode, or if the detector gives a label that is none of COCO's classes.
        """
        if self.training:
            raise InvalidInputError(
                "expected evaluation mode, got training: the released mask branch is for inference; call .eval()"
            )
        host = cast(_BoxHost, self.adapter)
        return [host.with_masks(prediction, self._masks(prediction)) for prediction in host.predict(inputs)]

    def _masks(self, prediction: Prediction) -> Tensor:
        """Masks ``(N, H, W)`` bool of one image."""
        instances, features = prediction.instances, prediction.features
        assert features is not None and instances.labels is not None  # of a detector with an FPN and classes
        known = instances.labels.tolist()
        if unknown := sorted(set(known) - self.classes.keys()):
            raise InvalidInputError(
                f"expected labels of COCO's classes, got {unknown}: pass labels=, this detector's label of each class"
            )
        boxes = instances.boxes
        classes = torch.tensor([self.classes[label] for label in known], dtype=torch.long, device=boxes.device)
        in_network = features.to_network(boxes, torch.zeros_like(classes))
        maps = [level.float() for level in features.maps]
        found = self.mask_branch(maps, [in_network], [classes], self.max_instances, smooth=self.smooth)
        return paste_crops(boxes, found.probs, instances.image_size)


def backbone_fingerprint(backbone: nn.Module) -> str:
    """SHA-256, in hexadecimal, of the shapes and bytes of a backbone's weights in any order, whatever their names."""
    values = (value.detach().cpu().contiguous() for value in backbone.state_dict().values())
    digests = sorted(
        hashlib.sha256(f"{tuple(value.shape)}".encode() + value.view(-1).view(torch.uint8).numpy().tobytes()).digest()
        for value in values
        if value.is_floating_point()  # step counters are not
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()
