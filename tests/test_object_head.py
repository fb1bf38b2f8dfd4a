"""The object head: what it corrects before the quadtree, that it starts without effect, and that it travels along."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from small_models import CIRCLES, HALF, discs, encoder_config, eventful_model, random_image, small_config

from transfiner_refine import InvalidInputError, RefineOptions, Refiner
from transfiner_refine.data.crops import CropSample
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.coarse import coarse_logits
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.functional.sampling import OBJECT_STRIDE, RoIPyramid
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.image_encoder import BACKBONES, ImageEncoder
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.object_head import CORRECTED, OBJECT_SIDE, ObjectHead
from transfiner_refine.training.losses import LossConfig, RefinementLoss
from transfiner_refine.training.schedule import TrainConfig, freeze
from transfiner_refine.types import FeaturePyramid

H, W = 240, 250
EVERY = RefineOptions(keep_if_iou_below=0.0, encode="crops", passes=1)


@pytest.fixture(scope="module")
def model() -> RefinerModel:
    """A small model whose object head has something to say."""
    model = eventful_model(encoder_config(object_channels=8))
    assert model.transfiner.object_head is not None
    torch.nn.init.normal_(model.transfiner.object_head.out.weight, std=0.5)
    return model


def without_head(model: RefinerModel) -> RefinerModel:
    plain = RefinerModel(replace(model.config, object_channels=0)).eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain


def scene(model: RefinerModel, side: int = 112) -> tuple[RoIPyramid, torch.Tensor]:
    """Five discs in noise, encoded."""
    assert model.image_encoder is not None
    masks = discs(256, 256, CIRCLES)
    rois = expand_boxes(boxes_from_masks(masks), 0.125)
    pixels = torch.from_numpy(random_image(256, 256)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        pyramid = model.image_encoder(pixels)
    image = torch.zeros(len(rois), dtype=torch.long)
    return model.transfiner.roi_pyramid(pyramid, rois, image), crop_masks(masks, rois, side)


def test_an_untrained_head_changes_nothing():
    model = eventful_model(encoder_config(object_channels=8))
    image, masks = random_image(H, W), discs(H, W, CIRCLES)
    refined = Refiner(model).refine(image, masks=masks, options=EVERY)
    plain = Refiner(without_head(model)).refine(image, masks=masks, options=EVERY)
    assert torch.equal(refined.masks, plain.masks)
    assert not torch.equal(refined.masks, masks)  # the quadtree is at work


@pytest.mark.parametrize("side", [28, 56, 112, 224])
def test_the_correction_is_added_to_the_coarse_logits(model: RefinerModel, side: int):
    roi_pyramid, coarse = scene(model, side)
    head = model.transfiner.object_head
    assert head is not None
    cells = torch.nn.functional.adaptive_avg_pool2d(coarse[:, None], OBJECT_SIDE)[:, 0] if side > OBJECT_SIDE else None
    if side == 28:
        cells = torch.nn.functional.interpolate(coarse[:, None], size=(56, 56), mode="bilinear")[:, 0]
    with torch.no_grad():
        corrected = head.correct(roi_pyramid, coarse)
        correction = head(roi_pyramid.objects(OBJECT_SIDE), coarse if cells is None else cells)
    assert corrected.shape == coarse.shape
    at_side = torch.nn.functional.interpolate(correction[:, None], size=(side, side), mode="bilinear")[:, 0]
    if side == 28:
        at_side = torch.nn.functional.avg_pool2d(correction[:, None], 2)[:, 0]
    expected, before = torch.sigmoid(coarse_logits(coarse) + at_side), torch.sigmoid(coarse_logits(coarse))
    changed = corrected != coarse
    assert 0.05 < changed.float().mean() < 1
    assert corrected[changed].numpy() == pytest.approx(expected[changed].numpy(), abs=1e-6)
    assert (expected - before)[~changed].abs().max() <= CORRECTED + 1e-6


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_growth_holds_back_what_is_added(model: RefinerModel, growth: float):
    roi_pyramid, coarse = scene(model, OBJECT_SIDE)
    head = deepcopy(model.transfiner.object_head)
    assert head is not None
    with torch.no_grad():
        assert head.out.bias is not None
        head.out.bias -= head(roi_pyramid.objects(OBJECT_SIDE), coarse).median()
        correction = head(roi_pyramid.objects(OBJECT_SIDE), coarse)
        head.growth.fill_(growth)
        corrected = head.correct(roi_pyramid, coarse)
    removes = correction < 0
    assert 0.1 < removes.float().mean() < 0.9
    expected = torch.sigmoid(coarse_logits(coarse) + torch.where(removes, correction, growth * correction))
    changed = corrected != coarse
    assert changed[removes].any() and changed[~removes].any() == (growth > 0)
    assert corrected[changed].numpy() == pytest.approx(expected[changed].numpy(), abs=1e-6)


def test_what_the_head_changes_counts_as_touched_and_is_pasted(model: RefinerModel):
    roi_pyramid, coarse = scene(model)
    with torch.no_grad():
        output = model.transfiner(roi_pyramid, coarse, 3, HALF)
        corrected = model.transfiner.correct(roi_pyramid, coarse, 3)
        bare = without_head(model).transfiner(roi_pyramid, corrected, 3, HALF)
    assert torch.equal(output.touched, bare.touched | (corrected != coarse))
    assert torch.equal(output.probs, bare.probs)  # the quadtree starts from the corrected masks
    assert torch.equal(output.probs[~output.touched], coarse[~output.touched])
    # Nothing is refined at a threshold that no cell reaches, so that what changes is the head's.
    masks = discs(H, W, CIRCLES)
    refined = Refiner(model).refine(random_image(H, W), masks=masks, options=replace(EVERY, incoherence_threshold=1.0))
    assert (refined.masks != masks).flatten(1).sum(dim=1).min() > 0


def test_depth_0_leaves_the_coarse_mask(model: RefinerModel):
    masks = discs(H, W, CIRCLES)
    refined = Refiner(model).refine(random_image(H, W), masks=masks, options=replace(EVERY, depth=0))
    assert torch.equal(refined.masks, masks)


@pytest.mark.parametrize("encode", ["crops", "image"])
def test_instances_do_not_depend_on_each_other(model: RefinerModel, encode):
    refiner, image, masks = Refiner(model), random_image(H, W), discs(H, W, CIRCLES)
    options = replace(EVERY, encode=encode)
    together = refiner.refine(image, masks=masks, options=options).probs
    assert together is not None
    if encode == "crops":
        alone = refiner.refine(image, masks=masks[1:2], options=options).probs
        assert alone is not None
        assert alone[0].numpy() == pytest.approx(together[1].numpy(), abs=1e-4)
    none = refiner.refine(image, masks=masks[:0], options=options)
    assert none.masks.shape == (0, H, W)


def test_bfloat16_stays_close(model: RefinerModel):
    head = ObjectHead(8).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.out.weight.normal_(std=0.1, generator=generator)
    features = torch.randn(2, 8, OBJECT_SIDE, OBJECT_SIDE, generator=generator)
    coarse = discs(OBJECT_SIDE, OBJECT_SIDE, [(28, 28, 15), (20, 30, 9)]).float()
    with torch.no_grad():
        exact = head(features, coarse)
        rounded = head.to(torch.bfloat16)(features.to(torch.bfloat16), coarse)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.1 * exact.std()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_a_map_for_it(backbone: str):
    encoder = ImageEncoder(8, backbone, object_channels=16).eval()
    with torch.no_grad():
        pyramid = encoder(torch.rand(2, 3, 100, 140))
    assert pyramid.objects is not None
    assert pyramid.objects.shape == (2, 16, 25, 35)
    assert pyramid.to(dtype=torch.bfloat16).objects.dtype == torch.bfloat16  # type: ignore[union-attr]
    plain = ImageEncoder(8, backbone)(torch.rand(1, 3, 64, 64))
    assert plain.objects is None and OBJECT_STRIDE == 4


def test_it_is_saved_and_loaded(model: RefinerModel, tmp_path: Path):
    again = Refiner.from_pretrained(Refiner(model).save_pretrained(tmp_path / "saved"))
    assert again.config.object_channels == 8
    image, masks = random_image(H, W), discs(H, W, CIRCLES)
    first, second = (r.refine(image, masks=masks, options=EVERY).probs for r in (Refiner(model), again))
    assert first is not None and second is not None
    assert np.abs(first.numpy() - second.numpy()).mean() < 0.01  # files hold rounded weights


def test_beyond_the_image_the_map_goes_on_as_at_its_border(model: RefinerModel):
    roi_pyramid, _ = scene(model)
    beyond = replace(roi_pyramid, rois=torch.tensor([[-200.0, -100.0, 456.0, 356.0]]), image=torch.zeros(1).long())
    found = beyond.objects(OBJECT_SIDE)[0]
    assert roi_pyramid.table.objects is not None
    last = roi_pyramid.table.objects.rows.unflatten(0, (64, 64))
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.allclose(found[:, row, column], last[row, column], atol=1e-5)


@pytest.fixture
def tiny() -> RefinerModel:
    torch.manual_seed(0)
    return RefinerModel(encoder_config(backbone="tiny_vit")).eval()


def test_a_refiner_is_given_a_head(script: Callable[[str], ModuleType], tiny: RefinerModel):
    module = script("train_object_head")
    given = module.with_object_head(tiny, 16)
    assert given.config.object_channels == 16
    weights = given.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in tiny.state_dict().items())


def test_the_head_learns_from_collected_samples(
    script: Callable[[str], ModuleType], tiny: RefinerModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Samples are collected once, keep what the backbone sees, and teach the head alone."""
    module = script("train_object_head")
    monkeypatch.setattr(module, "GROUP", 3)
    model = module.with_object_head(tiny, 8)
    assert model.image_encoder is not None
    drawn: list[int] = []

    class Squares:
        """Squares of another colour, of which the coarse masks lack the lower half."""

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> CropSample:
            drawn.append(index)
            image = torch.full((3, 256, 256), 60, dtype=torch.uint8)
            image[index % 3, 80:180, 80:180] = 220
            target = torch.zeros((224, 224), dtype=torch.bool)
            target[40:184, 40:184] = True
            coarse = torch.nn.functional.avg_pool2d(target[None].float(), 2)[0]
            coarse[56:] = 0
            roi = torch.tensor([52.2, 52.2, 207.8, 207.8])
            return CropSample(image, roi, coarse, target, torch.tensor(0.5), torch.tensor(index))

    backbone = model.image_encoder.backbone
    with torch.no_grad():
        samples = module.open_samples(tmp_path, 6, backbone)
    module.collect(backbone, Squares(), samples)
    assert drawn == [0, 1, 2, 3, 0, 1] and (samples.weight == 0.5).all()
    module.collect(backbone, Squares(), module.open_samples(tmp_path, 6, backbone))
    assert len(drawn) == 6  # what is there is not made again

    again = module.gather([samples, samples], np.array([1, 5, 6, 11]))
    for column, whole in zip(again, samples, strict=True):
        assert np.array_equal(column, whole[[1, 5, 0, 5]])
    chosen = np.arange(3)
    with torch.no_grad():
        logits, _ = module.logits_of(model, module.gather([samples], chosen), 0.0)
        crops = torch.stack([Squares()[index].image for index in range(3)])
        pyramid = model.encode_crops(crops)
        objects = model.transfiner.roi_pyramid(pyramid, torch.from_numpy(samples.roi[:3]), torch.arange(3)).objects(56)
        coarse = torch.from_numpy(samples.coarse[:3]).float() / 255
        assert model.transfiner.object_head is not None
        expected = coarse_logits(coarse) + model.transfiner.object_head(objects, coarse)
    assert logits.numpy() == pytest.approx(expected.numpy(), abs=0.02)  # half precision on disk

    def loss() -> float:
        with torch.no_grad():
            logits, target = module.logits_of(model, module.gather([samples], chosen), 0.0)
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, target))

    before, others = loss(), {name: value.clone() for name, value in tiny.state_dict().items()}
    mixed = module.with_exact(samples, 0.5, np.random.default_rng(0))
    same = {kind: (mixed.coarse == getattr(samples, kind)).all(axis=(1, 2)) for kind in ("coarse", "target")}
    assert (same["coarse"] ^ same["target"]).all() and 0 < same["target"].sum() < 6
    module.train(model, [samples, samples], steps=12, learning_rate=1e-2, exact=0.0, seed=0)
    assert loss() < 0.7 * before
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in others.items())


@pytest.mark.parametrize("channels", [-8, 12, True, 8.0])
def test_odd_widths_are_refused(channels):
    with pytest.raises(InvalidInputError, match="object_channels"):
        encoder_config(object_channels=channels)


def test_a_detectors_features_have_no_object_map(model: RefinerModel):
    with pytest.raises(InvalidInputError, match="image encoder"):
        RefinerModel(small_config(object_channels=8))
    maps = (torch.zeros(2, 8, 16, 16),)
    with pytest.raises(InvalidInputError, match="objects"):
        FeaturePyramid(maps, (4,), objects=torch.zeros(1, 8, 16, 16))
    roi_pyramid, coarse = scene(model)
    bare = replace(roi_pyramid, table=replace(roi_pyramid.table, objects=None))
    with pytest.raises(InvalidInputError, match="object map"):
        model.transfiner(bare, coarse, 3, HALF)


def test_training_starts_from_the_corrected_masks_and_leaves_the_head(model: RefinerModel):
    trained = RefinerModel(model.config)
    trained.load_state_dict(model.state_dict())
    freeze(trained, TrainConfig(steps=1))
    frozen = {name for name, value in trained.named_parameters() if not value.requires_grad}
    heads = {name for name, _ in trained.named_parameters() if ".object_head." in name or ".object_map." in name}
    assert heads and heads <= frozen
    crops = torch.from_numpy(random_image(256, 256)).permute(2, 0, 1)[None]
    roi_pyramid, coarse = scene(trained)
    roi, truth = roi_pyramid.rois[:1], torch.nn.functional.interpolate(coarse[:1, None], scale_factor=2)[:, 0] >= 0.5
    torch.manual_seed(0)
    losses = RefinementLoss(trained.train(), LossConfig())(crops, roi, coarse[:1], truth, torch.ones(1))
    with torch.no_grad():
        corrected = trained.transfiner.correct(roi_pyramid, coarse, 3)[:1]
    bare = without_head(trained).train()
    torch.manual_seed(0)
    plain = RefinementLoss(bare, LossConfig())(crops, roi, corrected, truth, torch.ones(1))
    assert losses["loss_refine"].item() == pytest.approx(plain["loss_refine"].item(), rel=1e-4)
    sum(value for name, value in losses.items() if name.startswith("loss")).backward()  # type: ignore[union-attr]
    assert all(trained.get_parameter(name).grad is None for name in heads)
