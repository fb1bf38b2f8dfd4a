# pyright: reportMissingImports=false
"""MMDetection 3: every instance segmentation model that predicts masks.

A detector with a RoI head (Mask R-CNN, Cascade, HTC, PointRend, ...) gives the maps of its neck and box-frame
probabilities, and is trained jointly with a refiner. Others (SOLOv2, RTMDet-Ins, Mask2Former, ...) are refined on the
image: they give no features and no joint training.

MMDetection keeps the package's coordinate rule: continuous pixels, ``aligned=True``, ``align_corners=False``. Its
pipelines read BGR, resize by ``scale_factor`` (width, height) and pad at the right and below.

In a config, three lines put a refiner behind the detector that the base config describes::

    _base_ = "mask-rcnn_r50_fpn_1x_coco.py"
    custom_imports = dict(imports=["transfiner_refine.adapters.mmdet"])
    model = dict(type="TransfinerDetector", detector="MaskRCNN", refiner=dict(depth=3), joint=dict(train="all"))
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from transfiner_refine.config import ROOT_SIDE, RefineOptions
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.paste import crop_box_masks
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.training.losses import LossConfig
from transfiner_refine.types import FeaturePyramid, Instances

try:
    from mmcv.transforms import Compose
    from mmdet.models.detectors import BaseDetector
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import bbox2roi, get_box_tensor
    from mmdet.utils import get_test_pipeline_cfg
    from mmengine.registry import DefaultScope
except ImportError as error:
    raise missing_dependency(
        "MMDetection 3", f"pip install mmdet==3.3.0 mmengine, and mmcv below 2.2 with its operations ({error})"
    ) from error

POINT_ROIS = 16
"""RoIs whose masks PointRend's points are drawn into at once, for all classes, in training (0.3 GB with COCO's 80)."""


class MMDetAdapter(Adapter):
    """Coarse masks of an MMDetection model; features and box-frame probabilities where it has a RoI head.

    Args:
        model: A detector with masks, from ``init_detector`` or ``MODELS.build``.

    Raises:
        InvalidInputError: If it is no MMDetection detector, or its RoI head has no mask head.
    """

    name = "mmdet"
    trainer = "MMDetection's own Runner (docs/adapters/mmdet.md)"

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, BaseDetector):
            raise InvalidInputError(
                f"expected an MMDetection detector, got {type(model).__name__}: pass what init_detector returns"
            )
        super().__init__(model)
        self.detector: Any = model  # typed by MMDetection as a module without heads
        if self.roi_head is not None and not self.roi_head.with_mask:
            raise InvalidInputError(
                f"expected a detector with a mask head, got {type(model).__name__} without: use Mask R-CNN, or refine "
                "masks from elsewhere with Refiner.refine"
            )

    @property
    def roi_head(self) -> Any:
        """The detector's RoI head, or None."""
        return getattr(self.detector, "roi_head", None)

    @property
    def mask_head(self) -> Any:
        """The mask head whose masks are the result: of a cascade the last stage's."""
        return _last(self.roi_head.mask_head)

    @property
    def channels(self) -> int:
        """Channels of every map of the neck."""
        return self._extractor.out_channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the maps that boxes are pooled from, finest first."""
        return tuple(self._extractor.featmap_strides)

    @property
    def backbone(self) -> nn.Module:
        """What ``train="heads"`` freezes; the neck is trained with the heads."""
        return self.detector.backbone

    @property
    def features(self) -> nn.Module:
        """The module whose output the heads share: the neck, or the backbone of a detector without."""
        return self.detector.neck if self.detector.with_neck else self.detector.backbone

    @property
    def _extractor(self) -> Any:
        """The pooler that says which maps there are; PointRend's pooler for masks sees the finest alone."""
        if self.roi_head is None:
            raise InvalidInputError(
                f"expected a detector with a RoI head, whose features a refiner can share, got {self.source!r}: use a "
                "refiner with an image encoder, such as Refiner.from_pretrained()"
            )
        return _last(self.roi_head.bbox_roi_extractor)

    def detect(self, images: Any) -> list[Prediction]:
        """Run the detector in evaluation mode, without gradients; it is left in the mode in which it was.

        Args:
            images: A batch of MMDetection's data loaders, ``{"inputs": ..., "data_samples": ...}``; or a list of images
                as ``Refiner.refine`` takes them, RGB (where ``inference_detector`` takes BGR), which go through the
                test pipeline of the detector's config.

        Raises:
            InvalidInputError: If they are no images, the detector has no config to prepare them by, or gives no masks.
        """
        batch = dict(images) if isinstance(images, Mapping) else self._prepare(as_images(images))
        if not len(batch["inputs"]):
            return []
        with evaluating(self.detector):
            batch = self.detector.data_preprocessor(batch, False)
            return self.predict(batch["inputs"], batch["data_samples"])

    def predict(self, inputs: Tensor, samples: Sequence[DetDataSample], rescale: bool = True) -> list[Prediction]:
        """Run the detector's own ``predict``, see :meth:`RefinedMMDet.predict`, and read what is behind its masks."""
        if self.roi_head is None:
            results = self.detector.predict(inputs, samples, rescale=rescale)
            return [self._prediction(result, None, None) for result in results]
        with recording(features=self.features) as calls, _listening(self.mask_head, "predict_by_feat") as heard:
            results = self.detector.predict(inputs, samples, rescale=rescale)
        maps, strides = calls["features"].output, self.strides
        predictions = []
        for index, result in enumerate(results):
            scale = inputs.new_tensor([result.scale_factor if rescale else (1.0, 1.0)], dtype=torch.float32)
            levels = tuple(level[index : index + 1] for level in maps[: len(strides)])
            pyramid = FeaturePyramid(levels, strides, scale, source=self.source)
            probs = torch.zeros((0, ROOT_SIDE, ROOT_SIDE), device=inputs.device)  # the head is not called without a box
            if heard:
                preds, activated = heard[-1]["mask_preds"][index], heard[-1]["activate_map"]
                probs = _class_probs(preds, result.pred_instances.labels, activated)
            predictions.append(self._prediction(result, pyramid, probs))
        return predictions

    def _prediction(self, result: DetDataSample, features: FeaturePyramid | None, probs: Tensor | None) -> Prediction:
        found: Any = result.pred_instances
        if "masks" not in found:
            raise InvalidInputError(
                f"expected a detector that gives masks, got {self.source!r}, which gives {sorted(found.keys())}: "
                "use an instance segmentation model, or refine masks from elsewhere with Refiner.refine"
            )
        boxes = get_box_tensor(found.bboxes).float()
        # SOLO gives boxes without area, because it has none.
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
        if probs is None and not bool(has_area.all()):
            boxes = torch.where(has_area, boxes, boxes_from_masks(found.masks))
        height, width = found.masks.shape[1:]
        return Prediction(
            instances=Instances(boxes, found.masks, (height, width), found.scores, found.labels),
            indices=torch.arange(len(boxes), device=boxes.device),
            features=features,
            box_probs=probs,
            host=result,
        )

    def _prepare(self, images: Sequence[Tensor]) -> dict[str, list[Any]]:
        """Take RGB images through the test pipeline of the detector's config, as ``inference_detector`` does."""
        config = getattr(self.detector, "cfg", None)
        if config is None:
            raise InvalidInputError(
                "expected a detector with its config, which says how images are resized, got one without: set "
                "detector.cfg as init_detector does, or pass a batch of your own pipeline"
            )
        steps = get_test_pipeline_cfg(config.copy())
        steps[0].type = "mmdet.LoadImageFromNDArray"
        with DefaultScope.overwrite_default_scope("mmdet"):
            pipeline = Compose(steps)
        batch: dict[str, list[Any]] = {"inputs": [], "data_samples": []}
        for index, image in enumerate(images):
            pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
            bgr = pixels.flip(0).permute(1, 2, 0).contiguous().numpy(force=True)
            item: Any = pipeline({"img": bgr, "img_id": index})
            for name, values in batch.items():
                values.append(item[name])
        return batch

    def images(self, inputs: Tensor, samples: Sequence[Any], rescale: bool = True) -> list[Tensor]:
        """Undo padding, normalisation, channel order and, with ``rescale``, the size of the network's input.

        Returns:
            ``(3, H, W)`` float32 RGB in [0, 1] each.
        """
        done: Any = self.detector.data_preprocessor
        images = []
        for pixels, sample in zip(inputs.float(), samples, strict=True):
            height, width = sample.img_shape[:2]
            image = pixels[:, :height, :width]
            if done._enable_normalize:
                image = image * done.std + done.mean
            if not done._channel_conversion:
                image = image.flip(0)  # BGR is what MMDetection reads
            if rescale:
                image = F.interpolate(image[None], tuple(sample.ori_shape[:2]), mode="bilinear", antialias=True)[0]
            images.append((image / 255).clamp(0, 1))
        return images

    def _wrap(self, refiner: RefinerModel, options: JointOptions) -> nn.Module:
        return RefinedMMDet(self, refiner, options)


class RefinedMMDet(RefinedDetector, BaseDetector):
    """An MMDetection model with refined masks; ``inference_detector``, ``Runner`` and its loops take it as one.

    Attributes:
        from_config: Whether the detector was built from a config and starts from its own initialisation.
    """

    adapter: MMDetAdapter
    from_config = False

    def __init__(self, adapter: MMDetAdapter, refiner_model: RefinerModel, joint: JointOptions) -> None:
        super().__init__(adapter, refiner_model, joint)
        self.data_preprocessor = adapter.detector.data_preprocessor
        for name in ("cfg", "dataset_meta"):  # what init_detector left, for inference_detector
            if hasattr(adapter.detector, name):
                setattr(self, name, getattr(adapter.detector, name))

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Call the detector as MMDetection does: ``mode`` is ``"predict"``, ``"loss"`` or ``"tensor"``."""
        return BaseDetector.forward(self, inputs, data_samples, mode)

    def predict(self, batch_inputs: Tensor, batch_data_samples: Any, rescale: bool = True) -> list[DetDataSample]:
        """Detect and refine.

        Args:
            batch_inputs: ``(B, 3, H, W)`` float, the network's input.
            batch_data_samples: ``DetDataSample`` of each image; the predictions are written into them.
            rescale: Whether boxes and masks are in the original image's pixels, rather than the network's.

        Returns:
            The samples, as the detector returns them; ``pred_instances.masks`` are refined.
        """
        predictions = self.adapter.predict(batch_inputs, batch_data_samples, rescale)
        results = [prediction.host for prediction in predictions]
        images = None if self.uses_features else self.adapter.images(batch_inputs, results, rescale)
        for result, refined in zip(results, self.refine(predictions, images), strict=True):
            result.pred_instances.masks = refined.masks
        return results

    def loss(self, batch_inputs: Tensor, batch_data_samples: Any) -> dict[str, Any]:
        """Compute the detector's losses and the refinement losses on the RoIs that its mask head is trained on.

        Args:
            batch_inputs: ``(B, 3, H, W)`` float, the network's input.
            batch_data_samples: ``DetDataSample`` of each image, with ``gt_instances``; there may be none in an image.

        Returns:
            The detector's losses, ``loss_refine`` and ``loss_incoherence``.

        Raises:
            InvalidInputError: If the detector has no RoI head, or the refiner does not read its features.
        """
        adapter = self.adapter
        strides = adapter.strides
        self.check_trainable()
        with recording(features=adapter.features) as calls, _listening(adapter.mask_head, "loss_and_target") as heard:
            losses = adapter.detector.loss(batch_inputs, batch_data_samples)
        call = heard[-1]
        sampled = call["sampling_results"]
        boxes = torch.cat([get_box_tensor(part.pos_priors) for part in sampled])
        labels = torch.cat([part.pos_gt_labels for part in sampled])
        matched = torch.cat([part.pos_assigned_gt_inds for part in sampled])
        image = torch.repeat_interleave(torch.tensor([len(part.pos_priors) for part in sampled], device=boxes.device))
        keep = self.sample(image)
        boxes, image = boxes[keep], image[keep]
        rois = self.rois(boxes)
        maps = calls["features"].output
        probs = self._coarse(maps, call["mask_preds"][keep], labels[keep], boxes, image)
        coarse = crop_box_masks(probs, boxes, rois, self.side)
        # True masks are in the network's pixels, as boxes are: both went through the same pipeline.
        masks = [instances.masks.to_tensor(torch.bool, boxes.device) for instances in call["batch_gt_instances"]]
        truth = crop_truth(masks, matched[keep], rois, image, 2 * self.side)
        pyramid = FeaturePyramid(maps[: len(strides)], strides, source=adapter.source)
        return losses | self.refinement_losses(pyramid, rois, image, coarse, truth)

    def _coarse(self, maps: Sequence[Tensor], preds: Tensor, labels: Tensor, boxes: Tensor, image: Tensor) -> Tensor:
        """Coarse masks as inference has them, of the true classes: ``(R, S, S)`` float32 probabilities, box frame.

        A mask head is trained on what it predicts, but for PointRend's: its 7×7 masks become the result only when the
        point head has drawn its points into them.

        Args:
            maps: Of B images, as the RoI head takes them.
            preds: ``(R, classes, s, s)`` float, what the mask head gave.
            labels: ``(R,)`` int64, true classes.
            boxes: ``(R, 4)`` float xyxy, network pixels.
            image: ``(R,)`` int64, ascending.
        """
        head = self.adapter.roi_head
        if not hasattr(head, "point_head"):
            return _class_probs(preds, labels)
        parts: list[Tensor] = []
        with evaluating(head), torch.set_grad_enabled(not self.joint.detach_coarse):
            for index in image.unique().tolist():
                of_image = [level[index : index + 1] for level in maps]
                for here in (image == index).nonzero()[:, 0].split(POINT_ROIS):
                    known = labels[here]
                    drawn = head._mask_point_forward_test(of_image, bbox2roi([boxes[here]]), known, preds[here])
                    parts.append(_class_probs(drawn, known))
        return torch.cat(parts) if parts else preds.new_zeros((0, ROOT_SIDE, ROOT_SIDE), dtype=torch.float32)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        """Compute the detector's features."""
        return self.adapter.detector.extract_feat(batch_inputs)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> Any:
        return self.adapter.detector._forward(batch_inputs, batch_data_samples)

    def init_weights(self) -> None:
        """Initialise a detector that a config has just described; one that was given or loaded keeps its weights."""
        if self.from_config:
            self.adapter.detector.init_weights()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take a checkpoint of the detector alone, too."""
        own = (f"{prefix}detector.", f"{prefix}refiner_model.")
        if not any(key.startswith(own) for key in state_dict):
            for key in [key for key in state_dict if key.startswith(prefix)]:
                state_dict[f"{prefix}detector.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@MODELS.register_module(name="TransfinerDetector")
def build_refined_detector(
    detector: str,
    refiner: Mapping[str, Any] | str | None = None,
    joint: Mapping[str, Any] | None = None,
    **host: Any,
) -> nn.Module:
    """Build a detector with a refiner from a config; the entry ``TransfinerDetector`` of MMDetection's registry.

    Args:
        detector: ``type`` of the detector, such as ``"MaskRCNN"``.
        refiner: Fields of ``TransfinerConfig`` for a new refiner on its features that differ from the paper's; or a
            directory that ``save_pretrained`` wrote, with the detector in it.
        joint: Arguments of :meth:`MMDetAdapter.with_refiner`; ``options`` and ``loss`` as dicts.
        **host: The detector's own config.

    Raises:
        InvalidInputError: If the detector has no masks or no RoI head, or an argument is out of range.
        WeightsError: If a file in the directory is missing, damaged, or of another architecture.
    """
    adapter = MMDetAdapter(MODELS.build({"type": detector, **host}))
    arguments = dict(joint or {})
    for name, kind in (("options", RefineOptions), ("loss", LossConfig)):
        if name in arguments:
            arguments[name] = kind(**arguments[name])
    if isinstance(refiner, str):
        return adapter.with_refiner(refiner, **arguments)
    model: Any = adapter.with_refiner(Refiner(RefinerModel(adapter.config(**(refiner or {})))), **arguments)
    model.from_config = True
    return model


def _last(stages: Any) -> Any:
    return stages[-1] if isinstance(stages, nn.ModuleList) else stages


def _class_probs(preds: Tensor, labels: Tensor, activated: bool = False) -> Tensor:
    """Probabilities ``(N, S, S)`` float32 of each box's own class.

    Args:
        preds: ``(N, classes, S, S)`` float, or ``(N, 1, S, S)`` of a head that knows no classes.
        labels: ``(N,)`` int64.
        activated: Whether ``preds`` are probabilities already, as a cascade's average is.
    """
    of_label = preds[:, 0] if preds.shape[1] == 1 else preds[torch.arange(len(preds), device=preds.device), labels]
    return of_label.float() if activated else of_label.float().sigmoid()


class _Listener:
    """Stands in for a module's method while threads listen to its arguments, each to its own calls alone.

    Args:
        head: The module.
        method: Name of the method.

    Attributes:
        replaced: What stood in for the method before, or None.
        heard: The thread and the notes of each block that listens.
    """

    def __init__(self, head: nn.Module, method: str) -> None:
        self.original = getattr(head, method)
        self.replaced = vars(head).get(method)
        self.heard: list[tuple[int, list[dict[str, Any]]]] = []
        self._signature = inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        for thread, notes in tuple(self.heard):
            if thread == get_ident():
                notes.append(call.arguments)
        return self.original(*args, **kwargs)


_LISTENERS = Lock()
"""Held while listeners come and go."""


@contextmanager
def _listening(head: nn.Module, method: str) -> Iterator[list[dict[str, Any]]]:
    """Note the arguments of each call of a module's method, which a hook does not see, for the length of a block.

    Calls from other threads are not noted, so that a detector can serve several at once. The method is itself again
    when the last block has ended; what others put in its place in the meantime stays.
    """
    notes: list[dict[str, Any]] = []
    entry = (get_ident(), notes)
    with _LISTENERS:
        listener = vars(head).get(method)
        if not isinstance(listener, _Listener):
            listener = _Listener(head, method)
            setattr(head, method, listener)
        listener.heard.append(entry)
    try:
        yield notes
    finally:
        with _LISTENERS:
            # By identity: the notes of two blocks of a thread may be equal.
            listener.heard[:] = [other for other in listener.heard if other is not entry]
            if not listener.heard and vars(head).get(method) is listener:
                delattr(head, method)
                if listener.replaced is not None:
                    setattr(head, method, listener.replaced)
