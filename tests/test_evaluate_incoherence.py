"""Incoherent regions of ground truth in the image, what they hold, and how well a detector of them does."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation import GroundTruth, analyse_incoherence, incoherent_regions, load_ground_truth
from transfiner_refine.evaluation.detector import DetectorCounts, detector_counts
from transfiner_refine.functional.rle import decode, encode
from transfiner_refine.types import Instances, LevelNodes, RefineDetails

SIZE = (260, 300)
BOX = (20.0, 10.0, 244.0, 234.0)
"""224 pixels to a side: at its finest, the RoI's cells are pixels, and the three levels' are 8, 4 and 2 pixels wide."""


def drawing() -> np.ndarray:
    """A disc with a thin bar and a hole, in the box and beyond it."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    mask = (y - 120) ** 2 + (x - 130) ** 2 < 85**2
    mask[118:121, 130:280] = True
    return mask & ~((y - 100) ** 2 + (x - 110) ** 2 < 20**2)


def is_incoherent(mask: np.ndarray, y: int, x: int, level: int) -> bool:
    """Eq. 1 for the cell that holds a pixel: whether the first pixels of its four quadrants differ in label.

    Sampling by nearest neighbour from 224 down to a quadrant's level keeps the upper left pixel of each block.
    """
    side = 8 >> level
    top, left = 10 + (y - 10) // side * side, 20 + (x - 20) // side * side
    return len({bool(mask[top + dy, left + dx]) for dy in (0, side // 2) for dx in (0, side // 2)}) > 1


def test_regions_are_those_of_eq_1_pixel_by_pixel():
    mask = drawing()
    window, regions = incoherent_regions(mask, torch.tensor(BOX))
    assert window == np.s_[10:234, 20:244]
    for y in range(10, 234, 3):
        for x in range(20, 244, 3):
            expected = [is_incoherent(mask, y, x, level) for level in range(3)]
            assert regions[:, y - 10, x - 20].tolist() == expected, (y, x)
    assert regions.any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ((-30.0, -20.0, 50.0, 70.0), np.s_[0:70, 0:50]),  # beyond the image
        ((10.6, 20.4, 21.6, 31.5), np.s_[20:31, 11:22]),  # fewer pixels than cells; 31.5 is the centre of pixel 31
        ((400.0, 10.0, 450.0, 60.0), np.s_[10:60, 300:300]),  # beside the image
    ],
)
def test_any_box_covers_the_pixels_whose_centres_it_holds(box, window):
    found, regions = incoherent_regions(np.ones(SIZE, bool), torch.tensor(box))
    assert found == window
    assert regions.shape == (3, *np.ones(SIZE, bool)[window].shape)


def test_a_pixel_belongs_to_the_cell_that_holds_its_centre():
    # The first cell of 8 pixels ends at 28.2 and 18.2: pixels 20 to 27 and 10 to 17 have their centres in it.
    _, regions = incoherent_regions(drawing(), torch.tensor((20.2, 10.2, 244.2, 234.2)))
    for axis in (0, 1):
        steps = np.argwhere(np.diff(regions[0].astype(int), axis=axis))[:, axis] + 1
        assert len(steps) > 10
        assert (steps % 8 == 0).all()


def test_a_uniform_mask_has_no_incoherent_region():
    for mask in (np.zeros(SIZE, bool), np.ones(SIZE, bool)):
        assert not incoherent_regions(mask, torch.tensor(BOX))[1].any()


def result(mask: np.ndarray, box: tuple[float, ...] | None = BOX, **fields: Any) -> dict[str, Any]:
    entry = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": encode(mask[None])[0], **fields}
    return entry if box is None else {**entry, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}


@pytest.fixture
def truth(tmp_path: Path) -> GroundTruth:
    """The drawing, and a crowd in the corner."""
    crowd = np.zeros(SIZE, bool)
    crowd[200:, 250:] = True
    masks = np.stack([drawing() & (np.arange(SIZE[1]) < 244), crowd])
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "segmentation": code, "iscrowd": i}
        for i, code in enumerate(encode(masks))
    ]
    image = {"id": 1, "file_name": "1.jpg", "height": SIZE[0], "width": SIZE[1]}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": [image], "annotations": annotations, "categories": [{"id": 1}, {"id": 2}]}))
    return load_ground_truth(path)


def true_mask(truth: GroundTruth) -> np.ndarray:
    return decode(truth.objects[0]["segmentation"], SIZE)


def test_shares_by_hand(truth):
    true = true_mask(truth)
    _, regions = incoherent_regions(true, torch.tensor(BOX))
    union = regions.any(axis=0)
    inside, outside = (np.argwhere(region) + np.array([10, 20]) for region in (union, ~union))
    found = true.copy()
    for y, x in [*inside[::10][:30], *outside[::100][:10]]:  # 30 wrong pixels inside of the union, 10 outside
        found[y, x] ^= True
    found[250, :10] = True  # 10 beyond the box
    analysis = analyse_incoherence(truth, [result(found)])
    assert analysis.count == 1
    assert analysis.union.area == len(inside) / 224**2
    assert analysis.union.errors == 30 / 40
    assert analysis.union.accuracy == 1 - 30 / len(inside)
    assert analysis.union.accuracy_outside == 1 - 10 / len(outside)
    assert analysis.errors_beyond == 10 / 50
    wrong = (found != true)[10:234, 20:244]
    for region, figures in zip(regions, analysis.levels, strict=True):
        assert figures.area == region.sum() / 224**2
        assert figures.errors == (wrong & region).sum() / 40


def test_the_union_is_filled_and_nothing_else_changes(truth):
    true = true_mask(truth)
    window, regions = incoherent_regions(true, torch.tensor(BOX))
    found = np.roll(true, 6, axis=1)
    other = result(found, (250, 200, 300, 260), score=0.9)  # not an object's box
    given = result(found, tag="kept")
    filled = analyse_incoherence(truth, [other, given]).filled
    assert [x["score"] for x in filled] == [0.9, 0.5]
    assert filled[1]["tag"] == "kept"
    assert filled[0]["segmentation"] == other["segmentation"]
    expected = found.copy()
    expected[window] = np.where(regions.any(axis=0), true[window], found[window])
    np.testing.assert_array_equal(decode(filled[1]["segmentation"], SIZE), expected)
    assert (expected != found).any() and (expected != true).any()
    assert given["segmentation"] == encode(found[None])[0]


def test_perfect_masks_have_no_error_to_share(truth):
    analysis = analyse_incoherence(truth, [result(true_mask(truth))])
    assert analysis.union.accuracy == analysis.union.accuracy_outside == 1
    assert math.isnan(analysis.union.errors) and math.isnan(analysis.errors_beyond)


def test_detections_of_an_object(truth):
    found = true_mask(truth)
    left, top, right, bottom = 45.0, 35.0, 244.0, 206.0  # the object's own box
    half = (left, top, right, top + (bottom - top) * 0.49)  # a box IoU of less than one half
    crowd = np.zeros(SIZE, bool)
    crowd[200:, 250:] = True
    results = [
        result(found),
        result(found, score=0.1),  # a second of the same object
        result(found, None),  # the box of the mask
        result(found, half),
        result(found, category_id=2),
        result(crowd, None),
    ]
    assert analyse_incoherence(truth, results).count == 3
    assert analyse_incoherence(truth.regardless_of_category(), results).count == 4
    wrong = result(np.roll(found, 4, axis=0))
    assert analyse_incoherence(truth, [wrong, wrong]).union == analyse_incoherence(truth, [wrong]).union


def test_the_best_object_counts(truth):
    """Of two objects it is the one whose box overlaps more."""
    true = true_mask(truth)
    other = np.zeros(SIZE, bool)
    other[35:206, 45:170] = True
    both = replace(truth, objects=[{**truth.objects[0], "segmentation": encode(other[None])[0]}, truth.objects[0]])
    assert analyse_incoherence(both, [result(true, (45, 35, 244, 206))]).union.accuracy_outside == 1
    assert analyse_incoherence(both, [result(other, (45, 35, 170, 206))]).union.accuracy_outside == 1
    assert analyse_incoherence(both, [result(true, (45, 35, 170, 206))]).union.accuracy_outside < 1


def test_without_an_object_there_is_nothing_to_analyse(truth):
    with pytest.raises(InvalidInputError, match=r"overlaps an object by 0.5 or more, got none of 1"):
        analyse_incoherence(truth, [result(true_mask(truth), (250, 200, 300, 260))])


def refined(found: list[list[tuple[int, int]]], size: tuple[int, int] = (224, 224)) -> Instances:
    """One instance whose RoI is the image, with the given nodes (row, column) at each level."""
    levels = []
    for level, cells in enumerate(found):
        index = torch.tensor(cells, dtype=torch.long).reshape(-1, 2)
        zeros = torch.zeros(len(index), dtype=torch.long)
        levels.append(LevelNodes(zeros, index[:, 0], index[:, 1], zeros - 1, zeros.float(), 28 << level))
    side = 28 << (len(found) - 1)
    probs = tuple(torch.zeros(len(level)) for level in levels)
    details = RefineDetails(torch.zeros(1, 28, 28), tuple(levels), torch.zeros(1, side, side), probs)
    box = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    return Instances(box, torch.zeros(1, *size, dtype=torch.bool), size, rois=box, details=details)


def test_counts_of_a_detector_by_hand():
    # Two levels: cells of 8 and 4 pixels. A dot of 2×2 pixels at (8, 8) covers the upper left quarter of the node
    # (2, 2) of level 1, which is incoherent; so is its parent (1, 1) of level 0. A dot at (102, 102) covers the lower
    # right quarter of (25, 25), and no sample of the parent (12, 12), which is incoherent by its child alone.
    truth = torch.zeros(1, 224, 224, dtype=torch.bool)
    truth[0, 8:10, 8:10] = truth[0, 102:104, 102:104] = True
    roots = [(1, 1), (5, 5), (6, 6)]  # one right, two wrong, one missed
    nodes = [(2, 2), (10, 10)]  # one right, one wrong
    root, finer = detector_counts(refined([roots, nodes]), truth)
    assert root == DetectorCounts(cells=784, judged=784, incoherent=2, found=3, hits=1, right=784 - 3)
    assert finer == DetectorCounts(cells=3136, judged=12, incoherent=2, found=2, hits=1, right=11)
    assert (root.recall, root.precision, root.accuracy) == (1 / 2, 1 / 3, 781 / 784)
    assert (finer.recall, finer.precision, finer.accuracy) == (1 / 2, 1 / 2, 11 / 12)
    assert (root + finer).cells == 784 + 3136
    assert math.isnan(DetectorCounts().recall)


def test_counts_need_quadtrees_and_fitting_masks():
    one = refined([[(1, 1)]])
    truth = torch.zeros(1, 224, 224, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match="return_quadtree=True"):
        detector_counts(replace(one, details=None), truth)
    for wrong in (truth[:0], truth.float(), truth[:, 1:]):
        with pytest.raises(InvalidInputError, match=r"expected true masks of shape \(1, 224, 224\) bool"):
            detector_counts(one, wrong)


def test_no_instances_count_nothing():
    none = refined([[(1, 1)], []])[[]]
    for counts in detector_counts(none, torch.zeros(0, 224, 224, dtype=torch.bool)):
        assert counts == DetectorCounts()
