"""The released mask branch behind detectors of Detectron2 and torchvision."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import adapter_cases as cases
import pytest
import torch
import torch.nn.functional as F
from detectron2_host import import_detectron2, mask_rcnn, small_config
from released_cases import flat_checkpoint, random_branch, recorded_case
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from transfiner_refine import InvalidInputError
from transfiner_refine.adapters import adapt
from transfiner_refine.adapters.released import ReleasedMaskDetector, backbone_fingerprint, with_released
from transfiner_refine.inputs import as_image
from transfiner_refine.modeling.released import ReleasedMaskTransfiner, network_input
from transfiner_refine.modeling.released_branch import ReleasedMasks

STOP_SIGN = 11
"""Index among COCO's 80 classes; its category id is 13."""


class Pooling(nn.Module):
    """Maps of an FPN's shape that only average the image."""

    out_channels = 256

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 256, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        names = zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64), strict=True)
        return {name: self.mix(F.avg_pool2d(x, stride)) for name, stride in names}


def torchvision_detector(backbone: nn.Module | None = None, label: int = 13, limit: int = 3) -> Any:
    """Finds things of one label."""
    torch.manual_seed(0)
    model: Any = MaskRCNN(
        backbone or Pooling(),
        min_size=96,
        max_size=160,
        box_head=TwoMLPHead(256 * 49, 16),
        box_predictor=FastRCNNPredictor(16, 91),
        mask_head=MaskRCNNHeads(256, (16,), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, 91),
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
        box_score_thresh=0.5,
        box_detections_per_img=limit,
    )
    model.roi_heads.box_predictor.cls_score.bias.data[label] = 20.0
    return model.eval()


@cache
def released() -> ReleasedMaskTransfiner:
    """A detector of equal numbers, and a mask branch of random ones. Not to be changed."""
    model = ReleasedMaskTransfiner.from_original(flat_checkpoint())
    model.mask_branch = random_branch()
    return model


class Recorder(nn.Module):
    """Stands in for the mask branch: says what it was given, and finds the left half of every box."""

    def forward(self, features: Any, boxes: Any, classes: Any, max_instances: Any, *, smooth: bool) -> ReleasedMasks:
        self.given = (features, boxes, classes, max_instances, smooth)
        probs = (torch.arange(112) < 56).float().expand(len(boxes[0]), 112, 112)
        empty = torch.empty(len(boxes[0]), 28, 28)
        return ReleasedMasks(empty, empty, probs, torch.empty(0))


def images() -> list[Tensor]:
    return [cases.random_scene(height, width, seed) for seed, (height, width) in enumerate(cases.SIZES)]


def check_masks(masks: Tensor, found: Any, image_size: tuple[int, int]) -> None:
    """Of :class:`Recorder`: the left half of each box, give or take the pixels on the edges."""
    x, y = torch.arange(image_size[1]) + 0.5, torch.arange(image_size[0]) + 0.5
    for mask, (x1, y1, x2, y2) in zip(masks, found.tolist(), strict=True):
        middle, rows = (x1 + x2) / 2, (y > y1 + 1) & (y < y2 - 1)
        assert mask[rows][:, (x > x1 + 1) & (x < middle - 1)].all()
        assert not mask[:, (x < x1 - 1) | (x > middle + 1)].any() and not mask[(y < y1 - 1) | (y > y2 + 1)].any()


class TestTorchvision:
    def test_what_the_branch_is_given_and_gives(self):
        detector = torchvision_detector()
        adapter = adapt(detector)
        model: Any = with_released(adapter, released(), max_instances=2, smooth=True, check_source=False)
        model.mask_branch = recorder = Recorder()
        for image in images():
            with torch.no_grad():
                (plain,), (refined,) = detector([image]), model([image])
            assert plain.keys() == refined.keys() and len(plain["boxes"]) == 3
            for name in ("boxes", "labels", "scores"):
                assert torch.equal(plain[name], refined[name])
            assert refined["masks"].shape == plain["masks"].shape and refined["masks"].dtype == plain["masks"].dtype
            check_masks(refined["masks"][:, 0] >= 0.5, plain["boxes"], (image.shape[1], image.shape[2]))

            (maps, boxes, classes, limit, smooth), (prediction,) = recorder.given, adapter.detect([image])
            assert prediction.features is not None
            assert all(torch.equal(a, b) for a, b in zip(maps, prediction.features.maps, strict=True))
            (resized,) = detector.transform([image])[0].image_sizes
            scale = torch.tensor([resized[1] / image.shape[2], resized[0] / image.shape[1]]).repeat(2)
            torch.testing.assert_close(boxes[0], plain["boxes"] * scale)
            assert classes[0].tolist() == 3 * [STOP_SIGN] and (limit, smooth) == (2, True)

    def test_the_backbone_of_the_checkpoint_is_known_by_its_weights(self):
        class Renamed(nn.Module):
            out_channels = 256

            def __init__(self) -> None:
                super().__init__()
                self.body = released().backbone
                self.register_buffer("num_batches_tracked", torch.tensor(3))

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return dict(zip(("0", "1", "2", "3", "pool"), self.body(x.flip(1)), strict=True))

        assert backbone_fingerprint(Renamed()) == backbone_fingerprint(released().backbone)
        model = with_released(adapt(torchvision_detector(Renamed())), released())
        assert isinstance(model, ReleasedMaskDetector) and not model.training

    def test_labels_of_other_detectors(self):
        adapter = adapt(torchvision_detector(label=12))  # which COCO skips
        with pytest.raises(InvalidInputError, match=r"labels of COCO's classes, got \[12\]: pass labels="):
            with_released(adapter, released(), check_source=False)(images()[:1])
        model: Any = with_released(adapter, released(), labels=range(1, 81), check_source=False)
        model.mask_branch = recorder = Recorder()
        model(images()[:1])
        assert recorder.given[2][0].tolist() == 3 * [STOP_SIGN]
        with pytest.raises(InvalidInputError, match="labels of COCO's 80 classes, all different, got"):
            with_released(adapter, released(), labels=[1, 2, 2], check_source=False)

    def test_batch_equals_one_by_one_and_nothing_found(self):
        model: Any = with_released(adapt(torchvision_detector(limit=1)), released(), check_source=False)
        together = model(images())
        for image, expected in zip(images(), together, strict=True):
            (alone,) = model([image])
            assert expected["masks"].any() and torch.equal(alone["masks"], expected["masks"])
        model.detector.roi_heads.score_thresh = 1.0
        (empty,) = model(images()[:1])
        assert empty["masks"].shape == (0, 1, 97, 131)

    def test_other_features_are_refused(self):
        adapter = adapt(torchvision_detector())
        message = r"that the released mask branch was trained with, SHA-256 ([0-9a-f]{64}), got those of (?!\1)"
        with pytest.raises(InvalidInputError, match=message):
            with_released(adapter, released())
        with pytest.raises(InvalidInputError, match="expected a detector of detectron2 or torchvision, got one of mm"):
            with_released(type("MMDetAdapter", (type(adapter),), {"name": "mmdet"})(adapter.model), released())
        detector = torchvision_detector()
        detector.roi_heads.mask_roi_pool.featmap_names = ["0", "1", "2"]
        with pytest.raises(
            InvalidInputError, match=r"strides \(4, 8, 16, 32\), .* 256 channels at strides \(4, 8, 16\)"
        ):
            with_released(adapt(detector), released())

    def test_training_is_refused(self):
        model = with_released(adapt(torchvision_detector()), released(), check_source=False).train()
        with pytest.raises(InvalidInputError, match="evaluation mode"):
            model(images())


def test_fingerprint():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    assert backbone_fingerprint(nn.Sequential(first, second)) == backbone_fingerprint(nn.Sequential(second, first))
    before = backbone_fingerprint(first)
    first.weight.data[0, 0] += 1e-6
    assert backbone_fingerprint(first) != before
    flat = nn.Conv2d(3, 3, 1)
    flat.weight.data = first.weight.data.reshape(3, 1, 3, 1)
    flat.bias = first.bias
    assert backbone_fingerprint(flat) != backbone_fingerprint(first)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
class TestDetectron2:
    def test_what_the_branch_is_given_and_gives(self):
        import_detectron2()
        config = small_config("MODEL.FPN.OUT_CHANNELS", 256, "MODEL.ROI_HEADS.NUM_CLASSES", 80)
        detector = import_module("detectron2.modeling").build_model(config).eval()
        detector.roi_heads.box_predictor.cls_score.bias.data[STOP_SIGN] = 1e4
        model: Any = with_released(adapt(detector), released(), check_source=False)
        model.mask_branch = recorder = Recorder()
        for image in images():
            resized = F.interpolate(255 * image[None], scale_factor=1.5, mode="bilinear")[0]
            given = [{"image": resized, "height": image.shape[1], "width": image.shape[2]}]
            with torch.no_grad():
                (plain,), (refined,) = detector(given), model(given)
                (raw,) = detector.inference(given, do_postprocess=False)
            before, after = plain["instances"].get_fields(), refined["instances"].get_fields()
            assert before.keys() == after.keys() and len(before["scores"]) == 4
            assert torch.equal(before["pred_boxes"].tensor, after["pred_boxes"].tensor)
            assert torch.equal(before["scores"], after["scores"]) and after["pred_masks"].dtype == torch.bool
            check_masks(after["pred_masks"], after["pred_boxes"].tensor, (image.shape[1], image.shape[2]))
            _, boxes, classes, _, _ = recorder.given
            torch.testing.assert_close(boxes[0], raw.pred_boxes.tensor)
            assert classes[0].tolist() == 4 * [STOP_SIGN]

    @pytest.mark.slow
    @torch.no_grad()
    def test_the_converted_detector_gives_the_released_masks(self, data_root: Path):
        """Stock Detectron2 with a checkpoint's detector, the branch behind it, against the whole released model."""
        import_detectron2()
        case = recorded_case("full_r50")
        weights = case.weights("keys_r50.json")
        model = ReleasedMaskTransfiner.from_original(
            weights, score_threshold=0.03, detections_per_image=5, min_size=320
        )
        host = mask_rcnn(min_size=320, score_threshold=0.03, limit=5)
        with pytest.raises(InvalidInputError, match="transfiner-refine convert"):
            with_released(adapt(host), model)
        host.load_state_dict({name: weights[name] for name in host.state_dict()})
        image = as_image(data_root / case.settings["image"])
        expected = model(image)
        given = {"image": network_input(image, 320), "height": image.shape[1], "width": image.shape[2]}
        (output,) = with_released(adapt(host), model)([given])
        found = output["instances"]
        torch.testing.assert_close(found.pred_boxes.tensor, expected.boxes, atol=2e-3, rtol=0)
        assert found.pred_classes.tolist() == expected.labels.tolist()
        assert float((found.pred_masks != expected.masks).float().mean()) < 1e-5
