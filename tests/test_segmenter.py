"""The segmenter and its proposals: against another implementation, in every way of seeing the image, in a call."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from benchmark_cases import make_disc_set
from PIL import Image
from small_models import discs, encoder_config, eventful_model, random_image, random_pyramid, small_config
from torch import Tensor, nn

from transfiner_refine import Instances, RefineOptions, Refiner
from transfiner_refine.attention import node_attention
from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.functional.crops import ImageHalves
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.gain import EDGE_STATISTICS, PROPOSAL_STATISTICS, STATISTICS
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.segmenter import CHANNELS, MASK_STRIDE, STRIDE, Segmenter, segmenter_from_mobile_sam
from transfiner_refine.proposals import CROP_SIDE, propose
from transfiner_refine.training.calibration import fit_gain, with_gain_predictor
from transfiner_refine.training.validation import Validation, simulated_image

RENAMED = (
    (r"layer_norm(\d)", r"norm\1"),
    ("layer_norm_final_attn", "norm_final_attn"),
    ("upscale_conv1", "output_upscaling.0"),
    ("upscale_layer_norm", "output_upscaling.1"),
    ("upscale_conv2", "output_upscaling.3"),
    (r"(mlps\.\d|head)\.layers\.0", r"\1.layers.1"),
    (r"(mlps\.\d|head)\.proj_in", r"\1.layers.0"),
    (r"(mlps\.\d|head)\.proj_out", r"\1.layers.2"),
    (r"point_embed\.(\d)", r"point_embeddings.\1"),
)
"""Names of transformers' SAM to those of MobileSAM's file."""

ALL = RefineOptions(keep_if_iou_below=0.0, keep_if_gain_below=-1.0)
H, W = 120, 160
CIRCLES = [(40.0, 50.0, 28.0), (110.0, 60.0, 40.0), (150.0, 110.0, 30.0)]


class Reference:
    """What transformers' SAM makes of a box, by random weights."""

    def __init__(self) -> None:
        sam = pytest.importorskip("transformers.models.sam", reason="needs the reference: pip install transformers")
        torch.manual_seed(0)
        vision = sam.configuration_sam.SamVisionConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=2)
        self.model = sam.modeling_sam.SamModel(sam.configuration_sam.SamConfig(vision_config=vision.to_dict())).eval()
        for name, value in self.model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(value, 0.5, 1.5)
            elif value.ndim > 1:  # so that it matters what each layer does, and not how norms treat next to nothing
                value.data.mul_(5)

    def weights(self) -> dict[str, Tensor]:
        """Under MobileSAM's names, with an image encoder of ours."""
        made = {}
        for name, value in self.model.state_dict().items():
            for old, new in RENAMED:
                name = re.sub(old, new, name)
            made[name] = value
        positions = self.model.shared_image_embedding.positional_embedding
        made["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = positions
        channels = {0: 320, 2: CHANNELS}
        for number, width in channels.items():
            side = 1 if number == 0 else 3
            made[f"image_encoder.neck.{number}.weight"] = torch.randn(CHANNELS, width, side, side) / 30
            made[f"image_encoder.neck.{number + 1}.weight"] = torch.rand(CHANNELS) + 0.5
            made[f"image_encoder.neck.{number + 1}.bias"] = torch.randn(CHANNELS) / 10
        return made


@torch.no_grad()
def test_decodes_as_the_reference_implementation(monkeypatch: pytest.MonkeyPatch):
    reference = Reference()
    monkeypatch.setattr("transfiner_refine.modeling.segmenter.tiny_vit_from_mobile_sam", lambda weights: {})
    weights = segmenter_from_mobile_sam(reference.weights())
    segmenter = Segmenter().eval()
    missing, unexpected = segmenter.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("tiny_vit.") for name in missing)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(1, CHANNELS, 64, 64, generator=generator)
    boxes = torch.tensor([[100.0, 220.0, 640.0, 900.0], [3.0, 0.0, 1024.0, 500.0]])
    expected = reference.model(image_embeddings=embedding, input_boxes=boxes[None], multimask_output=True)
    # What is added to every cell where there is no mask is part of the embedding here.
    bare = embedding + reference.model.prompt_encoder.no_mask_embed.weight[0][:, None, None]
    logits, quality = segmenter.decode(bare.expand(2, -1, -1, -1), boxes)
    assert logits.shape == (2, 3, 256, 256)
    torch.testing.assert_close(logits, expected.pred_masks[0], atol=1e-3, rtol=1e-3)
    assert logits.std() > 0.5
    torch.testing.assert_close(quality, expected.iou_scores[0], atol=2e-4, rtol=1e-4)


def test_other_weights_are_refused():
    with pytest.raises(WeightsError, match="expected the weights of MobileSAM"):
        segmenter_from_mobile_sam({"image_encoder.conv.weight": torch.zeros(3)})


class Boxes(nn.Module):
    """In the place of a segmenter: the box itself, of the quality asked for, and two worse candidates."""

    def __init__(self, shrink: float = 0.0):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1))
        self.shrink = shrink
        self.seen: list[tuple[int, ...]] = []

    def embed(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        assert images.shape[2] % STRIDE == images.shape[3] % STRIDE == 0 and max(images.shape[2:]) <= 1024
        return images.new_zeros(images.shape[0], 1, images.shape[2] // STRIDE, images.shape[3] // STRIDE)

    def decode(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        scale = STRIDE // MASK_STRIDE
        rows, columns = (torch.arange(n * scale) + 0.5 for n in embedding.shape[2:])
        x0, y0, x1, y1 = (boxes / MASK_STRIDE).T[..., None, None]
        cut = self.shrink * (x1 - x0)
        depths = [columns - x0 - cut, x1 - cut - columns, rows[:, None] - y0, y1 - rows[:, None]]
        inside = torch.stack([d.expand(boxes.shape[0], len(rows), len(columns)) for d in depths]).amin(0)
        logits = torch.stack([-inside, inside, inside - 1e4], dim=1)
        return logits.float(), torch.tensor([[0.9, 0.9, 0.95]]).float().expand(boxes.shape[0], 3)


BOXES = torch.tensor([[40.0, 30.0, 90.0, 200.0], [0.0, 0.0, 300.0, 240.0], [250.0, 100.0, 310.0, 235.0]])


def rectangles(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x0, y0, x1, y1 = boxes.T[..., None, None]
    return (x > x0) & (x < x1) & (y > y0) & (y < y1)


@pytest.mark.parametrize("encode", ["crops", "image"])
@pytest.mark.parametrize("size", [(240, 320), (340, 310), (1200, 1500)])
def test_proposals_lie_where_the_boxes_are(encode: str, size: tuple[int, int]):
    """Whether the image is seen in crops, through a window of it, or as a whole; also at its borders."""
    scale = size[1] / 310
    boxes = BOXES * scale
    boxes[:, 2:] = boxes[:, 2:].minimum(torch.tensor([size[1], size[0]]))
    truth = rectangles(boxes, size)
    coarse = truth.clone()
    coarse[:, : size[0] // 2, :3] = True  # wrong, and far outside of two of the boxes
    coarse[2, ::2, ::2] = False
    segmenter, image = Boxes(), ImageHalves(torch.rand(3, *size))
    masks, index = coarse.clone(), torch.tensor([2, 0, 1])
    said, replaced = propose(segmenter, image, boxes, masks, index, encode, 0.5)  # pyright: ignore[reportArgumentType]
    assert replaced.all() and (said > 0.6).all()
    overlap = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
    assert (overlap > 0.97).all(), overlap
    sides = {shape[2:] for shape in segmenter.seen}
    assert len(sides) == 1 and ((CROP_SIDE, CROP_SIDE) in sides) == (encode == "crops")


@pytest.mark.parametrize(("count", "side", "crops"), [(1, 50, 1), (2, 50, 0), (2, 30, 2), (9, 30, 0)])
def test_many_instances_and_large_ones_share_the_whole_image(count: int, side: int, crops: int):
    segmenter, image = Boxes(), ImageHalves(torch.rand(3, 200, 300))
    boxes = torch.tensor([[10.0, 10.0, 10 + side, 10 + side]]).repeat(9, 1) + 15 * torch.arange(9.0)[:, None]
    masks = rectangles(boxes, (200, 300))
    propose(segmenter, image, boxes, masks, torch.arange(count), "auto", 0.5)  # pyright: ignore[reportArgumentType]
    seen = sum(shape[0] for shape in segmenter.seen if shape[2] == shape[3] == CROP_SIDE)
    assert seen == crops and len(segmenter.seen) == 1


def test_proposals_far_from_the_coarse_mask_are_left_alone():
    size = (240, 320)
    truth = rectangles(BOXES, size)
    masks = truth.clone()
    masks[1] = False
    masks[1, :40, :60] = True
    given = masks.clone()
    image = ImageHalves(torch.rand(3, *size))
    said, replaced = propose(Boxes(0.1), image, BOXES, masks, torch.arange(2), "crops", 0.5)  # pyright: ignore[reportArgumentType]
    assert replaced.tolist() == [True, False, False]
    assert torch.equal(masks[1:], given[1:]) and not torch.equal(masks[0], given[0])
    assert said[1, 0] < 0.6 and said[1, 1] > 0 and said[2].tolist() == [0, 0]


@pytest.fixture(scope="module")
def model() -> RefinerModel:
    made = eventful_model(encoder_config(segments=True, predicts_gain=True, pixel_widths=(8, 12)))
    made.segmenter = Boxes(0.1)  # pyright: ignore[reportAttributeAccessIssue]
    return made


def test_a_call_starts_from_the_proposals(model: RefinerModel):
    image, masks = random_image(H, W), discs(H, W, CIRCLES)
    given = masks.clone()
    refiner = Refiner(model)
    with_proposals = refiner.refine(image, masks=masks, options=ALL)
    assert torch.equal(masks, given)
    without = refiner.refine(image, masks=masks, options=replace(ALL, segment=False))
    plain = Refiner(RefinerModel(replace(model.config, segments=False)))
    without_it = "segmenter.", "gain_predictor.proposal", "gain_predictor.again"
    plain.model.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(without_it)})
    expected = plain.refine(image, masks=masks, options=ALL)
    assert without.probs is not None and expected.probs is not None
    assert torch.equal(without.masks, expected.masks) and torch.equal(without.probs, expected.probs)
    # What it proposes are rectangles, narrower than the discs: columns at the sides are gone, corners are there.
    assert with_proposals.rois is not None and not torch.equal(with_proposals.masks, expected.masks)
    assert with_proposals.masks[0, 22 + 4, 40 - 18] and not given[0, 22 + 4, 40 - 18]


@pytest.mark.parametrize("frame", ["image", "box"])
def test_what_is_refused_comes_back_as_it_was(model: RefinerModel, frame: str):
    image = random_image(H, W)
    masks = torch.rand(3, 28, 28) if frame == "box" else discs(H, W, CIRCLES)
    boxes = torch.tensor([[10.0, 20.0, 70.0, 80.0], [70.0, 20.0, 150.0, 100.0], [100.0, 60.0, 160.0, 120.0]])
    refiner = Refiner(model)
    options = RefineOptions(keep_if_gain_below=1.0)
    if frame == "box":
        masks[:, 4:24, 4:24] = 1.0
    refined = refiner.refine(image, boxes=boxes, masks=masks, mask_frame=frame, options=options)  # pyright: ignore[reportArgumentType]
    none = refiner.refine(image, boxes=boxes, masks=masks, mask_frame=frame, options=RefineOptions(depth=0))  # pyright: ignore[reportArgumentType]
    assert refined.kept_coarse is not None and refined.kept_coarse.all()
    assert torch.equal(refined.masks, none.masks)
    # Accepted, they are the proposals' refinements.
    assert not torch.equal(
        refiner.refine(image, boxes=boxes, masks=masks, mask_frame=frame, options=ALL).masks,  # pyright: ignore[reportArgumentType]
        none.masks,
    )


@pytest.mark.parametrize("frame", ["image", "box"])
@pytest.mark.parametrize("refuses", ["all", "some"])
def test_what_is_refused_is_tried_without_its_proposal(model: RefinerModel, frame: str, refuses: str):
    """Each instance is what it is behind its proposal or without: which of them, its gain behind the proposal says."""
    judged = deepcopy(model)
    predictor = judged.gain_predictor
    assert predictor is not None and predictor.proposal_weight is not None and predictor.proposal_bias is not None
    assert predictor.again_bias is not None and predictor.edge_bias is not None
    for parameter in predictor.parameters():
        parameter.data.zero_()
    predictor.edge_bias.data.fill_(0.5)  # without a proposal all is accepted
    predictor.again_bias.data.fill_(0.5)
    predictor.proposal_weight.data[0] = 0.01
    refiner = Refiner(judged)
    image, masks = random_image(H, W), discs(H, W, CIRCLES)
    boxes = boxes_from_masks(masks)
    if frame == "box":
        masks = torch.rand(len(CIRCLES), 28, 28)
        masks[:, 4:24, 4:24] = 1.0

    def refine(**changes: Any) -> Instances:
        options = RefineOptions(keep_if_iou_below=0.0, encode="crops", **changes)
        return refiner.refine(image, boxes=boxes, masks=masks, mask_frame=frame, options=options)  # pyright: ignore[reportArgumentType]

    behind = refine(keep_if_gain_below=-1.0)
    without = refine(keep_if_gain_below=-1.0, segment=False)
    assert behind.predicted_gain is not None and without.predicted_gain is not None
    assert not torch.equal(behind.masks, without.masks) and (without.predicted_gain == 0.5).all()
    least = behind.predicted_gain.max() if refuses == "some" else torch.tensor(0.4)
    refused = behind.predicted_gain < least
    found = refine(keep_if_gain_below=float(least), return_quadtree=True)
    assert refused.sum() == (2 if refuses == "some" else 3)
    for name in ("masks", "probs", "rois", "predicted_gain"):
        for chosen, expected in ((refused, without), (~refused, behind)):
            one, other = (getattr(x, name)[chosen].float() for x in (found, expected))
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)  # groups of another size round otherwise
    assert found.kept_coarse is not None and not found.kept_coarse.any()
    assert found.details is not None and len(found.details.quadtree[0].roi.unique()) == len(CIRCLES)
    if frame == "image":
        coarse = Instances(boxes=boxes, masks=masks, image_size=(H, W))
        options = RefineOptions(keep_if_iou_below=0.0, encode="crops", keep_if_gain_below=float(least))
        for one in refiner.refine_batch([image, image], [coarse, coarse], options=options):
            assert torch.equal(one.masks, found.masks)


@pytest.mark.parametrize("joint_levels", [True, False])
def test_attention_of_what_was_tried_again_is_that_of_the_second(joint_levels: bool):
    model = eventful_model(
        encoder_config(segments=True, predicts_gain=True, pixel_widths=(8, 12), joint_levels=joint_levels)
    )
    model.segmenter = Boxes(0.1)  # pyright: ignore[reportAttributeAccessIssue]
    image, masks = random_image(H, W), discs(H, W, CIRCLES[:1])
    refused = RefineOptions(keep_if_gain_below=0.5)  # no gain is predicted at all
    without = replace(refused, segment=False)
    boxes = boxes_from_masks(masks)
    found, expected = (
        node_attention(Refiner(model), image, box=boxes[0], mask=masks[0], point=(40.0, 22.0), options=options)
        for options in (refused, without)
    )
    assert found.place == expected.place
    torch.testing.assert_close(found.reference, expected.reference)
    for one, other in zip(found.nodes, expected.nodes, strict=True):
        torch.testing.assert_close(one, other)


def test_validation_takes_what_is_tried_again(model: RefinerModel, tmp_path: Path):
    """Its statistics are those of first tries, however many there were."""
    Image.fromarray(random_image(H, W)).save(tmp_path / "photo.png")
    truth = discs(H, W, CIRCLES[:2]).numpy()
    images = [simulated_image(tmp_path / "photo.png", truth, (0, seed)) for seed in range(2)]
    record = Validation(images, RefineOptions(keep_if_iou_below=1.0))(Refiner(deepcopy(model)))
    assert record["boundary_iou"] == record["boundary_iou_coarse"]


def test_a_proposal_too_thin_to_be_judged_is_none(model: RefinerModel, monkeypatch: pytest.MonkeyPatch):
    """No cell of it is set, as no cell of the mask of the call: nothing says which of the two is better."""

    def move(segmenter: Any, image: Any, boxes: Tensor, masks: Tensor, index: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        masks[index] = masks[index].roll(1, dims=2)
        return torch.ones(len(boxes), 2), torch.ones(len(boxes), dtype=torch.bool)

    monkeypatch.setattr("transfiner_refine.pipeline.propose", move)
    masks = torch.zeros(2, H, W, dtype=torch.bool)
    masks[0, 10:110, 70:72] = True
    masks[1, 20:100, 40:110] = True
    boxes = torch.tensor([[10.0, 5.0, 150.0, 115.0], [40.0, 20.0, 110.0, 100.0]])
    refined = Refiner(model).refine(random_image(H, W), boxes=boxes, masks=masks, options=replace(ALL, depth=1))
    assert torch.equal(refined.masks[0], masks[0]) and not torch.equal(refined.masks[1], masks[1])


@pytest.mark.parametrize("encode", ["crops", "image"])
def test_the_default_dtype_is_not_in_the_way(encode: Literal["crops", "image"], model: RefinerModel):
    """A caller's float64 changes nothing."""
    image, masks = random_image(H, W), discs(H, W, CIRCLES)
    options = replace(ALL, encode=encode)
    expected = Refiner(model).refine(image, masks=masks, options=options)
    torch.set_default_dtype(torch.float64)
    try:
        found = Refiner(model).refine(image, masks=masks, options=options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.masks, expected.masks)


def test_half_precision_goes_through():
    torch.manual_seed(0)
    segmenter = Segmenter().eval().to(torch.bfloat16)
    logits, quality = segmenter(
        torch.rand(1, 3, 64, 96, dtype=torch.bfloat16), torch.tensor([[10.0, 10.0, 60.0, 50.0]])
    )
    assert logits.shape == (1, 3, 16, 24) and logits.dtype == quality.dtype == torch.float32
    assert logits.isfinite().all() and quality.isfinite().all()


@pytest.mark.parametrize("nothing", [{"depth": 0}, {"incoherence_threshold": 1.0}])
def test_where_nothing_is_refined_nothing_is_proposed(model: RefinerModel, nothing: dict):
    image, masks = random_image(H, W), discs(H, W, CIRCLES)
    assert torch.equal(Refiner(model).refine(image, masks=masks, options=replace(ALL, **nothing)).masks, masks)


def test_batches_nothing_and_quadtrees(model: RefinerModel):
    refiner = Refiner(model)
    images = [random_image(H, W, seed) for seed in range(3)]
    masks = [discs(H, W, CIRCLES)[:count] for count in (3, 0, 2)]
    coarse = [Instances(boxes=boxes_from_masks(x), masks=x, image_size=(H, W)) for x in masks]
    batch = refiner.refine_batch(images, coarse, options=ALL)
    for image, given, refined in zip(images, coarse, batch, strict=True):
        alone = refiner.refine(image, boxes=given.boxes, masks=given.masks, options=ALL)
        assert torch.equal(refined.masks, alone.masks)
    details = refiner.refine(images[0], masks=masks[0], options=replace(ALL, return_quadtree=True)).details
    assert details is not None and len(details.quadtree) == 3


def test_gains_behind_proposals_have_a_function_of_their_own():
    fitted = with_gain_predictor(RefinerModel(encoder_config(segments=True, pixel_widths=(8, 12))))
    assert fitted.gain_predictor is not None and fitted.gain_predictor.edge_weight is not None
    count = len(STATISTICS) + len(EDGE_STATISTICS) + len(PROPOSAL_STATISTICS)
    statistics = torch.randn(300, count, generator=torch.Generator().manual_seed(0))
    gains = 0.01 * statistics[:, 0] + 0.02 * statistics[:, -1]
    fit_gain(fitted, statistics, gains)
    predicted = fitted.gain_predictor(statistics)
    assert torch.corrcoef(torch.stack([predicted, gains]))[0, 1] > 0.97
    assert 0.8 < (predicted.std() / gains.std()) < 1.2
    won = gains[predicted >= 0.005].sum()
    assert won > 0.99 * gains.clamp(min=0).sum()
    assert fitted.gain_predictor.edge_weight.abs().max() == 0  # that of refinements without proposals is left alone
    fit_gain(fitted, statistics[:, :-2], gains)
    assert fitted.gain_predictor.edge_weight.abs().max() > 0
    assert torch.equal(fitted.gain_predictor(statistics), predicted)


def test_gains_of_second_tries_have_one_as_well():
    fitted = with_gain_predictor(RefinerModel(encoder_config(segments=True, pixel_widths=(8, 12))))
    predictor = fitted.gain_predictor
    assert predictor is not None
    statistics = torch.randn(300, len(STATISTICS) + len(EDGE_STATISTICS), generator=torch.Generator().manual_seed(0))
    gains = 0.03 * statistics[:, 0] - 0.02
    assert predictor(statistics, again=True).abs().max() == 0
    fit_gain(fitted, statistics, gains, again=True)
    predicted = predictor(statistics, again=True)
    assert gains[predicted >= 0.005].sum() > 0.95 * gains.clamp(min=0).sum()
    assert predictor(statistics).abs().max() == 0  # what is no second try is left alone
    short = statistics[:, : len(STATISTICS)]  # where nothing is known of edges
    assert torch.equal(predictor(short, again=True), predictor(short))
    with pytest.raises(InvalidInputError, match="14 statistics"):
        fit_gain(fitted, short, gains, again=True)
    with pytest.raises(InvalidInputError, match="segmenter"):
        fit_gain(with_gain_predictor(RefinerModel(encoder_config())), short, gains, again=True)


def test_calibration_fits_first_and_second_tries(
    model: RefinerModel, script: Callable[[str], ModuleType], tmp_path: Path
):
    """An untrained refiner spoils what it touches: from exact masks and a detector's, behind proposals and without."""
    calibrate, dataset = script("calibrate"), script("dataset")
    photos = list(dataset.MatchedSet(make_disc_set(tmp_path))) * 6
    fresh = deepcopy(model)
    predictor = calibrate.predicting(Refiner(fresh), [photos, []]).model.gain_predictor
    assert predictor.proposal_weight.abs().max() > 0 and predictor.again_weight.abs().max() > 0
    assert predictor.edge_weight.abs().max() == 0  # that of calls without a segmenter stays as it was
    refined = Refiner(fresh).refine(photos[0].image, boxes=photos[0].boxes, masks=photos[0].coarse)
    assert refined.kept_coarse is not None and refined.kept_coarse.all()


def test_models_with_a_segmenter_are_saved_and_loaded(tmp_path: Path):
    torch.manual_seed(0)
    made = RefinerModel(encoder_config(segments=True))
    again = Refiner.from_pretrained(Refiner(made).save_pretrained(tmp_path / "whole", dtype=torch.float32))
    image, masks = random_image(H, W), discs(H, W, CIRCLES[:1])
    expected = Refiner(made).refine(image, masks=masks, options=ALL)
    assert torch.equal(again.refine(image, masks=masks, options=ALL).masks, expected.masks)
    with pytest.raises(InvalidInputError, match="segments false"):
        RefinerModel(small_config(segments=True))


def test_features_go_without(model: RefinerModel):
    """A detector's features come without the photo that a segmenter needs."""
    pyramid = replace(random_pyramid(H, W, strides=(2, 4, 8, 16, 32)), source="image_encoder")
    masks = discs(H, W, CIRCLES)
    refined = Refiner(model).refine(features=pyramid, image_size=(H, W), masks=masks, options=ALL)
    without = replace(ALL, segment=False)
    expected = Refiner(model).refine(features=pyramid, image_size=(H, W), masks=masks, options=without)
    assert torch.equal(refined.masks, expected.masks)
    assert np.asarray(refined.masks).shape == (3, H, W)
