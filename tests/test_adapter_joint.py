"""What all refined detectors share: refined masks, joint losses, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_cases as cases
import pytest
import torch
from made_up_host import CIRCLES, STRIDES, WIDTH, adapter
from small_models import discs, encoder_config, eventful_model
from torch import Tensor, nn

from transfiner_refine import (
    FeaturePyramid,
    Instances,
    InvalidInputError,
    RefineOptions,
    Refiner,
    WeightsError,
)
from transfiner_refine.adapters.joint import RefinedDetector, crop_truth
from transfiner_refine.adapters.protocol import (
    Prediction,
)
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.training.losses import LossConfig, refinement_losses


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))


class TestRefine:
    def test_float_masks_take_the_probabilities_and_keep_the_rest(self, image: Tensor):
        host = adapter()
        (found,) = host.detect([image])
        soft = torch.where(found.instances.masks, 0.9, 0.1)
        instances = Instances(found.instances.boxes, soft, found.instances.image_size)
        prediction = Prediction(instances, found.indices, found.features)
        model = cases.wrapped(host, cases.refiner_for(host))
        (same,) = model.refine([prediction])
        assert torch.equal(same.masks, soft)
        model = cases.wrapped(host, cases.eventful_refiner(host))
        (changed,) = model.refine([prediction])
        outside = torch.ones(64, 96, dtype=torch.bool)
        outside[10:47, 12:49] = False  # the first disc's box, and a pixel
        assert torch.equal(changed.masks[0, outside], soft[0, outside])
        assert changed.masks.dtype == torch.float32 and len(changed.masks[0].unique()) > 100
        assert torch.equal(prediction.instances.masks, torch.where(found.instances.masks, 0.9, 0.1))
        assert changed.probs is not None and changed.rois is not None and changed.kept_coarse is not None

    def test_labels_are_those_of_refine(self, image: Tensor):
        """Also where a pixel head aligns them, which float masks take over as a side of the threshold."""
        host, options = adapter(), RefineOptions(keep_if_iou_below=0.0, keep_if_gain_below=-1.0)
        refiner = Refiner(eventful_model(encoder_config(depth=1, pixel_widths=(8, 12))))
        assert refiner.model.pixel_head is not None
        nn.init.normal_(refiner.model.pixel_head.out.weight, std=0.5)
        (found,) = host.detect([image])
        masks, boxes, size = found.instances.masks, found.instances.boxes, found.instances.image_size
        expected = refiner.refine(image, boxes=boxes, masks=masks, options=options).masks
        not_aligned = replace(options, align_pixels=False)
        assert (expected != refiner.refine(image, boxes=boxes, masks=masks, options=not_aligned).masks).any()
        model = host.with_refiner(refiner, options=options)
        assert torch.equal(model([image])[0], expected)
        (refined,) = model.refine([Prediction(Instances(boxes, masks.float(), size), found.indices)], [image])
        assert refined.masks.dtype == torch.float32 and torch.equal(refined.masks > 0.5, expected)
        assert float(refined.masks.min()) >= 0 and float(refined.masks.max()) <= 1

    def test_a_refinement_that_strays_is_not_taken(self, image: Tensor):
        host = adapter()
        model = cases.wrapped(host, cases.eventful_refiner(host), options=RefineOptions(keep_if_iou_below=1.0))
        (refined,) = model.refine(host.detect([image]))
        assert refined.kept_coarse is not None and refined.kept_coarse.all()
        assert torch.equal(refined.masks, discs(64, 96, CIRCLES))

    def test_needs_what_the_refiner_reads(self, image: Tensor):
        host = adapter()
        (found,) = host.detect([image])
        bare = Prediction(found.instances, found.indices)
        with pytest.raises(InvalidInputError, match="features of 'made_up:MadeUp', got a prediction without"):
            cases.wrapped(host, cases.refiner_for(host)).refine([bare])
        on_images = cases.wrapped(host, Refiner(eventful_model(encoder_config(depth=1))))
        with pytest.raises(InvalidInputError, match="expected images for a refiner with an image encoder"):
            on_images.refine([bare])
        assert len(on_images.refine([bare], [image])[0]) == 2

    def test_no_image_and_no_instance(self, image: Tensor):
        host = adapter()
        model = cases.wrapped(host, cases.eventful_refiner(host))
        assert model.refine([]) == []
        (found,) = host.detect([image])
        (refined,) = model.refine([Prediction(found.instances[[]], found.indices[:0], found.features)])
        assert refined.masks.shape == (0, 64, 96)


class TestJointLosses:
    def scene(self, model: RefinedDetector) -> tuple[Any, ...]:
        """Features, RoIs, images, coarse and true masks of two images with two objects each."""
        masks = discs(64, 96, CIRCLES)
        images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        pyramid = FeaturePyramid(tuple(model.detector(images)), STRIDES)
        image = torch.tensor([0, 0, 1, 1])
        rois = model.rois(boxes_from_masks(masks).repeat(2, 1))
        truth = crop_truth([masks, masks], torch.tensor([0, 1, 0, 1]), rois, image, 2 * model.side)
        coarse = crop_masks(discs(64, 96, [(x + 2, y, r) for x, y, r in CIRCLES]).repeat(2, 1, 1), rois, model.side)
        return pyramid, rois, image, coarse, truth

    @pytest.mark.parametrize("depth", [0, 2])
    @pytest.mark.parametrize("count", [0, 4])
    def test_every_weight_takes_part(self, depth: int, count: int):
        """Also without a RoI or a level, which a process may have while another has some."""
        host = adapter()
        loss = LossConfig(cross_entropy_weight=0.5)
        model = cases.wrapped(host, cases.refiner_for(host, depth=depth), loss=loss).train()
        pyramid, *columns = self.scene(model)
        losses = model.refinement_losses(pyramid, *(column[:count] for column in columns))
        assert set(losses) == {"loss_refine", "loss_incoherence", "loss_cross_entropy"}
        assert all((float(value.detach()) > 0) == bool(count and depth) for value in losses.values())
        cases.total(losses).backward()
        for name, parameter in model.refiner_model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name

    def test_are_those_of_the_objective(self):
        host = adapter()
        model = cases.wrapped(host, cases.refiner_for(host, depth=2)).train()
        model.detector.eval()
        pyramid, rois, image, coarse, truth = self.scene(model)
        torch.manual_seed(3)
        found = model.refinement_losses(pyramid, rois, image, coarse, truth)
        torch.manual_seed(3)
        transfiner = model.refiner_model.transfiner
        expected = refinement_losses(
            transfiner, transfiner.roi_pyramid(pyramid, rois, image), coarse, truth, torch.ones(4), LossConfig()
        )
        assert set(found) == {"loss_refine", "loss_incoherence"}
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])
        assert (LossConfig().refine_weight, LossConfig().incoherence_weight) == (1.0, 0.5)  # paper, Eq. 2

    def test_rois_have_the_margin_of_inference(self, image: Tensor):
        host = adapter()
        model = cases.wrapped(host, cases.refiner_for(host, box_margin=0.25))
        (refined,) = model.refine(host.detect([image]))
        assert refined.rois is not None
        torch.testing.assert_close(model.rois(refined.boxes), refined.rois)

    def test_samples_of_every_image(self):
        host = adapter()
        model = cases.wrapped(host, cases.refiner_for(host), max_rois=3)
        image = torch.repeat_interleave(torch.tensor([5, 0, 2, 3]))
        keep = model.sample(image)
        assert torch.bincount(image[keep], minlength=4).tolist() == [3, 0, 2, 3]
        assert keep.tolist() == sorted(set(keep.tolist())) and not torch.equal(keep, model.sample(image))

    def test_true_masks_are_cut_from_their_own_image(self):
        small, large = discs(40, 50, CIRCLES[:1]), discs(64, 96, CIRCLES)
        rois = torch.tensor([[10.0, 8.0, 44.0, 39.0], [44.0, 20.0, 80.0, 60.0], [8.0, 8.0, 50.0, 50.0]])
        matched, image = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 2])
        found = crop_truth([small.byte(), torch.zeros(0, 9, 9), large], matched, rois, image, 56)
        for index, mask in enumerate((small[0], large[1], large[0])):
            assert torch.equal(found[index], crop_masks(mask[None], rois[index : index + 1], 56)[0] >= 0.5)

    def test_frozen_parts_draw_and_count_nothing(self):
        host = adapter()
        model = host.with_refiner(cases.refiner_for(host), train="heads").train()
        assert isinstance(model, RefinedDetector) and model.detector.training
        _, norm, dropout = host.backbone.children()
        assert not norm.training and not dropout.training
        host.with_refiner(cases.refiner_for(host), train="all").train()
        assert norm.training and dropout.training

    def test_the_modes_of_the_detector_are_taken_over(self):
        host = adapter()
        host.model.train()
        host.backbone.eval()
        model = host.with_refiner(cases.refiner_for(host))
        assert model.training and model.refiner_model.training and not host.backbone.training
        assert not adapter().with_refiner(cases.refiner_for(host)).refiner_model.training


class TestFiles:
    def test_what_is_written(self, tmp_path: Path):
        host = adapter(with_laterals=True)
        model = cases.wrapped(host, cases.refiner_for(host))
        model.save_pretrained(tmp_path)
        record = json.loads((tmp_path / "adapter.json").read_text())
        assert record.pop("versions").keys() == {"transfiner_refine", "torch", "made_up"}
        assert record == {
            "adapter": "made_up",
            "feature_source": "made_up:MadeUp",
            "channels": WIDTH,
            "strides": list(STRIDES),
            "fingerprint": host.fingerprint,
        }
        assert Refiner.from_pretrained(tmp_path).config.feature_fingerprint == host.fingerprint
        assert model.refiner_model.config.feature_fingerprint is None  # saving marks the files alone
        cases.wrapped(host, cases.refiner_for(host), train="refiner").save_pretrained(tmp_path)
        assert not (tmp_path / "detector.safetensors").exists() and (tmp_path / "laterals.safetensors").exists()

    def test_laterals_and_detector_come_back(self, tmp_path: Path):
        host = adapter(with_laterals=True)
        assert host.laterals is not None
        cases.wrapped(host, cases.refiner_for(host)).save_pretrained(tmp_path)
        other = adapter(seed=1, with_laterals=True)
        cases.wrapped(other, tmp_path)
        assert other.fingerprint == host.fingerprint and other.laterals is not None
        for name, value in host.laterals.state_dict().items():
            assert torch.equal(other.laterals.state_dict()[name], value)

    def test_a_frozen_detector_is_not_written_but_checked(self, tmp_path: Path):
        host = adapter()
        cases.wrapped(host, cases.refiner_for(host), train="refiner").save_pretrained(tmp_path)
        cases.wrapped(adapter(), tmp_path)
        with pytest.raises(InvalidInputError, match="SHA-256"):
            adapter(seed=1).with_refiner(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_detector_of_another_dtype(self, tmp_path: Path, dtype: torch.dtype):
        host = adapter()
        cases.wrapped(host, cases.refiner_for(host)).save_pretrained(tmp_path)
        other = adapter(seed=1)
        other.model.to(dtype)
        other.with_refiner(tmp_path)
        expected = host.model.to(dtype).state_dict()
        for name, value in other.model.state_dict().items():
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name])

    def test_weights_that_share_memory(self, tmp_path: Path):
        host = adapter()
        host.model.register_parameter("tied", host.model.get_parameter("head.weight"))
        cases.wrapped(host, cases.refiner_for(host)).save_pretrained(tmp_path)
        assert (tmp_path / "detector.safetensors").exists()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "detector.safetensors").write_bytes(b"no"), "detector.safetensors is damaged"),
            (lambda folder: (folder / "laterals.safetensors").unlink(), "expected laterals.safetensors in .* missing"),
            (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        ],
    )
    def test_broken_directories(self, tmp_path: Path, spoil: Any, message: str):
        host = adapter(with_laterals=True)
        cases.wrapped(host, cases.refiner_for(host)).save_pretrained(tmp_path)
        spoil(tmp_path)
        with pytest.raises(WeightsError, match=message):
            host.with_refiner(tmp_path)

    def test_a_detector_of_another_architecture_keeps_its_weights(self, tmp_path: Path):
        host = adapter()
        cases.wrapped(host, cases.refiner_for(host)).save_pretrained(tmp_path)
        other = adapter(seed=1)
        other.model.add_module("head", nn.Linear(WIDTH, 2))
        before = other.fingerprint
        with pytest.raises(WeightsError, match=r"does not fit MadeUp: 2 of .* the first is 'head.bias'"):
            other.with_refiner(tmp_path)
        assert other.fingerprint == before
