"""Query models of Hugging Face transformers with refined masks: see :mod:`transfiner_refine.adapters.transformers`.

B images, Q queries, N of them kept, R RoIs of a batch. ``h w`` mask map, ``H W`` network input with its padding.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from transfiner_refine.adapters.joint import RefinedDetector, crop_truth
from transfiner_refine.adapters.protocol import missing_dependency, recording
from transfiner_refine.adapters.transformers_hosts import (
    Size,
    input_sizes,
    pixel_boxes,
    resize,
    training_input,
    unnormalised,
)
from transfiner_refine.data.photos import PhotoSample
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.types import FeaturePyramid

try:
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers.loss.loss_for_object_detection import HungarianMatcher  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise missing_dependency("transformers", "pip install 'transformers>=5.4' scipy timm") from error

LIBRARY: Any = transformers
"""The framework, which type checkers take for this file."""

MIN_PROB = 1e-6
"""Least probability and doubt in a logit, where masks are interpolated as probabilities."""

POSITIVE_IOU = 0.5
"""IoU with the true box from which a predicted box is trained on; below it the true box takes its place."""


class RefinedTransformers(RefinedDetector):
    """A query model of transformers with refined masks."""

    adapter: Any
    """The :class:`~transfiner_refine.adapters.transformers.TransformersAdapter`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the detector.

        Args:
            *args: As the detector takes them.
            **kwargs: As the detector takes them: ``pixel_values``, ``pixel_mask``, and for training ``labels``, or
                ``mask_labels`` and ``class_labels``.

        Returns:
            The detector's own output. In evaluation its mask logits have the size of ``pixel_values`` and no gradient:
            refined for all queries that score above the adapter's ``score_threshold``, enlarged as by the processor
            for the others. With labels, ``loss`` includes ``loss_refine`` and ``loss_incoherence``, and ``loss_dict``
            names them; in evaluation only for a refiner on the detector's features. ``image_sizes`` holds each image's
            height and width in the network's input, which :meth:`post_process_instance_segmentation` needs.

        Raises:
            InvalidInputError: If a tuple is asked for as output, or the refiner cannot be trained with the detector.
        """
        arguments = inspect.signature(self.detector.forward).bind(*args, **kwargs).arguments
        if self.training and any(arguments.get(name) is not None for name in ("labels", "mask_labels")):
            self.check_trainable()
        modules = {"backbone": self.adapter.backbone}
        if hasattr(self.detector, "criterion"):
            modules["criterion"] = self.detector.get_submodule("criterion")
        with recording(**modules) as calls:
            output = self.detector(*args, **kwargs)
        if isinstance(output, tuple):
            raise InvalidInputError("expected an output with named fields, got a tuple: leave out return_dict=False")
        padded, output.image_sizes = input_sizes(arguments["pixel_values"], arguments.get("pixel_mask"))
        features = self.adapter.pyramid(calls["backbone"].output) if self.training or self.uses_features else None
        if output.loss is not None and features is not None:
            parts = calls["criterion"].output if "criterion" in calls else output.loss_dict
            losses = self._losses(output, features, padded, arguments)
            output.refinement_losses = losses
            output.loss = output.loss + sum(losses.values())
            output.loss_dict = {**parts, **losses}
        if not self.training:
            self._write_refined(output, features, padded, arguments["pixel_values"])
        return output

    def training_losses(self, samples: Sequence[PhotoSample]) -> dict[str, Tensor]:
        """``loss_detector``, all of the detector's own together, ``loss_refine`` and ``loss_incoherence`` of photos."""
        with _by_itself():
            output = self(**training_input(self.adapter.host, self.adapter.processor, samples))
        own: dict[str, Tensor] = output.refinement_losses
        return {"loss_detector": output.loss - sum(own.values()), **own}

    def post_process_instance_segmentation(
        self, outputs: Any, threshold: float = 0.5, *, target_sizes: Sequence[Any] | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Do what the image processor's method of this name does, at the full resolution of the refined masks.

        Unlike the processor, this cuts padding off, and does not pass the masks of Mask2Former through 384 × 384; the
        scores of Mask2Former and MaskFormer, which average over a mask, differ accordingly.

        Args:
            outputs: Of this module in evaluation.
            threshold: Score from which an instance is shown; at least the adapter's for all of them to be refined.
            target_sizes: ``(height, width)`` of each result; None for those in the network's input.
            **options: Of the processor's method: ``mask_threshold``, ``return_coco_annotation`` ...

        Returns:
            One dict per image, with ``segmentation`` and ``segments_info``.

        Raises:
            InvalidInputError: If the outputs are not of this module, or ``target_sizes`` are not as many.
        """
        host = self.adapter.host
        sizes: list[Size] | None = getattr(outputs, "image_sizes", None)
        if sizes is None:
            raise InvalidInputError(f"expected outputs of this module, got {type(outputs).__name__} of another")
        targets = sizes if target_sizes is None else [(int(height), int(width)) for height, width in target_sizes]
        if len(targets) != len(sizes):
            raise InvalidInputError(f"expected a target size for each of {len(sizes)} images, got {len(targets)}")
        assert host.masks is not None
        # MaskFormer's is Mask2Former's without the detour through 384 × 384.
        name = host.processor.replace("Mask2Former", "MaskFormer")
        post_process = getattr(LIBRARY, name)().post_process_instance_segmentation
        results = []
        for index, (size, target) in enumerate(zip(sizes, targets, strict=True)):
            masks = outputs[host.masks][index, :, : size[0], : size[1]].float()
            if host.resized == "logits":
                masks = resize(masks, size, size, target)
            one = {host.classes: outputs[host.classes][index : index + 1], host.masks: masks[None]}
            results += post_process(SimpleNamespace(**one), threshold, target_sizes=[target], **options)
        return results

    @torch.no_grad()
    def _write_refined(self, output: Any, features: FeaturePyramid | None, padded: Size, pixel_values: Tensor) -> None:
        """Replace the mask logits by refined ones of the size of the input."""
        adapter, sizes = self.adapter, output.image_sizes
        predictions = adapter.read(output, features, padded, sizes, sizes, as_shown=True)
        images = None if features is not None else unnormalised(adapter.processor, pixel_values, sizes)
        refined = self.refine(predictions, images)
        logits = output[adapter.host.masks]
        enlarged = logits.new_empty((*logits.shape[:2], *padded))
        for index, (prediction, instances, (rows, columns)) in enumerate(zip(predictions, refined, sizes, strict=True)):
            if adapter.host.resized == "logits":
                enlarged[index] = resize(logits[index].float(), padded, padded, padded)
            else:
                enlarged[index] = torch.logit(adapter.host.probs(logits[index], padded, padded, padded), MIN_PROB)
            coarse = enlarged[index, prediction.indices, :rows, :columns]
            changed = instances.masks != prediction.instances.masks
            after = torch.logit(instances.masks, MIN_PROB).to(coarse.dtype)
            enlarged[index, prediction.indices, :rows, :columns] = torch.where(changed, after, coarse)
        output[adapter.host.masks] = enlarged

    def _losses(
        self, output: Any, features: FeaturePyramid, padded: Size, arguments: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The refinement losses of the queries that the host's matcher pairs with true instances.

        A RoI is the query's own box where that is a positive proposal, and the true box elsewhere.
        """
        host = self.adapter.host
        logits = output[host.masks]
        given = [label["masks"] for label in arguments["labels"]] if host.boxes else arguments["mask_labels"]
        # Mask2Former's processor may fill the padding of a mask with its ignore_index.
        truth = [masks.to(logits.device) == 1 for masks in given]
        pairs = [(query.to(logits.device), true.to(logits.device)) for query, true in self._match(output, arguments)]
        image = torch.repeat_interleave(torch.tensor([len(query) for query, _ in pairs], device=logits.device))
        query, matched = (torch.cat(part) for part in zip(*pairs, strict=True))
        true_boxes = torch.cat([boxes_from_masks(masks)[true] for masks, (_, true) in zip(truth, pairs, strict=True)])
        present = (true_boxes[:, 2] > 0).nonzero()[:, 0]  # a mask may be gone after resizing
        keep = present[self.sample(image[present])]
        image, query, matched, true_boxes = image[keep], query[keep], matched[keep], true_boxes[keep]

        rois, coarse = [], []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.joint.detach_coarse):
            for index, size in enumerate(output.image_sizes):
                here = image == index
                probs = self.adapter.host.probs(logits[index, query[here]], padded, size, size)
                own = output.pred_boxes[index, query[here]].detach() if host.boxes else probs.detach()
                boxes = pixel_boxes(own, size) if host.boxes else boxes_from_masks(own)
                positive = box_iou(boxes, true_boxes[here]).diagonal() >= POSITIVE_IOU
                rois.append(self.rois(torch.where(positive[:, None], boxes, true_boxes[here])))
                coarse.append(crop_masks(probs, rois[-1], self.side))
        rois = torch.cat(rois)
        return self.refinement_losses(
            features, rois, image, torch.cat(coarse), crop_truth(truth, matched, rois, image, 2 * self.side)
        )

    def _match(self, output: Any, arguments: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Pair queries and true instances of each image by the host's own matcher, which its loss keeps to itself."""
        host, detector = self.adapter.host, self.detector
        if host.boxes:
            config: Any = detector.config
            matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
            outputs = {"logits": output.logits.float(), "pred_boxes": output.pred_boxes.float()}
            return matcher(outputs, arguments["labels"])
        matcher = detector.get_submodule("criterion.matcher")
        return matcher(output[host.masks], output[host.classes], arguments["mask_labels"], arguments["class_labels"])


@contextmanager
def _by_itself() -> Iterator[None]:
    """Hide the other processes from the host's losses for the length of a block.

    Those divide by the objects of all processes, and by the number of processes once more after a mean: two processes
    would learn from losses of up to twice the size that one learns from. The training loop takes the mean itself.
    """
    if (accelerate := sys.modules.get("accelerate.state")) is None:
        yield
        return
    kind = accelerate.PartialState
    shared = vars(kind)["_shared_state"]  # on a TPU a descriptor, which getattr would not give
    kind._shared_state = {}
    try:
        yield
    finally:
        kind._shared_state = shared
