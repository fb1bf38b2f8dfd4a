"""Mask R-CNN of torchvision behind its adapter."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import adapter_cases as cases
import pytest
import torch
from PIL import Image
from small_models import discs, encoder_config, eventful_model, random_image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from transfiner_refine import InvalidInputError, Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.adapters.torchvision import RefinedTorchvision, TorchvisionAdapter
from transfiner_refine.functional.incoherence import dilate
from transfiner_refine.functional.paste import crop_masks, paste
from transfiner_refine.inputs import boxes_from_masks

WIDTH = 16


class TinyBackbone(nn.Module):
    """Four stages of one convolution and a batch norm each, and an FPN."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        strides = [(3, 4), (WIDTH, 2), (WIDTH, 2), (WIDTH, 2)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, WIDTH, 5, stride, 2), nn.BatchNorm2d(WIDTH), nn.ReLU())
            for inputs, stride in strides
        )
        self.fpn = FeaturePyramidNetwork([WIDTH] * 4, WIDTH, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = OrderedDict()
        for name, stage in enumerate(self.stages):
            stages[str(name)] = x = stage(x)
        return self.fpn(stages)


class DiscPredictor(MaskRCNNPredictor):
    """Gives every instance a disc, beside what it has learnt: without training there would be no outline to look at."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, 3)
        y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
        self.register_buffer("disc", 11 - (x**2 + y**2).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.disc


def make(seed: int = 0, **changes: Any) -> MaskRCNN:
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "min_size": 128,
        "max_size": 160,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 4,
        "rpn_pre_nms_top_n_test": 50,
        "rpn_post_nms_top_n_test": 20,
        "mask_head": MaskRCNNHeads(WIDTH, (WIDTH,), 1),
    }
    model = MaskRCNN(TinyBackbone(), 3, **(values | changes))
    model.roi_heads.mask_predictor = DiscPredictor()
    return model.eval()


def results(output: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    assert all(result["masks"].shape[1] == 1 and result["masks"].dtype == torch.float32 for result in output)
    return [{**result, "masks": result["masks"][:, 0]} for result in output]


def target(masks: Tensor, labels: Sequence[int]) -> dict[str, Tensor]:
    """A target as torchvision takes it: ``masks`` ``(N, H, W)`` bool, none of them empty."""
    return {
        "boxes": boxes_from_masks(masks),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": masks.to(torch.uint8),
    }


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes, with two instances and one."""
    first = discs(97, 131, [(40.0, 45.0, 30.0), (100.0, 60.0, 22.0)])
    second = discs(120, 101, [(50.0, 60.0, 38.0)])
    images = [0.1 + 0.8 * masks.any(dim=0).expand(3, -1, -1).float() for masks in (first, second)]
    return images, [target(first, [1, 2]), target(second, [2])]


def losses(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)  # the host and the losses draw their samples
    return model(*batch())


HOST = cases.Host(make=make, call=lambda model, images: model(list(images)), results=results, losses=losses)


@pytest.mark.parametrize(
    "check",
    [
        cases.check_identity,
        cases.check_every_instance_is_refined,
        cases.check_detach,
        cases.check_threads,
        cases.check_training_on_the_image_is_refused,
        cases.check_joint_training,
        cases.check_scopes,
    ],
    ids=lambda check: check.__name__,
)
def test_as_every_host(check: Callable[[cases.Host], None]):
    check(HOST)


def test_a_batch_of_mixed_sizes_equals_one_by_one():
    # 128 × 169 and 128 × 170 of the network: both are padded to 128 × 192.
    cases.check_batch_equals_loop(HOST, alike=[(97, 131), (99, 133), (101, 135)])


def test_saved_and_loaded(tmp_path: Path):
    cases.check_saved_model(HOST, tmp_path)


class Painted(nn.Module):
    """Averages the network's input, with torchvision's normalisation undone."""

    out_channels = WIDTH

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.mean = torch.tensor(model.transform.image_mean)[:, None, None]
        self.std = torch.tensor(model.transform.image_std)[:, None, None]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = cases.pooled(x * self.std + self.mean, (4, 8, 16, 32, 64), WIDTH)
        return dict(zip(("0", "1", "2", "3", "pool"), maps, strict=True))


def test_features_lie_where_the_image_says():
    model = make()
    adapter = adapt(model)
    model.backbone = Painted(model)
    sizes = [(97, 131), (203, 117), (333, 500)]
    cases.check_pattern(adapter.detect([cases.position_image(height, width) for height, width in sizes]))


def test_torchvisions_own_backbone():
    adapter = adapt(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    assert isinstance(adapter, TorchvisionAdapter)
    assert (adapter.channels, adapter.strides, adapter.source) == (256, (4, 8, 16, 32), "torchvision:MaskRCNN")
    assert adapter.model.training  # as it was built
    config = adapter.config(depth=2)
    assert (config.feature_source, config.feature_channels, config.strides) == (adapter.source, 256, adapter.strides)


class TestDetect:
    def test_box_probabilities_are_the_masks_before_they_are_pasted(self):
        for prediction in adapt(make()).detect(HOST.images()):
            assert len(prediction) == 4 and prediction.box_probs is not None
            pasted = torch.zeros_like(prediction.instances.masks, dtype=torch.bool)
            paste(prediction.box_probs, prediction.instances.boxes, pasted)
            host = prediction.instances.masks >= 0.5
            assert not ((pasted ^ host) & ~(dilate(host) & dilate(~host))).any()
            assert torch.equal(prediction.host["masks"][:, 0], prediction.instances.masks)
            assert torch.equal(prediction.indices, torch.arange(4))

    def test_each_axis_has_its_own_scale(self):
        for prediction, (height, width) in zip(adapt(make()).detect(HOST.images()), HOST.sizes, strict=True):
            resized, _ = make().transform([torch.zeros(3, height, width)])
            ((rows, columns),) = resized.image_sizes
            assert prediction.features is not None and prediction.features.scale is not None
            assert prediction.features.scale.tolist() == [pytest.approx([columns / width, rows / height])]

    def test_any_kind_of_image(self, tmp_path: Path):
        array = random_image(60, 80)
        Image.fromarray(array).save(tmp_path / "photo.png")
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        kinds = [array, tensor, tensor.float() / 255, Image.fromarray(array), str(tmp_path / "photo.png")]
        first, *others = adapt(make()).detect(kinds)
        for other in others:
            torch.testing.assert_close(other.instances.masks, first.instances.masks)

    def test_leaves_the_mode_and_gives_no_gradient(self):
        model = make().train()
        model.backbone.eval()
        (prediction,) = adapt(model).detect([torch.rand(3, 64, 64)])
        assert model.training and not model.backbone.training
        assert prediction.features is not None and not prediction.features.maps[0].requires_grad

    def test_no_image(self):
        assert adapt(make()).detect([]) == []

    def test_nothing_found(self):
        adapter = adapt(make(box_score_thresh=1.0))
        images = HOST.images()
        for prediction, (height, width) in zip(adapter.detect(images), HOST.sizes, strict=True):
            assert len(prediction) == 0 and prediction.instances.masks.shape == (0, height, width)
        outputs = cases.wrapped(adapter, cases.eventful_refiner(adapter))(images)
        assert [tuple(output["masks"].shape) for output in outputs] == [(0, 1, *size) for size in HOST.sizes]


class TestJointTraining:
    def model(self, **options: Any) -> RefinedTorchvision:
        changes = {"depth": 2, "box_margin": 0.125}
        adapter = adapt(make())
        model = cases.wrapped(adapter, cases.eventful_refiner(adapter, **changes), **options).train()
        assert isinstance(model, RefinedTorchvision)
        return model

    def test_each_roi_meets_its_own_true_mask(self, monkeypatch: pytest.MonkeyPatch):
        """In the image's own pixels, found again by a slow loop."""
        model = self.model(max_rois=10)
        seen: list[tuple[Any, ...]] = []
        monkeypatch.setattr(model, "refinement_losses", lambda *args: seen.append(args) or {})
        losses(model)
        ((pyramid, rois, image, coarse, truth),) = seen
        _, targets = batch()
        assert torch.bincount(image).tolist() == [10, 10] and pyramid.batch_size == 2
        assert coarse.shape == (20, 56, 56) and truth.shape == (20, 112, 112)
        matches = set()
        for roi, of_image, given in zip(rois, image.tolist(), truth, strict=True):
            x0, y0, x1, y1 = roi.tolist()
            margin = torch.tensor([x1 - x0, y1 - y0] * 2) * torch.tensor([1, 1, -1, -1]) * 0.1
            overlap = box_iou((roi + margin)[None], targets[of_image]["boxes"])[0]
            match = int(overlap.argmax())
            assert overlap[match] > 0.45
            expected = crop_masks(targets[of_image]["masks"][match : match + 1], roi[None], 112)[0] >= 0.5
            assert torch.equal(given, expected)
            matches.add((of_image, match))
        assert len(matches) == 3

    @pytest.mark.parametrize("detach", [True, False])
    def test_the_coarse_mask_takes_part_or_not(self, detach: bool):
        model = self.model(detach_coarse=detach)
        losses(model)["loss_refine"].backward()
        predictor = model.adapter.mask_predictor
        assert all((parameter.grad is None) == detach for parameter in predictor.parameters())

    @pytest.mark.parametrize("empty", [{0}, {0, 1}])
    def test_images_without_an_instance(self, empty: set[int]):
        model = self.model()
        images, targets = batch()
        for index in empty:
            height, width = images[index].shape[1:]
            targets[index] = target(torch.zeros(0, height, width, dtype=torch.bool), [])
        found = model(images, targets)
        assert all(torch.isfinite(value) for value in found.values())
        assert (float(found["loss_refine"].detach()) == 0) == (len(empty) == 2)
        cases.total(found).backward()
        for name, parameter in model.refiner_model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name

    def test_at_most_so_many_rois_of_an_image(self):
        model, counts = self.model(max_rois=3), []
        detector = model.refiner_model.transfiner.incoherence_detector
        detector.register_forward_pre_hook(lambda _, args: counts.append(torch.bincount(args[0].image).tolist()))
        losses(model)
        assert counts == [[3, 3]]

    def test_targets_and_images_are_left_alone(self):
        images, targets = batch()
        before = [image.clone() for image in images], [{k: v.clone() for k, v in t.items()} for t in targets]
        self.model()(images, targets)
        torch.testing.assert_close((images, targets), before, rtol=0, atol=0)

    def test_the_refiner_learns_from_a_frozen_detector(self):
        adapter = adapt(make())
        refiner = cases.refiner_for(adapter, depth=2, channels=32)
        model = cases.wrapped(adapter, refiner, train="refiner", max_rois=4).train()
        optimizer = torch.optim.Adam(model.refiner_model.parameters(), lr=8e-3)
        history = []
        for _ in range(24):
            found = model(*batch())
            optimizer.zero_grad()
            (found["loss_refine"] + found["loss_incoherence"]).backward()
            optimizer.step()
            history.append(float(found["loss_refine"].detach()))
        assert sum(history[-4:]) < 0.7 * sum(history[:4]), history

    def test_a_refiner_of_images_is_no_part_of_it(self):
        adapter = adapt(make())
        model = cases.wrapped(adapter, Refiner(eventful_model(encoder_config(depth=1)))).train()
        with pytest.raises(InvalidInputError, match=r"on the detector's features for joint training.*adapter\.config"):
            losses(model)

    def test_the_papers_decoder(self):
        adapter = adapt(make())
        model = cases.wrapped(adapter, cases.refiner_for(adapter, decoder="label")).train()
        cases.total(losses(model)).backward()


def test_a_refiner_of_images_refines_every_instance():
    adapter = adapt(make())
    images = HOST.images()
    plain = HOST.run(adapter.model, images)
    refiner = cases.find_everywhere(Refiner(eventful_model(encoder_config(depth=1))))
    refined = HOST.run(cases.wrapped(adapter, refiner), images)
    for before, after in zip(plain, refined, strict=True):
        assert ((before["masks"] >= 0.5) != (after["masks"] >= 0.5)).flatten(1).any(dim=1).all()


def test_a_copy_stands_alone():
    """As averages of weights are kept."""
    adapter = adapt(make())
    model = cases.wrapped(adapter, cases.eventful_refiner(adapter))
    copied = copy.deepcopy(model)
    assert copied.adapter.model is copied.detector is not model.detector
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    image = HOST.images()[:1]
    assert float(HOST.run(copied, image)[0]["boxes"].abs().sum()) > 0


def test_half_precision():
    adapter = adapt(make())
    model = cases.wrapped(adapter, cases.eventful_refiner(adapter))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (result,) = HOST.run(model, HOST.images()[:1])
    assert len(result["masks"]) == 4 and torch.isfinite(result["masks"]).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(model.train())
    cases.total(found).backward()
    assert all(torch.isfinite(value) for value in found.values())


def test_a_detector_without_masks_is_refused():
    with pytest.raises(InvalidInputError, match="with a mask head, such as MaskRCNN, got FasterRCNN: refine masks"):
        adapt(FasterRCNN(TinyBackbone(), 3))


def test_maps_that_are_no_pyramid_are_refused():
    model = make()
    model.backbone.fpn = nn.Identity()
    model.get_submodule("backbone.stages.1.0").stride = (1, 1)  # type: ignore[assignment]
    with pytest.raises(InvalidInputError, match="double from map to map"):
        adapt(model)
