"""The pixel head: what colours say, what it may change, and that a call can do without it."""

from dataclasses import replace
from typing import Literal

import cv2
import numpy as np
import pytest
import torch
from small_models import CIRCLES, discs, encoder_config, eventful_model, random_image, random_pyramid
from torch import Tensor

from transfiner_refine import InvalidInputError, RefineOptions, Refiner
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.edges import (
    COLOUR_BINS,
    LEAST_SHARE,
    MOST_ODDS,
    VOTE_COLOUR,
    VOTE_REACH,
    VOTE_STEPS,
    VOTE_STRIDE,
    colour_log_odds,
    guided_filter,
    like_colours,
)
from transfiner_refine.functional.paste import paste
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.pixel_head import HEAD_SIDE, PIXEL_SIDE, PixelHead, align, enlarge
from transfiner_refine.modeling.transfiner import Detection, TransfinerOutput

H, W = 240, 250
EVERY = RefineOptions(keep_if_iou_below=0.0, encode="crops")
WITHOUT = replace(EVERY, align_pixels=False)


@pytest.fixture(scope="module")
def model() -> RefinerModel:
    model = eventful_model(encoder_config(pixel_widths=(8, 12)))
    assert model.pixel_head is not None
    torch.nn.init.normal_(model.pixel_head.out.weight, std=0.5)
    return model


def smooth_photo(rois: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(rois, 3, side // 8, side // 8, generator=generator)
    return torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(("halvings", "window"), [(1, 5), (2, 3)])
def test_guided_filter_against_opencv_sums(halvings: int, window: int):
    """At a lower resolution, against covariances written out and numpy's solver."""
    side, eps, shrink = 24, 1e-3, 2**halvings
    pixels, mask = smooth_photo(2, side), torch.rand(2, side, side, generator=torch.Generator().manual_seed(1))
    found = guided_filter(pixels, mask, window, eps, halvings)
    half, cells = window // 2, side // shrink
    part = lambda i: slice(max(i - half, 0), i + half + 1)  # noqa: E731
    for one, photo, probs in zip(found, pixels.double().numpy(), mask.double().numpy(), strict=True):
        guide = photo.reshape(3, cells, shrink, cells, shrink).mean(axis=(2, 4))
        target = probs.reshape(cells, shrink, cells, shrink).mean(axis=(1, 3))
        lines = np.zeros((4, cells, cells))
        for row in range(cells):
            for column in range(cells):
                colours = guide[:, part(row), part(column)].reshape(3, -1)
                labels = target[part(row), part(column)].ravel()
                covariance = np.cov(colours, bias=True) + eps * np.eye(3)
                slope = np.linalg.solve(covariance, (colours * labels).mean(1) - colours.mean(1) * labels.mean())
                lines[:, row, column] = *slope, labels.mean() - slope @ colours.mean(1)
        means = [[lines[:, part(r), part(c)].mean(axis=(1, 2)) for c in range(cells)] for r in range(cells)]
        full = cv2.resize(np.array(means), (side, side), interpolation=cv2.INTER_LINEAR)
        expected = (full[..., :3] * photo.transpose(1, 2, 0)).sum(axis=2) + full[..., 3]
        assert one.numpy() == pytest.approx(expected.clip(0, 1), abs=1e-4)


def test_like_colours_against_a_loop():
    side = 28
    pixels, mask = smooth_photo(1, side), torch.rand(1, side, side, generator=torch.Generator().manual_seed(2))
    found = like_colours(pixels, mask)[0]
    colours = torch.nn.functional.avg_pool2d(pixels, 2)[0].double()
    votes = 2 * torch.nn.functional.avg_pool2d(mask[:, None], 2)[0, 0].double() - 1
    cells = side // 2
    for row, column in ((0, 0), (7, 6), (13, 2)):
        total, weight = 0.0, 1.0
        for down in range(-VOTE_STEPS, VOTE_STEPS + 1):
            for across in range(-VOTE_STEPS, VOTE_STEPS + 1):
                if not (down or across):
                    continue
                y = min(max(row + down * VOTE_STRIDE, 0), cells - 1)
                x = min(max(column + across * VOTE_STRIDE, 0), cells - 1)
                apart = float((colours[:, y, x] - colours[:, row, column]).square().sum()) / VOTE_COLOUR**2
                far = (down * down + across * across) * VOTE_STRIDE**2 / VOTE_REACH**2
                kernel = np.exp(-(apart + far) / 2)
                weight, total = weight + kernel, total + kernel * float(votes[y, x])
        assert float(found[row, column]) == pytest.approx(total / weight, abs=1e-5)


def test_colours_of_the_object_have_odds_in_its_favour():
    pixels = torch.full((2, 3, 32, 32), 0.1)
    pixels[0, 0, 8:24, 8:24] = 0.9  # a red square
    mask = torch.zeros(2, 32, 32)
    mask[:, 6:22, 8:24] = 1.0  # and a mask two pixels too high
    odds = colour_log_odds(pixels, mask)
    red = 14 * 16 / 256  # of the mask's 256 pixels, the others of its colours being the background's
    smoothed = 0.5 * 0.5 * 0.5
    outside = (1024 - 256 - 32) / (1024 - 256)
    expected = np.log((red * smoothed + LEAST_SHARE) / ((1 - outside) * smoothed + LEAST_SHARE)) / MOST_ODDS
    assert float(odds[0, 15, 15]) == pytest.approx(expected, abs=1e-4)
    assert float(odds[0, 23, 15]) == pytest.approx(expected, abs=1e-4)  # missed by the mask, not by its colour
    assert float(odds[0, 0, 0]) < -0.4
    assert odds[1].abs().max() < 1e-6  # one colour says nothing
    assert COLOUR_BINS == 16


def test_an_untrained_head_changes_nothing():
    head = PixelHead((8, 12))
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(3, 56, 56, generator=generator) * 0.9 + 0.05
    pixels, coarse = smooth_photo(3, HEAD_SIDE), torch.rand(3, 56, 56, generator=generator)
    with torch.no_grad():
        logits = head(pixels, probs, coarse)
    torch.testing.assert_close(torch.sigmoid(logits), enlarge(probs[:, None], HEAD_SIDE)[:, 0])


def test_the_outline_follows_an_edge_finer_than_the_head_sees():
    """An edge of the photo between two pixels of the network is found by the filter behind it."""
    edge = 211  # of 448 pixels: within a pixel of the network's grid
    pixels = torch.full((1, 3, PIXEL_SIDE, PIXEL_SIDE), 0.2)
    pixels[..., edge:] = 0.8
    probs = torch.zeros(1, 112, 112)
    probs[..., 53:] = 1.0  # cells of four pixels: one off
    detection = Detection(torch.zeros(1, 28, 28), (), (), torch.zeros(1, 1, 28, 28))
    refined = TransfinerOutput(probs, torch.ones(1, 112, 112, dtype=torch.bool), detection, ())
    with torch.no_grad():
        _, aligned = align(PixelHead((8, 12)), pixels, refined, probs)
    found = (aligned[0] >= 0.5).int().argmax(dim=1)
    assert (found == edge).all()


@pytest.mark.parametrize("side", [28, 56, 112, 224])
def test_only_cells_near_a_node_change(side: int):
    torch.manual_seed(0)
    head = PixelHead((8, 12))
    torch.nn.init.normal_(head.out.weight, std=1.0)
    touched = torch.zeros(2, side, side, dtype=torch.bool)
    cell = side // 28
    touched[0, 10 * cell, 5 * cell] = True  # in root cell (10, 5); the second RoI has none
    probs = torch.rand(2, side, side)
    detection = Detection(torch.zeros(2, 28, 28), (), (), torch.zeros(2, 1, 28, 28))
    with torch.no_grad():
        output, aligned = align(
            head, smooth_photo(2, PIXEL_SIDE), TransfinerOutput(probs, touched, detection, ()), torch.rand_like(probs)
        )
    near = torch.zeros(2, side, side, dtype=torch.bool)
    near[0, 8 * cell : 13 * cell, 3 * cell : 8 * cell] = True
    assert torch.equal(output.touched, near)
    assert torch.equal(output.probs[~near], probs[~near])
    assert not torch.equal(output.probs[near], probs[near])
    moved = (aligned - enlarge(probs[:, None])[:, 0]).abs() > 1e-6
    scale = PIXEL_SIDE // side
    assert not moved[~near.repeat_interleave(scale, 1).repeat_interleave(scale, 2)].any()
    # A cell's probability moves as much as its pixels do.
    pooled = torch.nn.functional.avg_pool2d((aligned - enlarge(probs[:, None])[:, 0])[:, None], scale)[:, 0]
    torch.testing.assert_close(output.probs, (probs + pooled).clamp(0, 1))


def test_a_call_aligns_its_masks(model: RefinerModel):
    """The masks are those of the pixel grid, pasted where labels change."""
    refiner, image = Refiner(model), random_image(H, W, seed=3)
    masks = discs(H, W, CIRCLES)
    aligned, plain = (refiner.refine(image, masks=masks, options=options) for options in (EVERY, WITHOUT))
    assert not torch.equal(aligned.masks, plain.masks)
    assert aligned.probs is not None and plain.probs is not None
    assert aligned.probs.shape == plain.probs.shape == (len(masks), 112, 112)
    # The cells of the result are the mean of its pixels, so a paste of the cells is close to the mask.
    rough = masks.clone()
    paste(aligned.probs, expand_boxes(boxes_from_masks(masks), model.config.box_margin), rough)
    assert (rough != aligned.masks).float().mean() < 0.5 * (masks != aligned.masks).float().mean()


def test_without_a_head_the_option_has_no_effect():
    refiner, image = Refiner(eventful_model(encoder_config())), random_image(H, W)
    masks = discs(H, W, CIRCLES[:2])
    with_option, without = (refiner.refine(image, masks=masks, options=options) for options in (EVERY, WITHOUT))
    assert torch.equal(with_option.masks, without.masks)


@pytest.mark.parametrize("frame", ["image", "box"])
def test_nothing_found_leaves_the_masks_as_they_are(model: RefinerModel, frame: Literal["image", "box"]):
    refiner, image = Refiner(model), random_image(H, W)
    masks = discs(H, W, CIRCLES)
    boxes = boxes_from_masks(masks)
    given = masks if frame == "image" else torch.rand(len(masks), 28, 28)
    calm = replace(EVERY, incoherence_threshold=1.0)
    out = refiner.refine(image, boxes=boxes, masks=given, mask_frame=frame, options=calm)
    plain = refiner.refine(image, boxes=boxes, masks=given, mask_frame=frame, options=replace(calm, depth=0))
    assert torch.equal(out.masks, plain.masks)


def test_none_of_it_depends_on_the_company(model: RefinerModel):
    """No instances, one, or many at once, in one group or several."""
    refiner, image = Refiner(model), random_image(H, W, seed=3)
    masks = discs(H, W, CIRCLES)
    together = refiner.refine(image, masks=masks, options=EVERY)
    assert len(refiner.refine(image, masks=masks[:0], options=EVERY)) == 0
    for options in (replace(EVERY, token_budget=1), replace(EVERY, token_budget=2048)):
        apart = refiner.refine(image, masks=masks, options=options)
        assert (apart.masks != together.masks).float().mean() < 1e-5
    alone = refiner.refine(image, masks=masks[2:3], options=EVERY)
    assert (alone.masks[0] != together.masks[2]).float().mean() < 1e-5


def test_features_without_a_photo_are_refined_without_the_head(model: RefinerModel):
    strides = model.config.strides
    pyramid = random_pyramid(H, W, strides=strides)
    pyramid = replace(pyramid, source="image_encoder")
    masks = discs(H, W, CIRCLES[:2])
    found = [
        Refiner(model).refine(features=pyramid, masks=masks, image_size=(H, W), options=options).masks
        for options in (EVERY, WITHOUT)
    ]
    assert torch.equal(*found)


def test_files_keep_the_head(model: RefinerModel, tmp_path):
    again = Refiner.from_pretrained(Refiner(model).save_pretrained(tmp_path / "saved"))
    assert again.config.pixel_widths == (8, 12)
    image, masks = random_image(H, W, seed=3), discs(H, W, CIRCLES[:3])
    before, after = (r.refine(image, masks=masks, options=EVERY).masks for r in (Refiner(model), again))
    assert (before != after).float().mean() < 5e-3  # weights were rounded to half precision


def test_half_precision(model: RefinerModel, tmp_path):
    saved = Refiner(model).save_pretrained(tmp_path / "saved")
    image, masks = random_image(H, W, seed=3), discs(H, W, CIRCLES[:3])
    full, half = (
        Refiner.from_pretrained(saved, dtype=dtype).refine(image, masks=masks, options=EVERY).probs
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert full is not None and half is not None
    assert (full - half).abs().mean() < 0.05


def test_widths_are_checked():
    with pytest.raises(InvalidInputError, match="pixel_widths"):
        encoder_config(pixel_widths=(8, 0))
    with pytest.raises(InvalidInputError, match="pixel_widths"):
        encoder_config(pixel_widths=(8,) * 6)
