"""Several passes are one refinement after another, each in a box grown to hold what the last one made."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import discs, encoder_config, eventful_model, random_image, random_pyramid, small_config
from torch import Tensor

from transfiner_refine import Instances, InvalidInputError, RefineOptions, Refiner, TransfinerConfig
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.inputs import boxes_from_masks

H, W = 90, 120
CIRCLES = [(40.0, 45.0, 25.0), (85.0, 50.0, 18.0), (104.0, 18.0, 12.0)]
ONCE = RefineOptions(keep_if_iou_below=0.0, encode="crops")
TWICE = replace(ONCE, passes=2, again_if_iou_below=0.95)


@pytest.fixture(scope="module")
def refiner() -> Refiner:
    """A refiner with an image encoder, whose random corrections are large."""
    return Refiner(eventful_model(encoder_config(depth=2)))


@pytest.fixture
def masks() -> Tensor:
    return discs(H, W, CIRCLES)


@pytest.fixture
def image() -> np.ndarray:
    return random_image(H, W)


def grown(boxes: Tensor, masks: Tensor) -> Tensor:
    held = boxes_from_masks(masks)
    return torch.cat([torch.minimum(boxes[:, :2], held[:, :2]), torch.maximum(boxes[:, 2:], held[:, 2:])], dim=1)


def probs_of(out: Instances) -> Tensor:
    assert out.probs is not None
    return out.probs


def by_hand(refiner: Refiner, first: Instances, **source) -> Instances:
    """The second pass as a call of its own."""
    return refiner.refine(masks=first.masks, boxes=grown(first.boxes, first.masks), options=ONCE, **source)


def agreement_with(masks: Tensor, out: Instances) -> Tensor:
    """IoU of refined with given masks, as the RoI's cells see them."""
    assert out.rois is not None
    after = probs_of(out) >= 0.5
    given = crop_masks(masks, out.rois, after.shape[-1]) >= 0.5
    return (after & given).sum(dim=(1, 2)) / (after | given).sum(dim=(1, 2))


@pytest.mark.parametrize("encode", ["crops", "image"])
def test_two_passes_are_two_calls(refiner: Refiner, image: np.ndarray, masks: Tensor, encode: str):
    if encode == "image":
        masks = masks[:1]  # the others settle at once, and the scale of an image is that of the masks left
    once, twice = replace(ONCE, encode=encode), replace(TWICE, encode=encode)
    first = refiner.refine(image, masks=masks, options=once)
    boxes = grown(first.boxes, first.masks)
    second = refiner.refine(image, masks=first.masks, boxes=boxes, options=once)
    out = refiner.refine(image, masks=masks, options=twice)
    assert torch.equal(out.masks, second.masks) and (out.masks != first.masks).any(dim=(1, 2)).all()
    torch.testing.assert_close(probs_of(out), probs_of(second), rtol=0, atol=1e-4)
    assert out.rois is not None
    torch.testing.assert_close(out.rois, expand_boxes(boxes, refiner.config.box_margin))
    assert torch.equal(out.boxes, first.boxes)


def test_features_serve_both_passes(masks: Tensor):
    refiner = Refiner(eventful_model(small_config()))
    source = {"features": random_pyramid(H, W), "image_size": (H, W)}
    first = refiner.refine(masks=masks, options=ONCE, **source)
    out = refiner.refine(masks=masks, options=TWICE, **source)
    assert torch.equal(out.masks, by_hand(refiner, first, **source).masks)


def test_soft_masks_in_the_frame_of_their_boxes(refiner: Refiner, image: np.ndarray, masks: Tensor):
    boxes = boxes_from_masks(masks)
    probs = torch.linspace(0.3, 0.9, 28 * 28).reshape(1, 28, 28).repeat(len(masks), 1, 1)
    first = refiner.refine(image, boxes=boxes, masks=probs, mask_frame="box", options=ONCE)
    out = refiner.refine(image, boxes=boxes, masks=probs, mask_frame="box", options=TWICE)
    assert torch.equal(out.masks, by_hand(refiner, first, image=image).masks)


def test_what_has_settled_is_left_alone(image: np.ndarray, masks: Tensor):
    """A model that changes nothing has settled at once: the pass after the first never runs."""
    refiner = Refiner(eventful_model(encoder_config(depth=2)))
    last = refiner.model.transfiner.pixel_decoder.layers[2]
    torch.nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    torch.nn.init.constant_(last.bias, 1e-3)  # type: ignore[arg-type]
    calls = []
    assert refiner.model.image_encoder is not None
    refiner.model.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    refiner.refine(image, masks=masks, options=TWICE)
    assert len(calls) == 1


def test_only_what_changed_a_lot_has_another_pass(refiner: Refiner, image: np.ndarray):
    masks = discs(H, W, [(15.0 + 8 * i, 20.0 + 13 * (i % 5), 8.0 + 3 * (i % 4)) for i in range(12)])
    first = refiner.refine(image, masks=masks, options=ONCE)
    second = by_hand(refiner, first, image=image)
    agreement = agreement_with(masks, first)
    ordered = agreement.sort().values
    limit = float(ordered[5] + ordered[6]) / 2
    out = refiner.refine(image, masks=masks, options=replace(TWICE, again_if_iou_below=limit))
    again = agreement < limit
    assert again.sum() == 6
    assert torch.equal(out.masks[again], second.masks[again]) and torch.equal(out.masks[~again], first.masks[~again])
    assert (second.masks != first.masks).any(dim=(1, 2)).all()


def test_what_was_refused_is_not_tried_again(refiner: Refiner, image: np.ndarray, masks: Tensor):
    out = refiner.refine(image, masks=masks, options=replace(TWICE, keep_if_iou_below=1.0))
    assert out.kept_coarse is not None and out.kept_coarse.all() and torch.equal(out.masks, masks)


def test_a_later_pass_that_strays_leaves_the_one_before(refiner: Refiner, image: np.ndarray):
    # Among many discs there is one that the second pass changes more than the first.
    masks = discs(H, W, [(15.0 + 8 * i, 20.0 + 13 * (i % 5), 8.0 + 3 * (i % 4)) for i in range(12)])
    first = refiner.refine(image, masks=masks, options=ONCE)
    second = by_hand(refiner, first, image=image)
    before, agreement = (agreement_with(masks, first), agreement_with(first.masks, second))
    chosen = int((before - agreement).argmax())
    limit = float(before[chosen] + agreement[chosen]) / 2
    assert agreement[chosen] + 0.01 < limit < before[chosen] - 0.01  # the first pass is accepted, the second strays
    out = refiner.refine(image, masks=masks, options=replace(TWICE, keep_if_iou_below=limit, return_quadtree=True))
    assert out.kept_coarse is not None and not out.kept_coarse[chosen]
    assert torch.equal(out.masks[chosen], first.masks[chosen])
    torch.testing.assert_close(probs_of(out)[chosen], probs_of(first)[chosen], rtol=0, atol=1e-4)
    assert out.rois is not None and first.rois is not None and torch.equal(out.rois[chosen], first.rois[chosen])
    expected = refiner.refine(image, masks=masks, options=replace(ONCE, return_quadtree=True)).details
    assert out.details is not None and expected is not None
    for level, nodes in enumerate(out.details.quadtree):
        of_first = expected.quadtree[level]
        assert int((nodes.roi == chosen).sum()) == int((of_first.roi == chosen).sum()) > 0


@pytest.mark.parametrize("token_budget", [1024, 16384])
def test_details_are_those_of_the_last_pass(refiner: Refiner, image: np.ndarray, masks: Tensor, token_budget: int):
    options = replace(TWICE, return_quadtree=True, token_budget=token_budget)
    out = refiner.refine(image, masks=masks, options=options)
    first = refiner.refine(image, masks=masks, options=ONCE)
    boxes = grown(first.boxes, first.masks)
    options = replace(ONCE, return_quadtree=True)
    details, expected = out.details, refiner.refine(image, masks=first.masks, boxes=boxes, options=options).details
    assert details is not None and expected is not None
    torch.testing.assert_close(details.incoherence, expected.incoherence, rtol=0, atol=1e-4)
    torch.testing.assert_close(details.coarse_probs, expected.coarse_probs)
    for level, (nodes, of_hand) in enumerate(zip(details.quadtree, expected.quadtree, strict=True)):
        assert torch.equal(nodes.roi, of_hand.roi) and torch.equal(nodes.row, of_hand.row)
        assert torch.equal(nodes.parent, of_hand.parent)
        torch.testing.assert_close(details.node_probs[level], expected.node_probs[level], rtol=0, atol=1e-4)


def test_batch_and_empty_images(refiner: Refiner, image: np.ndarray, masks: Tensor):
    none = torch.zeros((0, H, W), dtype=torch.bool)
    empty = torch.zeros((1, H, W), dtype=torch.bool)
    given = [masks, none, torch.cat([masks[:1], empty])]
    copies = [m.clone() for m in given]
    instances = [Instances(boxes_from_masks(m), m, (H, W)) for m in given]
    found = refiner.refine_batch([image] * 3, instances, options=TWICE)
    for out, before, copy in zip(found, given, copies, strict=True):
        alone = refiner.refine(image, masks=before, boxes=None, options=TWICE) if len(before) else None
        assert torch.equal(before, copy)
        assert alone is None or torch.equal(out.masks, alone.masks)
    assert len(found[1]) == 0 and not found[2].masks[1].any()


def test_the_model_says_how_many(tmp_path: Path, image: np.ndarray, masks: Tensor):
    refiner = Refiner(eventful_model(encoder_config(depth=2, passes=2)))
    loaded = Refiner.from_pretrained(refiner.save_pretrained(tmp_path / "saved"))
    assert loaded.config.passes == 2
    assert torch.equal(
        loaded.refine(image, masks=masks, options=ONCE).masks, loaded.refine(image, masks=masks, options=TWICE).masks
    )
    single = loaded.refine(image, masks=masks, options=replace(ONCE, passes=1))
    assert (single.masks != loaded.refine(image, masks=masks, options=TWICE).masks).any()


@pytest.mark.parametrize("passes", [0, 5, 1.5, "2"])
@pytest.mark.parametrize("kind", [RefineOptions, TransfinerConfig])
def test_passes_are_a_small_number(kind: type, passes: object):
    with pytest.raises(InvalidInputError, match="expected passes from 1 to 4, got"):
        kind(passes=passes)
