"""DETR, Conditional DETR, Mask2Former and MaskFormer of Hugging Face transformers, and its detectors of boxes alone.

Where these hosts deviate from the package's coordinate rule: a mask map of ``h × w`` covers the whole padded input of
``H × W``, so that it is stretched by ``H / h`` even where that is not the stride; padding lies right and below, and is
cut off before a mask is read. Query models are read in raw logits: their masks may overlap, and each keeps its query's
index.

B images, Q queries, N of them kept, R RoIs of a batch. ``h w`` mask map, ``H W`` network input with its padding.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, box_iou

from transfiner_refine.adapters.joint import RefinedDetector, crop_truth
from transfiner_refine.adapters.protocol import (
    Adapter,
    JointOptions,
    Prediction,
    as_images,
    evaluating,
    missing_dependency,
    recording,
)
from transfiner_refine.adapters.transformers_hosts import (
    Size,
    host_of,
    input_sizes,
    measure_stages,
    pixel_boxes,
    resize,
    stage_maps,
    unnormalised,
)
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.inputs import as_masks, boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.types import FeaturePyramid, Instances

try:
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers.loss.loss_for_object_detection import HungarianMatcher  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise missing_dependency("transformers", "pip install 'transformers>=5.4' scipy timm") from error

LIBRARY: Any = transformers
"""The framework, which type checkers take for this file."""

POSITIVE_IOU = 0.5
"""IoU with the true box from which a predicted box is trained on; below it the true box takes its place."""

MIN_PROB = 1e-6
"""Least probability and doubt in a logit, where masks are interpolated as probabilities."""


class TransformersAdapter(Adapter):
    """Coarse masks and features of a query model of transformers.

    The features are the stages of its backbone, brought to one width by 1×1 laterals and a top-down path that belong to
    the adapter: they are trained and saved with the refiner, and mean nothing before.

    Args:
        model: One of ``transformers_hosts.HOSTS``, or a subclass.
        processor: Its image processor; None loads the one saved beside the model's weights, or takes the defaults of
            the model's kind if it was made from a configuration.
        score_threshold: Queries whose best class scores above it are instances.
        channels: Width of the features.

    Raises:
        InvalidInputError: If the model is of another kind, or its stages are no pyramid whose strides double.
    """

    name = "transformers"

    def __init__(
        self, model: nn.Module, processor: Any = None, *, score_threshold: float = 0.05, channels: int = 256
    ) -> None:
        super().__init__(model)
        self.host = host_of(model)
        self.score_threshold = score_threshold
        self._processor = processor
        self._channels = channels
        if self.host.masks is not None:
            widths, self._strides = measure_stages(self.backbone)
            self.laterals = FeaturePyramidNetwork(widths, channels).to(next(model.parameters()).device)

    @property
    def channels(self) -> int:
        """Channels of the features."""
        self._check_masks("features to refine with")
        return self._channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the features in network pixels, finest first."""
        self._check_masks("features to refine with")
        return self._strides

    @property
    def backbone(self) -> nn.Module:
        """The detector's backbone."""
        return self.model.get_submodule(self.host.backbone)

    @cached_property
    def processor(self) -> Any:
        """The image processor of the detector."""
        if self._processor is not None:
            return self._processor
        origin: str = cast(Any, self.model.config).name_or_path
        if not origin:
            return getattr(LIBRARY, self.host.processor)()
        try:
            return LIBRARY.AutoImageProcessor.from_pretrained(origin)
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"expected an image processor beside the weights in {origin!r}, got none: pass "
                "TransformersAdapter(model, processor)"
            ) from error

    def detect(self, images: Any, masks: Callable[[Any, Tensor], Any] | None = None) -> list[Prediction]:
        """Run the detector in evaluation mode, without gradients; it is left in the mode in which it was.

        Images go through one by one: padding changes what these hosts predict, and Mask2Former takes it for image.

        Args:
            images: A list of anything that :func:`~transfiner_refine.adapters.protocol.as_images` takes; the image
                processor resizes and normalises it.
            masks: Needed by a detector of boxes alone: a function of an image, as it was given, and of boxes
                ``(N, 4)`` float32 xyxy in its pixels, that returns their masks as ``Refiner.refine`` takes them.

        Returns:
            One prediction per image, of the queries that score above ``score_threshold``, in their order. A query of
            Mask2Former or MaskFormer scores as by the processor: its class times the mean probability of its mask.
            ``instances.masks`` are float, resized as the processor does it.

        Raises:
            InvalidInputError: If ``masks`` is missing, or is given for a detector that predicts masks.
        """
        if masks is None:
            self._check_masks("masks; pass masks=, a function of an image and boxes")
        elif self.host.masks is not None:
            raise InvalidInputError(f"expected masks=None for {type(self.model).__name__}, which predicts masks itself")
        predictions = []
        with evaluating(self.model):
            for given, image in zip(images, as_images(images), strict=True):
                inputs, target = self._inputs(image), (image.shape[1], image.shape[2])
                with recording(backbone=self.backbone) as calls:
                    output = self.model(**inputs)
                if masks is None:
                    padded, sizes = input_sizes(inputs["pixel_values"], inputs.get("pixel_mask"))
                    features = self.pyramid(calls["backbone"].output)
                    predictions += self.read(output, features, padded, sizes, [target])
                else:
                    predictions.append(self._read_boxes(output, target, partial(masks, given)))
        return predictions

    def read(
        self,
        output: Any,
        features: FeaturePyramid | None,
        padded: Size,
        sizes: Sequence[Size],
        targets: Sequence[Size],
        as_shown: bool = False,
    ) -> list[Prediction]:
        """Take the instances of a batch out of the host's output.

        Args:
            output: Of B images.
            features: Of the batch, in network pixels; None for predictions without.
            padded: Of the network's input.
            sizes: Of each image in the network's input, without its padding.
            targets: Of each image, in whose pixels the instances are wanted.
            as_shown: Whether queries are kept by the processor's rule for masks too, which takes a softmax even where
                scores are a sigmoid.
        """
        predictions = []
        for index, (size, target) in enumerate(zip(sizes, targets, strict=True)):
            classes, logits = output[self.host.classes][index].float(), output[self.host.masks][index].float()
            rows, columns = (-(-n * m // full) for n, m, full in zip(size, logits.shape[1:], padded, strict=True))
            logits = logits[:, :rows, :columns]
            scores, labels = self.host.best_class(classes)
            if not self.host.boxes:
                inside = logits > 0
                scores = scores * (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
            keep = scores > self.score_threshold
            if as_shown:
                keep |= classes.softmax(-1)[:, :-1].amax(-1) > self.score_threshold
            kept = keep.nonzero()[:, 0]
            probs = self.host.probs(output[self.host.masks][index, kept], padded, size, target)
            boxes = pixel_boxes(output.pred_boxes[index, kept], target) if self.host.boxes else boxes_from_masks(probs)
            own = None
            if features is not None:
                scale = torch.tensor([[size[1] / target[1], size[0] / target[0]]], device=logits.device)
                maps = tuple(level[index : index + 1] for level in features.maps)
                own = FeaturePyramid(maps, features.strides, scale, source=features.source)
            instances = Instances(boxes, probs, target, scores[kept], labels[kept])
            predictions.append(Prediction(instances, kept, own, mask_logits=logits[kept], host=output))
        return predictions

    def pyramid(self, stages: Any) -> FeaturePyramid:
        """Bring the backbone's stages to one width, in network pixels.

        Args:
            stages: What the backbone returned: feature maps, or pairs of a map and its padding mask.
        """
        assert self.laterals is not None
        maps = stage_maps(stages)
        weight = next(self.laterals.parameters())
        if weight.device != maps[0].device:  # the detector has moved since
            self.laterals.to(maps[0].device)
        merged = self.laterals(OrderedDict((str(i), level.to(weight.dtype)) for i, level in enumerate(maps)))
        return FeaturePyramid(tuple(merged.values()), self._strides, source=self.source)

    def _inputs(self, image: Tensor) -> dict[str, Tensor]:
        """Preprocess one image ``(3, H, W)`` into what the detector takes."""
        options = {} if image.dtype == torch.uint8 else {"do_rescale": False}
        inputs = self.processor(image, return_tensors="pt", input_data_format="channels_first", **options)
        weight = next(self.model.parameters())
        return {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }

    def _read_boxes(self, output: Any, target: Size, masks_of: Callable[[Tensor], Any]) -> Prediction:
        """Read one image's output of a detector of boxes, whose masks come from elsewhere."""
        scores, labels = self.host.best_class(output.logits[0].float())
        kept = (scores > self.score_threshold).nonzero()[:, 0]
        boxes = pixel_boxes(output.pred_boxes[0, kept], target)
        masks = as_masks(masks_of(boxes), target).data.to(boxes.device)
        return Prediction(Instances(boxes, masks, target, scores[kept], labels[kept]), kept, host=output)

    def _check_masks(self, lacking: str) -> None:
        if self.host.masks is None:
            kind = type(self.model).__name__
            raise InvalidInputError(f"expected a detector with masks, got {kind}, which has boxes but no {lacking}")

    def _wrap(self, refiner: RefinerModel, options: JointOptions) -> nn.Module:
        self._check_masks("masks to refine; refine those of detect(images, masks=...) with Refiner.refine")
        return RefinedTransformers(self, refiner, options)


class RefinedTransformers(RefinedDetector):
    """A query model of transformers with refined masks."""

    adapter: TransformersAdapter

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
            output.loss = output.loss + sum(losses.values())
            output.loss_dict = {**parts, **losses}
        if not self.training:
            self._write_refined(output, features, padded, arguments["pixel_values"])
        return output

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
