"""MMDetection for tests, without a compiler: ``mmcv-lite`` with the operations of Mask R-CNN taken from torchvision.

``mmcv`` keeps its operations in a C++ extension, which its light wheel lacks. What stands for it here has the three
that Mask R-CNN calls; any other raises when it is called. Then, small detectors and what they are called with.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import discs
from torch import Tensor
from torchvision.ops import nms as torchvision_nms
from torchvision.ops import roi_align


class _Extension(types.ModuleType):
    """The module ``mmcv._ext``; a name that it does not know is an operation that cannot be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"mmcv-lite has no operation {name!r}, and the tests put none in its place")

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    # With offset 1 a box reaches to the far side of its last pixel.
    return torchvision_nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


def roi_align_forward(
    maps: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    assert pool_mode == 1, "only the average"
    side = (aligned_height, aligned_width)
    output.copy_(roi_align(maps, rois, side, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    side = (aligned_height, aligned_width)
    backward = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(backward(grad_output, rois, spatial_scale, *side, *grad_input.shape, sampling_ratio, aligned))


def import_mmdet() -> Any:
    """The package ``mmdet``; skips the test without it."""
    reason = "no mmdet: pip install mmdet==3.3.0 mmcv-lite==2.1.0 mmengine==0.10.7"
    for name in ("mmengine", "mmcv", "mmdet"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(reason, allow_module_level=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("mmcv")
        if importlib.util.find_spec("mmcv._ext") is None:
            extension = _Extension("mmcv._ext")
            for function in (nms, roi_align_forward, roi_align_backward):
                setattr(extension, function.__name__, function)
            # mmengine looks for it by its spec.
            extension.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
            sys.modules["mmcv._ext"] = extension
        import_module("mmdet.models")
        return import_module("mmdet")


SMALL: dict[str, Any] = {
    "backbone": {"depth": 18, "base_channels": 16, "frozen_stages": -1, "init_cfg": None},
    "neck": {"in_channels": [16, 32, 64, 128], "out_channels": 16},
    "rpn_head": {"in_channels": 16, "feat_channels": 16},
    "roi_head": {
        "bbox_roi_extractor": {"out_channels": 16},
        "mask_roi_extractor": {"out_channels": 16},
        "bbox_head": {"in_channels": 16, "fc_out_channels": 32, "num_classes": 3},
        "mask_head": {"in_channels": 16, "conv_out_channels": 16, "num_convs": 1, "num_classes": 3},
    },
    "train_cfg": {"rcnn": {"sampler": {"num": 32}}},
    "test_cfg": {"rpn": {"nms_pre": 50, "max_per_img": 20}, "rcnn": {"score_thr": 0.0, "max_per_img": 2}},
}
"""What makes Mask R-CNN small and finds something in any image."""

MASK_RCNN = "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"


def config_path(name: str) -> Path:
    """A config file that comes with the package."""
    return Path(import_mmdet().__path__[0]) / ".mim" / "configs" / name


def small_config(name: str = MASK_RCNN, **model: Any) -> Any:
    """A config of the package for small images, with changes to its model."""
    config = import_module("mmengine.config").Config.fromfile(config_path(name))
    next(step for step in config.test_dataloader.dataset.pipeline if step.type == "Resize").scale = (192, 128)
    small = SMALL if name == MASK_RCNN else {part: SMALL[part] for part in ("backbone", "neck")}
    config.merge_from_dict({"model": small})
    config.merge_from_dict({"model": model})
    return config


def build(config: Any, seed: int = 0) -> Any:
    """A detector in evaluation mode, as from ``init_detector``, whose boxes and masks are not too small."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True):  # that there is no checkpoint
        model = import_module("mmdet.apis").init_detector(config, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("rpn_reg.weight", "fc_reg.weight")):
                weight.zero_()  # boxes are anchors
            elif name.endswith("conv_logits.weight") and "mask_head" in name:
                weight.mul_(30)
    return model


def batch_of(model: Any, images: Sequence[Tensor]) -> dict[str, list[Any]]:
    """What MMDetection's own pipeline makes of RGB images in [0, 1]: a batch as its data loaders give it."""
    steps = model.cfg.test_dataloader.dataset.pipeline.copy()
    steps[0] = {"type": "mmdet.LoadImageFromNDArray"}
    pipeline = import_module("mmcv.transforms").Compose(steps)
    items = [pipeline({"img": np.array(bgr(image)), "img_id": 0}) for image in images]
    return {name: [item[name] for item in items] for name in ("inputs", "data_samples")}


def bgr(image: Tensor) -> np.ndarray:
    """``(H, W, 3)`` uint8 of a ``(3, H, W)`` RGB image in [0, 1]."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()[:, :, ::-1]


def call(model: Any, images: Sequence[Tensor]) -> list[Any]:
    """Predictions of a detector, or of what wraps it, for RGB images in [0, 1]."""
    return model.test_step(batch_of(model, images))


def results(samples: list[Any]) -> list[dict[str, Tensor]]:
    """All that was predicted for each image."""
    assert all(type(sample) is import_module("mmdet.structures").DetDataSample for sample in samples)
    return [dict(sample.pred_instances.items()) for sample in samples]


def assert_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


CIRCLES = [(50.0, 60.0, 30.0), (110.0, 70.0, 25.0)]


def training_batch(counts: Sequence[int] = (2, 1)) -> dict[str, list[Any]]:
    """Images of two widths, each with the first of :data:`CIRCLES`, as many as ``counts`` says."""
    bitmaps = import_module("mmdet.structures.mask").BitmapMasks
    instances = import_module("mmengine.structures").InstanceData
    batch: dict[str, list[Any]] = {"inputs": [], "data_samples": []}
    for count, width in zip(counts, (160, 150), strict=True):
        circles = CIRCLES[:count]
        masks = discs(128, width, circles) if count else torch.zeros((0, 128, width), dtype=torch.bool)
        boxes = torch.tensor([[x - r, y - r, x + r, y + r] for x, y, r in circles]).reshape(-1, 4)
        meta = {"img_shape": (128, width), "ori_shape": (128, width), "scale_factor": (1.0, 1.0)}
        sample = import_module("mmdet.structures").DetDataSample(metainfo=meta)
        bits = bitmaps(masks.byte().numpy(), 128, width)
        sample.gt_instances = instances(bboxes=boxes, labels=torch.arange(count), masks=bits)
        sample.ignored_instances = instances(bboxes=boxes[:0], labels=torch.arange(0))
        batch["inputs"].append((60 + 120 * masks.any(dim=0).expand(3, -1, -1)).byte())
        batch["data_samples"].append(sample)
    return batch


def losses(model: Any, counts: Sequence[int] = (2, 1)) -> dict[str, Tensor]:
    """Losses of a step: MMDetection's, where a list is a loss of each level, without its accuracy."""
    batch = model.data_preprocessor(training_batch(counts), True)
    found = model(**batch, mode="loss")
    return {
        name: torch.stack(value).sum() if isinstance(value, list) else value
        for name, value in found.items()
        if "loss" in name
    }
