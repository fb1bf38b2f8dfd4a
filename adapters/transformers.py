"""DETR, Conditional DETR, Mask2Former and MaskFormer of Hugging Face transformers, and its detectors of boxes alone.

Where these hosts deviate from the package's coordinate rule: a mask map of ``h × w`` covers the whole padded input of
``H × W``, so that it is stretched by ``H / h`` even where that is not the stride; padding lies right and below, and is
cut off before a mask is read. Query models are read in raw logits: their masks may overlap, and each keeps its query's
index.

B images, Q queries, N of them kept, R RoIs of a batch. ``h w`` mask map, ``H W`` network input with its padding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from transfiner_refine.adapters.protocol import (
    Adapter,
    JointOptions,
    Prediction,
    as_images,
    evaluating,
    recording,
)
from transfiner_refine.adapters.transformers_hosts import (
    Size,
    host_of,
    input_sizes,
    measure_stages,
    pixel_boxes,
    stage_maps,
)
from transfiner_refine.adapters.transformers_joint import LIBRARY, RefinedTransformers
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_masks, boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.types import FeaturePyramid, Instances


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

    @property
    def class_count(self) -> int | None:
        """Classes of the detector, without "no object"."""
        return cast(Any, self.model.config).num_labels

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
