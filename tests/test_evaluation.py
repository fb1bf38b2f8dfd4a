"""Mask IoU, Boundary IoU, matching and the paired figures."""

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation import (
    boundary_iou,
    boundary_region,
    boundary_width,
    figures_from_scores,
    mask_iou,
    match_detections,
    paired_figures,
    pairwise_iou,
)


def blobs(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Masks with holes, thin parts and pieces that touch the image's border: unions of rectangles and ellipses."""
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        for part in range(6):
            cx, cy = rng.uniform(0, width), rng.uniform(0, height)
            rx, ry = 1 + rng.uniform(0, width / 3), 1 + rng.uniform(0, height / 3)
            inside = np.maximum(abs(x - cx) / rx, abs(y - cy) / ry) < 1
            if part % 2:
                inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
            mask[inside] = part < 4  # the last two cut holes
    return masks


def slow_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Cheng et al. 2021, as published: ``width`` erosions by a 3×3 square, background outside of the image."""
    height, columns = mask.shape
    eroded = mask
    for _ in range(width):
        padded = np.pad(eroded, 1)
        eroded = np.ones_like(mask)
        for dy in range(3):
            for dx in range(3):
                eroded = eroded & padded[dy : dy + height, dx : dx + columns]
    return mask & ~eroded


def slow_boundary_iou(a: np.ndarray, b: np.ndarray, dilation: float) -> float:
    width = max(1, round(dilation * math.sqrt(a.shape[0] ** 2 + a.shape[1] ** 2)))
    a, b = slow_boundary(a, width), slow_boundary(b, width)
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def rows(*spans: tuple[int, int], length: int = 100) -> np.ndarray:
    """Masks of one row, each set from one column up to another, so that IoUs can be read off."""
    masks = np.zeros((len(spans), 1, length), bool)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[0, start:stop] = True
    return masks


@pytest.mark.parametrize("width", [1, 2, 5, 20])
def test_boundary_region_is_the_mask_minus_repeated_erosion(rng, width):
    for mask in [*blobs(rng, 20, 48, 61), np.ones((48, 61), bool), np.zeros((48, 61), bool)]:
        np.testing.assert_array_equal(boundary_region(mask, width), slow_boundary(mask, width))


@pytest.mark.parametrize("size", [(40, 60), (97, 31), (1, 9)])
@pytest.mark.parametrize("dilation", [0.001, 0.02, 0.1])
def test_boundary_iou_is_the_published_one(rng, size, dilation):
    a, b = blobs(rng, 25, *size), blobs(rng, 25, *size)
    a[0] = b[1] = a[2] = b[2] = False  # one empty, the other empty, both empty
    b[3] = a[3]
    expected = [slow_boundary_iou(x, y, dilation) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(boundary_iou(a, b, dilation), expected, rtol=0, atol=1e-12)


def test_shifted_square_by_hand():
    # 30×40 pixels, diagonal 50, so the boundary is 1 wide: rings of 36 pixels that share 9 above and 9 below.
    a, b = np.zeros((2, 1, 30, 40), bool)
    a[0, 10:20, 10:20] = b[0, 10:20, 11:21] = True
    assert mask_iou(a, b)[0] == pytest.approx(90 / 110)
    assert boundary_iou(a, b)[0] == pytest.approx(18 / (36 + 36 - 18))


def test_the_border_of_the_image_is_a_boundary():
    full = np.ones((30, 40), bool)
    assert boundary_region(full, 3).sum() == 30 * 40 - 24 * 34


def test_boundary_width_is_a_share_of_the_diagonal():
    assert boundary_width((480, 640)) == 16  # 2 % of 800
    assert boundary_width((480, 640), 0.005) == 4
    assert boundary_width((10, 10)) == 1


def test_empty_masks_agree_with_each_other_alone():
    empty, full = np.zeros((1, 9, 9), bool), np.ones((1, 9, 9), bool)
    for score in (mask_iou, boundary_iou):
        assert score(empty, empty) == 1
        assert score(empty, full) == score(full, empty) == 0


@pytest.mark.parametrize("score", [mask_iou, boundary_iou])
def test_arrays_tensors_and_lists_score_alike(rng, score):
    a, b = blobs(rng, 4, 33, 47), blobs(rng, 4, 33, 47)
    before = a.copy(), b.copy()
    expected = score(a, b)
    assert expected.shape == (4,)
    assert expected.dtype == np.float64
    np.testing.assert_array_equal(score(torch.from_numpy(a), torch.from_numpy(b)), expected)
    np.testing.assert_array_equal(score(list(torch.from_numpy(a)), list(b)), expected)
    column_major = [np.asfortranarray(x) for x in a]  # as pycocotools decodes
    np.testing.assert_array_equal(score(column_major, b), expected)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])


def test_images_of_several_sizes_score_as_one_by_one(rng):
    a = [blobs(rng, 1, 20, 30)[0], blobs(rng, 1, 90, 50)[0]]
    b = [blobs(rng, 1, 20, 30)[0], blobs(rng, 1, 90, 50)[0]]
    for score in (mask_iou, boundary_iou):
        assert list(score(a, b)) == [score(x[None], y[None])[0] for x, y in zip(a, b, strict=True)]


def test_no_instances():
    none = np.zeros((0, 9, 9), bool)
    assert mask_iou(none, none).shape == boundary_iou(none, none).shape == (0,)
    assert len(match_detections(none, none)) == 0
    assert pairwise_iou(none, np.ones((3, 9, 9), bool)).shape == (0, 3)
    figures = paired_figures(none, none, none)
    assert figures.count == 0
    assert math.isnan(figures.mean_iou_refined)
    assert math.isnan(figures.share_worse)


@pytest.mark.parametrize("score", [mask_iou, boundary_iou])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((1, 4, 4), np.uint8), np.ones((1, 4, 4), bool), "expected .* bool masks, got uint8 .* index 0"),
        (np.ones((1, 4, 4), bool), np.ones((1, 4, 4)), "expected .* bool masks, got float64"),
        (np.ones((4, 4), bool), np.ones((4, 4), bool), r"expected \(H, W\) bool masks, got bool \(4,\)"),
        (np.ones((1, 4, 4), bool), np.ones((2, 4, 4), bool), "as many masks on both sides, got 1 and 2"),
        (np.ones((1, 4, 4), bool), np.ones((1, 4, 5), bool), r"one size, got \(4, 4\) and \(4, 5\) at index 0"),
    ],
)
def test_masks_that_cannot_be_compared(score, a, b, message):
    with pytest.raises(InvalidInputError, match=message):
        score(a, b)


def test_pairwise_iou_agrees_with_pycocotools(rng):
    a, b = blobs(rng, 7, 40, 60), blobs(rng, 5, 40, 60)
    a[0] = False
    runs_a, runs_b = ([coco_mask.encode(np.asfortranarray(x, dtype=np.uint8)) for x in masks] for masks in (a, b))
    expected = coco_mask.iou(runs_a, runs_b, [0] * len(b))
    np.testing.assert_allclose(pairwise_iou(a, b), expected, rtol=0, atol=1e-12)


def test_masks_of_two_images_are_not_matched():
    with pytest.raises(InvalidInputError, match="one image size"):
        match_detections(np.ones((1, 4, 4), bool), np.ones((1, 4, 5), bool))


def test_the_best_pair_is_matched_first():
    # The first truth's best detection (0.6) is the second truth's best, too (0.8): it goes to the second.
    truth = rows((0, 60), (0, 80))
    detections = rows((0, 100), (0, 36))
    matches = match_detections(truth, detections)
    assert list(matches.truth) == [0, 1]
    assert list(matches.detection) == [1, 0]
    assert list(matches.iou) == pytest.approx([0.6, 0.8])


def test_a_detection_is_matched_once():
    matches = match_detections(rows((0, 60), (0, 80)), rows((0, 100)))
    assert list(matches.truth) == [1]
    assert list(matches.detection) == [0]


def test_half_an_overlap_is_no_match():
    assert len(match_detections(rows((0, 50)), rows((0, 100)))) == 0
    assert len(match_detections(rows((0, 51)), rows((0, 100)))) == 1
    assert len(match_detections(rows((0, 51)), rows((0, 100)), min_iou=0.6)) == 0


def test_order_of_detections_does_not_matter(rng):
    truth = blobs(rng, 6, 40, 60)
    detections = truth.copy()
    detections[:, ::3] = False  # IoU of about two thirds
    shuffle = rng.permutation(6)
    matches = match_detections(truth, detections[shuffle])
    assert list(shuffle[matches.detection]) == list(range(6))


def test_figures_by_hand():
    coarse, refined = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.6, 0.6, 0.69, 0.7])
    figures = figures_from_scores(coarse, coarse + 0.1, coarse, refined)
    assert figures.count == 4
    assert figures.iou_gain == pytest.approx(0.1)
    assert figures.mean_boundary_iou_coarse == pytest.approx(0.65)
    assert figures.mean_boundary_iou_refined == pytest.approx(0.6475)
    assert figures.boundary_iou_gain == pytest.approx(-0.0025)
    assert figures.share_worse == 0.25  # a loss of 0.01 is not counted, one of 0.1 is


def test_paired_figures_judge_both_against_the_truth(rng):
    truth = blobs(rng, 5, 40, 60)
    coarse, refined = truth.copy(), truth.copy()
    coarse[:, ::2] = False
    refined[:, ::9] = False
    figures = paired_figures(coarse, refined, truth, dilation=0.05)
    assert figures.mean_iou_coarse == pytest.approx(mask_iou(coarse, truth).mean())
    assert figures.mean_iou_refined == pytest.approx(mask_iou(refined, truth).mean())
    assert figures.mean_boundary_iou_coarse == pytest.approx(boundary_iou(coarse, truth, 0.05).mean())
    assert figures.mean_boundary_iou_refined == pytest.approx(boundary_iou(refined, truth, 0.05).mean())
    assert figures.share_worse == 0
    assert paired_figures(refined, coarse, truth).share_worse == 1


def test_scores_of_other_instances_are_refused():
    with pytest.raises(InvalidInputError, match=r"same instances, got \[2, 2, 3, 2\]"):
        figures_from_scores(np.zeros(2), np.zeros(2), np.zeros(3), np.zeros(2))
