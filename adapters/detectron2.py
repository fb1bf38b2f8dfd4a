# pyright: reportMissingImports=false
"""Detectron2: Mask R-CNN, Cascade R-CNN, PointRend, Panoptic FPN and other ``GeneralizedRCNN`` with a mask head.

Detectron2 keeps the package's coordinate rule: continuous pixels, ``aligned=True``, ``align_corners=False``. Its models
take images that the caller has resized, in the channel order of ``cfg.INPUT.FORMAT``; its classes have no background.
Its paste lets a mask fade out across the edge of the box; pixels that refinement does not change keep its values.

Detectron2's own trainers, evaluators and checkpointers take the joined model as they take any other. In a script such
as its ``tools/train_net.py``, :func:`add_transfiner_config` follows ``get_cfg()``, and three lines join a refiner to
the detector that a config describes::

    MODEL:
      META_ARCHITECTURE: TransfinerRCNN
      TRANSFINER: {DETECTOR: GeneralizedRCNN, REFINER: {depth: 3}, TRAIN: all}

B images, N instances of an image, R RoIs of a batch, S side of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.adapters.joint import RefinedDetector
from transfiner_refine.adapters.protocol import (
    Adapter,
    JointOptions,
    Prediction,
    as_images,
    evaluating,
    hooked,
    missing_dependency,
    recording,
)
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.paste import crop_box_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.types import FeaturePyramid, Instances

try:
    from detectron2.config import CfgNode
    from detectron2.data.transforms import ResizeShortestEdge
    from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
    from detectron2.structures import Boxes
    from detectron2.structures import Instances as HostInstances
except ImportError as error:
    raise missing_dependency(
        "Detectron2", f"pip install 'git+https://github.com/facebookresearch/detectron2.git' ({error})"
    ) from error

ROW, BOX_PROBS = "transfiner_row", "transfiner_box_probs"
"""Fields that instances carry from the mask head through the host's post-processing."""


class Detectron2Adapter(Adapter):
    """Coarse masks and features of a Detectron2 R-CNN.

    The features are the maps that its RoI heads pool from: p2 to p5 of an FPN, or the one map of a C4 or DC5 model.

    Args:
        model: ``GeneralizedRCNN`` or a subclass, with a mask head.
        min_size: Pixels of the shorter side to which images are resized that come otherwise than as Detectron2's
            dicts; ``cfg.INPUT.MIN_SIZE_TEST``.
        max_size: Most pixels of their longer side; ``cfg.INPUT.MAX_SIZE_TEST``.

    Raises:
        InvalidInputError: If the model is no R-CNN, or has no mask head.
    """

    name = "detectron2"
    trainer = "Detectron2's own trainer, such as detectron2.engine.DefaultTrainer (docs/adapters/detectron2.md)"

    def __init__(self, model: nn.Module, *, min_size: int = 800, max_size: int = 1333) -> None:
        heads: Any = getattr(model, "roi_heads", None)
        if not isinstance(model, GeneralizedRCNN) or not getattr(heads, "mask_on", False):
            raise InvalidInputError(
                f"expected a Detectron2 R-CNN with a mask head (MODEL.MASK_ON), got {type(model).__name__}: refine "
                "masks from elsewhere with Refiner.refine"
            )
        super().__init__(model)
        self.detector: Any = model
        self.resize = ResizeShortestEdge(min_size, max_size)
        self._names: Sequence[str] = getattr(heads, "mask_in_features", None) or heads.in_features
        self._shapes = [self.detector.backbone.output_shape()[name] for name in self._names]

    @property
    def channels(self) -> int:
        """Channels of every map."""
        return self._shapes[0].channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the maps in network pixels, finest first."""
        return tuple(shape.stride for shape in self._shapes)

    @property
    def backbone(self) -> nn.Module:
        """The detector's backbone with its FPN."""
        return self.detector.backbone

    @property
    def mask_head(self) -> nn.Module:
        """The detector's mask head."""
        return self.detector.roi_heads.mask_head

    def detect(self, images: Any) -> list[Prediction]:
        """Run the detector in evaluation mode, without gradients; it is left in the mode in which it was.

        Args:
            images: A list of Detectron2's dicts with ``image``, and ``height`` and ``width`` of the original image, in
                which the predictions are; or a list of anything that
                :func:`~transfiner_refine.adapters.protocol.as_images` takes, RGB, which is resized here.

        Returns:
            One prediction per image. ``host`` is its dict, and ``box_probs`` are what the mask head gave.
        """
        if isinstance(images, Sequence) and all(isinstance(image, Mapping) for image in images):
            if without := next((image for image in images if "image" not in image), None):
                raise InvalidInputError(
                    f'expected "image" in each of Detectron2\'s dicts, got the keys {", ".join(map(repr, without))}'
                )
            return self.predict(images)
        return self.predict([self._as_input(image) for image in as_images(images)])

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Run the detector as :meth:`detect` does, on Detectron2's own dicts."""
        if not inputs:
            return []
        with evaluating(self.model), recording(backbone=self.backbone) as calls, self._marking():
            outputs: list[dict[str, Any]] = self.model(inputs)
        pyramid = self.pyramid(calls["backbone"].output)
        return [
            self._prediction(tuple(level[index : index + 1] for level in pyramid.maps), given, output)
            for index, (given, output) in enumerate(zip(inputs, outputs, strict=True))
        ]

    def with_masks(self, prediction: Prediction, masks: Tensor) -> dict[str, Any]:
        """What Detectron2 returned for an image, with other masks, ``(N, H, W)`` bool."""
        given = prediction.host["instances"]
        instances = HostInstances(given.image_size, **{**given.get_fields(), "pred_masks": masks})
        return {**prediction.host, "instances": instances}

    def pyramid(self, features: Mapping[str, Tensor]) -> FeaturePyramid:
        """Features of a batch in the frame of the network's input, from the backbone's maps by name."""
        return FeaturePyramid(tuple(features[name] for name in self._names), self.strides, source=self.source)

    def original(self, given: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
        """Undo the resizing of an input, as far as that is possible: ``(3, H, W)`` RGB float32 in [0, 1]."""
        pixels = given["image"].to(self.detector.device).float() / 255
        if self._is_bgr():
            pixels = pixels.flip(0)
        return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)

    def _as_input(self, image: Tensor) -> dict[str, Any]:
        """Prepare an RGB image as Detectron2's ``DefaultPredictor`` does."""
        height, width = image.shape[1:]
        pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
        pixels = (pixels.flip(0) if self._is_bgr() else pixels).permute(1, 2, 0).numpy(force=True)
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        return {"image": torch.from_numpy(resized.transpose(2, 0, 1).copy()), "height": height, "width": width}

    def _is_bgr(self) -> bool:
        order = self.detector.input_format or "BGR"  # models that are not made from a config may leave it out
        if order not in ("BGR", "RGB"):
            raise InvalidInputError(
                f'expected a detector of input format "BGR" or "RGB", got {order!r}: pass Detectron2\'s own dicts to a '
                "refiner on the detector's features"
            )
        return order == "BGR"

    @contextmanager
    def _marking(self) -> Iterator[None]:
        """Let instances carry their row and box-frame masks through the post-processing, which drops empty boxes."""

        def mark(head: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
            for instances in kwargs_and_output[-1]:  # another thread's too, whose own hook does the same
                instances.set(ROW, torch.arange(len(instances), device=instances.pred_masks.device))
                instances.set(BOX_PROBS, instances.pred_masks)

        with hooked(self.mask_head, mark):
            yield

    def _prediction(self, maps: tuple[Tensor, ...], given: Mapping[str, Any], output: dict[str, Any]) -> Prediction:
        found = output["instances"]
        rows, box_probs = found.get(ROW), found.get(BOX_PROBS)
        found.remove(ROW)
        found.remove(BOX_PROBS)
        height, width = found.image_size
        rows_of_network, columns_of_network = given["image"].shape[-2:]
        scale = torch.tensor([[columns_of_network / width, rows_of_network / height]], device=maps[0].device)
        return Prediction(
            instances=Instances(
                boxes=found.pred_boxes.tensor,
                masks=found.pred_masks,
                image_size=(height, width),
                scores=found.scores,
                labels=found.pred_classes,
            ),
            indices=rows,
            features=FeaturePyramid(maps, self.strides, scale, source=self.source),
            box_probs=box_probs[:, 0].float(),
            host=output,
        )

    def _wrap(self, refiner: RefinerModel, options: JointOptions) -> RefinedDetector:
        return RefinedDetectron2(self, refiner, options)


class RefinedDetectron2(RefinedDetector):
    """A Detectron2 R-CNN with refined masks."""

    adapter: Detectron2Adapter

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Call the detector.

        Args:
            batched_inputs: Detectron2's dicts: ``image``, and ``height`` and ``width`` in evaluation, ``instances`` in
                training.

        Returns:
            In evaluation, one dict per image as from the detector, the ``pred_masks`` of its ``instances`` being
            refined (a panoptic segmentation is left as it is). In training, the detector's losses, ``loss_refine`` and
            ``loss_incoherence``.

        Note:
            A refiner with an image encoder sees the network's input, brought to the size of the original image.
        """
        if self.training:
            return self._losses(batched_inputs)
        predictions = self.adapter.predict(batched_inputs)
        images = None
        if not self.uses_features:
            sizes = [prediction.instances.image_size for prediction in predictions]
            images = [self.adapter.original(given, size) for given, size in zip(batched_inputs, sizes, strict=True)]
        refined = self.refine(predictions, images)
        return [
            self.adapter.with_masks(prediction, instances.masks)
            for prediction, instances in zip(predictions, refined, strict=True)
        ]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a checkpoint of the detector alone too, as Detectron2's checkpointer offers it before training.

        As with the detector itself, what has another shape, such as the layers of other classes, is left to be
        reported by the checkpointer.
        """
        for name, value in self.detector.state_dict().items():
            if prefix + name in state_dict and state_dict[prefix + name].shape == value.shape:
                state_dict[f"{prefix}detector.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _losses(self, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        self.check_trainable()
        with recording(backbone=self.adapter.backbone, head=self.adapter.mask_head) as calls:
            losses: dict[str, Tensor] = self.detector(batched_inputs)
        head_input, positives = calls["head"].args
        device = self.adapter.detector.device
        counts = torch.tensor([len(proposals) for proposals in positives], device=device)
        image = torch.repeat_interleave(counts)
        keep = self.sample(image)
        image, first = image[keep], counts.cumsum(0) - counts
        chosen = [proposals[keep[image == index] - first[index]] for index, proposals in enumerate(positives)]

        # Training keeps to the network's frame, in which Detectron2 gives the ground truth.
        boxes = torch.cat([proposals.proposal_boxes.tensor for proposals in chosen])
        rois = self.rois(boxes)
        coarse = crop_box_masks(self._coarse(head_input, keep, chosen), boxes.detach(), rois, self.side)
        side = 2 * self.side
        truth = [torch.zeros((0, side, side), dtype=torch.bool, device=device)]
        for index, proposals in enumerate(chosen):
            if len(proposals):  # an image without instances has no masks to crop
                truth.append(proposals.gt_masks.crop_and_resize(rois[image == index], side).to(device))
        pyramid = self.adapter.pyramid(calls["backbone"].output)
        return losses | self.refinement_losses(pyramid, rois, image, coarse, torch.cat(truth))

    def _coarse(self, head_input: Any, keep: Tensor, chosen: Sequence[Any]) -> Tensor:
        """What the mask head would predict for the chosen proposals, of their true classes: ``(R, S, S)``.

        A mask head returns losses in training. Asking it a second time serves every kind of head.
        """
        known = [
            HostInstances(one.image_size, pred_boxes=Boxes(one.proposal_boxes.tensor), pred_classes=one.gt_classes)
            for one in chosen
        ]
        # PointRend's head takes the feature maps, others the crops of all proposals.
        crops = head_input[keep] if isinstance(head_input, Tensor) else head_input
        head = self.adapter.mask_head
        with evaluating(head), torch.set_grad_enabled(not self.joint.detach_coarse):
            found = head(crops, known)
        return torch.cat([instances.pred_masks for instances in found])[:, 0].float()


def add_transfiner_config(config: CfgNode) -> None:
    """Add what :func:`TransfinerRCNN` reads to a Detectron2 config, under ``MODEL.TRANSFINER``.

    The keys are ``DETECTOR`` (meta-architecture of the detector), ``REFINER`` (fields of
    :class:`~transfiner_refine.TransfinerConfig` that differ from the paper's model, in lower case), and ``TRAIN``,
    ``DETACH_COARSE`` and ``MAX_ROIS``, as :meth:`Adapter.with_refiner` describes them.
    """
    config.MODEL.TRANSFINER = CfgNode(
        {"DETECTOR": "GeneralizedRCNN", "TRAIN": "all", "DETACH_COARSE": True, "MAX_ROIS": 64}
    )
    config.MODEL.TRANSFINER.REFINER = CfgNode(new_allowed=True)


@META_ARCH_REGISTRY.register()
def TransfinerRCNN(config: CfgNode) -> RefinedDetector:
    """Build a detector joined with a new refiner on its features from a config of :func:`add_transfiner_config`."""
    chosen = config.MODEL.TRANSFINER
    detector = META_ARCH_REGISTRY.get(chosen.DETECTOR)(config)
    adapter = Detectron2Adapter(detector, min_size=config.INPUT.MIN_SIZE_TEST, max_size=config.INPUT.MAX_SIZE_TEST)
    return adapter.with_refiner(
        Refiner(RefinerModel(adapter.config(**chosen.REFINER))),
        train=chosen.TRAIN,
        detach_coarse=chosen.DETACH_COARSE,
        max_rois=chosen.MAX_ROIS,
    )
