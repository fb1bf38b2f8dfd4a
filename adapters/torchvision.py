"""torchvision's Mask R-CNN, with any backbone that gives it a feature pyramid.

Where torchvision deviates from the package's coordinate rule: its paste rounds each box down to whole pixels and counts
the last one in, so that a pasted outline lies up to a pixel beside the box-frame mask. Refinement starts from the
latter; pixels that it does not change keep the values that torchvision pasted.

B images, N instances of an image, R RoIs of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference

from transfiner_refine.adapters.joint import RefinedDetector, crop_truth
from transfiner_refine.adapters.protocol import Adapter, JointOptions, Prediction, as_images, evaluating, recording
from transfiner_refine.data.photos import PhotoSample
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.paste import crop_box_masks
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.types import FeaturePyramid, Instances

PROBE_SIDE = 256
"""Side of the blank image on which the strides of a backbone are measured."""


class TorchvisionAdapter(Adapter):
    """Coarse masks and features of a torchvision Mask R-CNN.

    The features are the maps that its mask head pools from, ``"0"`` to ``"3"`` with torchvision's own backbones.

    Args:
        model: ``MaskRCNN``, or another ``GeneralizedRCNN`` with a mask head.

    Raises:
        InvalidInputError: If the model has no mask head, or its maps are no pyramid whose strides double.
    """

    name = "torchvision"
    first_label = 1  # 0 is the background

    def __init__(self, model: nn.Module) -> None:
        roi_heads = getattr(model, "roi_heads", None)
        if not isinstance(model, GeneralizedRCNN) or not isinstance(roi_heads, RoIHeads) or not roi_heads.has_mask():
            raise InvalidInputError(
                f"expected a torchvision detector with a mask head, such as MaskRCNN, got {type(model).__name__}: "
                "refine masks from elsewhere with Refiner.refine"
            )
        super().__init__(model)
        self.roi_heads = roi_heads
        self._channels, self._strides = self._measure()

    @property
    def channels(self) -> int:
        """Channels of every map."""
        return self._channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the maps in network pixels, finest first."""
        return self._strides

    @property
    def backbone(self) -> nn.Module:
        """The detector's backbone with its FPN."""
        return cast(nn.Module, self.model.backbone)

    @property
    def class_count(self) -> int | None:
        """Classes of the box head, without the background; None if it is not torchvision's own."""
        layer = getattr(self.roi_heads.box_predictor, "cls_score", None)
        return layer.out_features - 1 if isinstance(layer, nn.Linear) else None

    def detect(self, images: Any) -> list[Prediction]:
        """Run the detector in evaluation mode, without gradients; it is left in the mode in which it was.

        Args:
            images: A list of ``(3, H, W)`` float tensors in [0, 1] as torchvision takes them, or of anything that
                :func:`~transfiner_refine.adapters.protocol.as_images` does.

        Returns:
            One prediction per image. ``instances.masks`` are the float masks that torchvision pastes, ``host`` is its
            dict, and ``box_probs`` are what its mask head gave.
        """
        weight = next(self.model.parameters())
        given = [
            (image.float() / 255 if image.dtype == torch.uint8 else image).to(weight.device, weight.dtype)
            for image in as_images(images)
        ]
        return self.predict(given)

    def predict(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Run the detector as :meth:`detect` does, on images exactly as it takes them: ``(3, H, W)`` float."""
        if not images:
            return []
        with evaluating(self.model), recording(heads=self.roi_heads, predictor=self.mask_predictor) as calls:
            outputs: list[dict[str, Tensor]] = self.model(images)
        features, _, network_sizes = calls["heads"].args[:3]
        pyramid = self.pyramid(features, images, network_sizes)
        probs = maskrcnn_inference(calls["predictor"].output, [output["labels"] for output in outputs])
        return [
            Prediction(
                instances=Instances(
                    boxes=output["boxes"],
                    masks=output["masks"][:, 0],
                    image_size=(image.shape[1], image.shape[2]),
                    scores=output["scores"],
                    labels=output["labels"],
                ),
                indices=torch.arange(len(output["boxes"]), device=output["boxes"].device),
                features=FeaturePyramid(
                    tuple(level[index : index + 1] for level in pyramid.maps),
                    pyramid.strides,
                    scale=None if pyramid.scale is None else pyramid.scale[index : index + 1],
                    source=pyramid.source,
                ),
                box_probs=box_probs[:, 0].float(),
                host=output,
            )
            for index, (image, output, box_probs) in enumerate(zip(images, outputs, probs, strict=True))
        ]

    def with_masks(self, prediction: Prediction, masks: Tensor) -> dict[str, Tensor]:
        """What torchvision returned for an image, with other masks, ``(N, H, W)`` bool or float."""
        return {**prediction.host, "masks": masks[:, None].to(prediction.host["masks"].dtype)}

    @property
    def mask_predictor(self) -> nn.Module:
        """The last layer of the mask head."""
        return cast(nn.Module, self.roi_heads.mask_predictor)

    def pyramid(
        self, features: Mapping[str, Tensor], images: Sequence[Tensor], network_sizes: Sequence[tuple[int, int]]
    ) -> FeaturePyramid:
        """Features of a batch, placed in its images.

        Args:
            features: The backbone's maps by name, of B images padded to one size.
            images: ``(3, H, W)`` each, as they were given.
            network_sizes: ``(height, width)`` to which each was resized, before padding at the right and bottom. Sides
                are rounded one by one, so the scales in x and y differ.
        """
        ratios = [(w / image.shape[2], h / image.shape[1]) for image, (h, w) in zip(images, network_sizes, strict=True)]
        maps = self._maps(features)
        return FeaturePyramid(maps, self._strides, torch.tensor(ratios, device=maps[0].device), source=self.source)

    def _maps(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        names: Sequence[str] = cast(Any, self.roi_heads.mask_roi_pool).featmap_names
        return tuple(features[name] for name in names if name in features)

    def _measure(self) -> tuple[int, tuple[int, ...]]:
        """Channels and strides of the maps, found by running the backbone once."""
        weight = next(self.backbone.parameters())
        blank = weight.new_zeros((1, 3, PROBE_SIDE, PROBE_SIDE))
        with evaluating(self.backbone):
            features = self.backbone(blank)
        maps = self._maps({"0": features} if isinstance(features, Tensor) else features)
        strides = tuple(round(PROBE_SIDE / level.shape[3]) for level in maps)
        return FeaturePyramid(maps, strides).channels, strides

    def _wrap(self, refiner: RefinerModel, options: JointOptions) -> RefinedDetector:
        return RefinedTorchvision(self, refiner, options)


class RefinedTorchvision(RefinedDetector):
    """A torchvision Mask R-CNN with refined masks."""

    adapter: TorchvisionAdapter

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Call the detector.

        Args:
            images: ``(3, H, W)`` float in [0, 1], on the detector's device.
            targets: Needed in training: ``boxes`` ``(N, 4)`` float xyxy, ``labels`` ``(N,)`` int64 and ``masks``
                ``(N, H, W)`` uint8 or bool of each image, which may have none.

        Returns:
            In evaluation, one dict per image as from the detector, ``masks`` ``(N, 1, H, W)`` being refined. In
            training, the detector's losses, ``loss_refine`` and ``loss_incoherence``.
        """
        if self.training:
            return self._losses(images, targets)
        predictions = self.adapter.predict(images)
        refined = self.refine(predictions, None if self.uses_features else as_images(images))
        return [
            self.adapter.with_masks(prediction, instances.masks)
            for prediction, instances in zip(predictions, refined, strict=True)
        ]

    def training_losses(self, samples: Sequence[PhotoSample]) -> dict[str, Tensor]:
        """The detector's losses on photos, ``loss_refine`` and ``loss_incoherence``."""
        weight = next(self.detector.parameters())
        images = [sample.image.to(weight.dtype) / 255 for sample in samples]
        targets = [
            {
                "boxes": boxes_from_masks(sample.masks).to(weight.dtype),
                "labels": sample.labels + self.adapter.first_label,
                "masks": sample.masks.to(torch.uint8),
            }
            for sample in samples
        ]
        return self(images, targets)

    def _losses(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> dict[str, Tensor]:
        self.check_trainable()
        heads = self.adapter.roi_heads
        modules = {"heads": heads, "pool": heads.mask_roi_pool, "predictor": self.adapter.mask_predictor}
        with recording(**modules) as calls:
            losses: dict[str, Tensor] = self.detector(images, targets)
        assert targets is not None  # or the detector had refused
        features, _, network_sizes, resized = calls["heads"].args
        proposals: list[Tensor] = calls["pool"].args[1]
        # The mask head is trained on the positive ones of the sampled proposals; which true instance each belongs to
        # follows from the boxes again.
        boxes = [target["boxes"].to(proposals[0].dtype) for target in resized]
        matched, labels = heads.assign_targets_to_proposals(proposals, boxes, [target["labels"] for target in resized])
        counts = torch.tensor([len(part) for part in proposals], device=proposals[0].device)
        image = torch.repeat_interleave(counts)
        keep = self.sample(image)
        image, matched, label = image[keep], torch.cat(matched)[keep], torch.cat(labels)[keep]

        pyramid = self.adapter.pyramid(features, images, network_sizes)
        assert pyramid.scale is not None
        in_image = torch.cat(proposals)[keep].float() / pyramid.scale[image].repeat(1, 2)
        rois = self.rois(in_image)
        probs = calls["predictor"].output[keep, label].float().sigmoid()
        coarse = crop_box_masks(probs, in_image, rois, self.side)
        truth = crop_truth([target["masks"] for target in targets], matched, rois, image, 2 * self.side)
        return losses | self.refinement_losses(pyramid, rois, image, coarse, truth)
