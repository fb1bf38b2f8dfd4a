"""Behaviours of the pure functions, one by one; ``test_reference.py`` compares their numbers with a slow reference."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.config import REFERENCE_SIDE, ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.boxes import crop_windows, expand_boxes, touches_image
from transfiner_refine.functional.incoherence import (
    cover_children,
    dilate,
    double_nearest,
    incoherence_levels,
    incoherence_map,
    jitter,
)
from transfiner_refine.functional.pooling import halve, window_mean
from transfiner_refine.functional.position import sine_position
from transfiner_refine.functional.quadtree import (
    child_nodes,
    grid_nodes,
    length_groups,
    node_centres,
    propagate,
    propagate_corrections,
    rank_in_roi,
)
from transfiner_refine.functional.sampling import FeatureTable, RoIPyramid, weighted_rows
from transfiner_refine.modeling.transfiner import above_threshold
from transfiner_refine.types import FeaturePyramid, LevelNodes

Propagation = Callable[..., tuple[Tensor, Tensor]]
both_propagations = pytest.mark.parametrize("function", [propagate, propagate_corrections])


def nodes_at(cells: Tensor, side: int, logits: Tensor | None = None) -> LevelNodes:
    """Nodes without parents at cells ``(K, 3)`` of (roi, row, col)."""
    roi, row, col = cells.unbind(dim=1)
    logits = torch.zeros(len(roi)) if logits is None else logits
    return LevelNodes(roi, row, col, torch.full_like(roi, -1), logits, side)


# boxes


def test_expanded_box_keeps_its_centre():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [-4.0, 0.0, 4.0, 2.0]])
    assert expand_boxes(boxes, 0.25).tolist() == [[5.0, 10.0, 35.0, 70.0], [-6.0, -0.5, 6.0, 2.5]]
    assert expand_boxes(boxes, 0.0).equal(boxes)
    assert expand_boxes(boxes[:0], 0.25).shape == (0, 4)


def test_crop_window_is_square_and_gives_the_long_side_its_span():
    windows = crop_windows(torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 6.0, 3.0]]), span=80, side=100)
    assert windows.tolist() == [[-5.0, 15.0, 45.0, 65.0], [-0.75, -2.25, 6.75, 5.25]]


def test_boxes_that_only_meet_the_border_do_not_touch_the_image():
    boxes = torch.tensor([[0, 0, 1, 1], [-5, 2, 0, 3], [10, 0, 12, 5], [3, -2, 4, 0], [3, 8, 4, 9], [-9, -9, 99, 99]])
    assert touches_image(boxes.float(), (8, 10)).tolist() == [True, False, False, False, False, True]


# incoherence


@pytest.mark.parametrize("label", [False, True])
def test_uniform_mask_has_no_incoherent_node(label: bool):
    for level in incoherence_levels(torch.full((2, 112, 112), label), 2):
        assert not level.any()


def test_a_cell_is_incoherent_unless_its_four_children_are_alike():
    blocks = torch.arange(16)[:, None] >> torch.arange(4) & 1  # all labels of four children
    mask = blocks.bool().unflatten(1, (2, 2))
    assert incoherence_map(mask).flatten().tolist() == [False] + [True] * 14 + [False]


def test_incoherence_follows_the_nearest_chain():
    """A lone cell is lost at the finest level, but at no coarser one unless it is the one that sampling keeps."""
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 5, 7] = True  # odd row and column: the first halving drops it
    mask[1, 4, 6] = True  # kept by the first halving, at (2, 3), and dropped by the second
    maps = incoherence_levels(mask, 3)
    assert [level.sum(dim=(1, 2)).tolist() for level in maps] == [[0, 0], [0, 1], [1, 1]]
    assert maps[2][0, 2, 3] and maps[1][1, 1, 1]


def test_incoherence_of_no_rois():
    assert [tuple(level.shape) for level in incoherence_levels(torch.zeros(0, 56, 56).bool(), 1)] == [(0, 28, 28)]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 4, 4), r"expected a boolean mask, got torch\.float32: compare .* threshold"),
        (torch.zeros(1, 4, 5).bool(), r"expected an even side, got \(1, 4, 5\): resample"),
        (torch.zeros(1, 5, 4).bool(), r"expected an even side, got \(1, 5, 4\): resample"),
    ],
)
def test_incoherence_refuses_what_it_cannot_halve(mask: Tensor, message: str):
    with pytest.raises(InvalidInputError, match=message):
        incoherence_map(mask)


def test_covered_maps_are_quadtrees_and_mark_no_cell_without_need(generator: torch.Generator):
    maps = [torch.rand((2, 4 << level, 4 << level), generator=generator) < 0.05 for level in range(4)]
    before = [level.clone() for level in maps]
    covered = cover_children(maps)
    for coarse, fine in pairwise(covered):
        assert not (fine & ~double_nearest(coarse)).any()
    marked_below = [covered[level + 1].unfold(1, 2, 2).unfold(2, 2, 2).any(-1).any(-1) for level in range(3)]
    for level in range(3):
        assert covered[level].equal(maps[level] | marked_below[level])
    assert covered[3].equal(maps[3])
    assert all(a.equal(b) for a, b in zip(maps, before, strict=True))


def test_dilation_grows_a_cell_to_a_square():
    mask = torch.zeros(2, 7, 7, dtype=torch.bool)
    mask[0, 3, 3] = mask[1, 0, 6] = True
    assert dilate(mask).sum(dim=(1, 2)).tolist() == [9, 4]
    assert dilate(mask, 2)[0, 1:6, 1:6].all()
    assert dilate(mask, 0).equal(mask)
    assert dilate(mask[:0]).shape == (0, 7, 7)


def test_jitter_marks_about_half_of_the_neighbours_and_keeps_the_mask():
    mask = torch.zeros(200, 9, 9, dtype=torch.bool)
    mask[:, 4, 2:7] = True
    mask[:, 0, 0] = True
    jittered = jitter(mask, torch.Generator().manual_seed(3))
    neighbours = torch.zeros_like(mask)
    neighbours[:, 3, 2:7] = neighbours[:, 5, 2:7] = neighbours[:, 4, 1] = neighbours[:, 4, 7] = True
    neighbours[:, 0, 1] = neighbours[:, 1, 0] = True
    assert jittered[mask].all()
    assert not jittered[~mask & ~neighbours].any()
    assert 0.45 < jittered[neighbours].float().mean() < 0.55
    assert jittered.equal(jitter(mask, torch.Generator().manual_seed(3)))
    assert not jittered.equal(jitter(mask, torch.Generator().manual_seed(4)))


# quadtree


def test_children_fill_their_parents_and_point_to_them(generator: torch.Generator):
    parents = nodes_at((torch.rand((3, 8, 8), generator=generator) < 0.2).nonzero(), 8)
    roi, row, col, parent = child_nodes(parents)
    assert roi.equal(parents.roi[parent]) and (row // 2).equal(parents.row[parent])
    assert (col // 2).equal(parents.col[parent])
    assert len({*zip(roi.tolist(), row.tolist(), col.tolist(), strict=True)}) == 4 * len(parents)
    assert all(len(part) == 0 for part in child_nodes(nodes_at(torch.zeros(0, 3).long(), 8)))


def test_grid_is_in_row_major_order():
    roi, row, col = grid_nodes(2, 3)
    assert (roi * 9 + row * 3 + col).equal(torch.arange(18)) and row.max() == col.max() == 2
    assert len(grid_nodes(0, 3)[0]) == 0


def test_centres_lie_half_a_cell_inside():
    centres = node_centres(torch.tensor([0, 27]), torch.tensor([1, 27]), 28)
    torch.testing.assert_close(centres, torch.tensor([[1.5, 0.5], [27.5, 27.5]]) / 28)


def test_rank_counts_from_the_highest_score_of_each_roi():
    roi = torch.tensor([2, 0, 2, 0, 2, 5, 2])
    score = torch.tensor([0.1, 0.4, 0.9, 0.8, 0.9, 0.0, -3.0])  # the two 0.9 tie: the earlier is first
    assert rank_in_roi(roi, score).tolist() == [2, 1, 0, 0, 1, 0, 3]
    assert rank_in_roi(roi[:0], score[:0]).tolist() == []


def test_node_limit_keeps_the_most_incoherent_of_each_roi(generator: torch.Generator):
    logits = torch.randn(60, generator=generator)
    nodes = nodes_at(torch.stack([torch.arange(60) % 3, torch.arange(60), torch.arange(60)], dim=1), 64, logits)
    keep = above_threshold(0.6, max_nodes=4)(0, nodes)
    for roi in range(3):
        own = logits[roi::3]
        expected = own[own.sigmoid() > 0.6].sort(descending=True).values[:4]
        assert logits[keep & (nodes.roi == roi)].sort(descending=True).values.equal(expected)
    assert not above_threshold(1.0)(0, nodes_at(torch.zeros(1, 3).long(), 28, torch.tensor([1e9]))).any()


# propagation


@both_propagations
def test_without_nodes_the_coarse_mask_is_returned(function: Propagation, generator: torch.Generator):
    coarse = [torch.rand((2, 7, 7), generator=generator)]
    coarse += [double_nearest(coarse[0]), double_nearest(double_nearest(coarse[0]))]
    empty = [nodes_at(torch.zeros(0, 3).long(), 7 << level) for level in range(3)]
    for quadtree, values in [(empty, [torch.zeros(0)] * 3), ([], [])]:
        probs, touched = function(coarse, quadtree, values)
        assert probs.equal(coarse[-1]) and not touched.any()


@both_propagations
def test_propagation_of_no_rois(function: Propagation):
    empty = nodes_at(torch.zeros(0, 3).long(), 7)
    probs, touched = function([torch.zeros(0, 7, 7)], [empty], [torch.zeros(0)])
    assert probs.shape == touched.shape == (0, 7, 7)


def test_refined_value_reaches_all_quadrants_but_those_refined_themselves():
    coarse = [torch.zeros(1, 2, 2), torch.zeros(1, 4, 4), torch.zeros(1, 8, 8)]
    quadtree = [nodes_at(torch.tensor([[0, *cell]]), 2 << level) for level, cell in enumerate([(0, 1), (1, 2), (3, 5)])]
    probs, touched = propagate(coarse, quadtree, [torch.tensor([value]) for value in (0.25, 0.5, 0.75)])
    expected = torch.zeros(8, 8)
    expected[:4, 4:] = 0.25
    expected[2:4, 4:6] = 0.5
    expected[3, 5] = 0.75
    assert probs[0].equal(expected) and touched[0].equal(expected > 0)
    probs, touched = propagate(coarse, quadtree, [torch.tensor([value]) for value in (0.25, 0.5, 0.75)], False)
    assert probs.nonzero().tolist() == touched.nonzero().tolist() == [[0, 3, 5]]


def test_correction_of_zero_keeps_the_finer_detail_of_the_coarse_mask(generator: torch.Generator):
    coarse = [torch.randn((1, 4 << level, 4 << level), generator=generator) for level in range(3)]
    node = nodes_at(torch.tensor([[0, 1, 2]]), 4)
    empty = [nodes_at(torch.zeros(0, 3).long(), side) for side in (8, 16)]
    blank = [torch.zeros(0)] * 2
    unchanged, touched = propagate_corrections(coarse, [node, *empty], [coarse[0][0, 1, 2][None], *blank])
    assert unchanged.equal(coarse[2]) and touched.sum() == 16
    raised, _ = propagate_corrections(coarse, [node, *empty], [coarse[0][0, 1, 2][None] + 2, *blank])
    torch.testing.assert_close(raised - coarse[2], 2 * touched.float())


@both_propagations
def test_propagation_has_the_right_gradient_and_mutates_nothing(function: Propagation, generator: torch.Generator):
    sides = (2, 4, 8)
    quadtree = [nodes_at((torch.rand((2, s, s), generator=generator) < 0.3).nonzero(), s) for s in sides]
    coarse = [torch.rand((2, s, s), generator=generator, dtype=torch.float64, requires_grad=True) for s in sides]
    values = [torch.rand(len(n), generator=generator, dtype=torch.float64, requires_grad=True) for n in quadtree]
    before = [tensor.detach().clone() for tensor in coarse + values]
    for hand_down in (True, False):
        assert torch.autograd.gradcheck(
            lambda *inputs, hand_down=hand_down: function(inputs[:3], quadtree, inputs[3:], hand_down)[0],
            (*coarse, *values),
        )
    assert all(a.equal(b) for a, b in zip(coarse + values, before, strict=True))


# sampling


def small_pyramid(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> FeaturePyramid:
    shapes = [(2, 3, 8, 10), (2, 3, 4, 5)]
    return FeaturePyramid(tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes), (4, 8))


def test_sampling_has_the_right_gradient(generator: torch.Generator):
    maps = tuple(level.requires_grad_() for level in small_pyramid(generator).maps)
    xy = torch.rand((12, 2), generator=generator, dtype=torch.float64) * 44 - 2
    image, index = torch.randint(2, (2, 12), generator=generator)

    def sampled(*maps: Tensor) -> Tensor:
        return FeatureTable.of(FeaturePyramid(maps, (4, 8))).sample(xy, image, index)

    assert torch.autograd.gradcheck(sampled, maps)


def test_sampling_nothing_still_belongs_to_the_graph():
    """Distributed training waits for a gradient of every weight, even where no node was found."""
    table = torch.ones(4, 3, requires_grad=True)
    weighted_rows(table, torch.zeros(0, 4).long(), torch.zeros(0, 4)).sum().backward()
    assert table.grad is not None and table.grad.eq(0).all()


def test_sampling_in_bfloat16_keeps_positions_precise(generator: torch.Generator):
    """Around 1000 pixels, bfloat16 steps by four: only features may be rounded."""
    maps = (torch.arange(400).remainder(2).float().expand(1, 1, 2, 400),)  # steep: a cell further, zero becomes one
    rois = torch.tensor([[1003.0, 0.0, 1103.0, 8.0]])
    precise = RoIPyramid.of(FeaturePyramid(maps, (4,)), rois, torch.tensor([0])).grid(28, 0)
    rounded = RoIPyramid.of(FeaturePyramid((maps[0].bfloat16(),), (4,)), rois, torch.tensor([0])).grid(28, 0)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), precise, rtol=0, atol=2**-7)


def test_rois_without_area_or_outside_of_the_maps_are_sampled_without_harm(generator: torch.Generator):
    pyramid = small_pyramid(generator)
    rois = torch.tensor([[9.0, 9.0, 9.0, 9.0], [5.0, 3.0, 5.0, 30.0], [900.0, 900.0, 950.0, 950.0]])
    roi_pyramid = RoIPyramid.of(pyramid, rois, torch.tensor([0, 1, 1]))
    assert roi_pyramid.map_index(1)[:2].tolist() == [0, 0]  # the finest
    grid = roi_pyramid.grid(4, 1)
    assert grid.isfinite().all() and grid[2].eq(0).all()
    assert grid[0].eq(grid[0, :, :1, :1]).all() and grid[0].ne(0).all()
    assert RoIPyramid.of(pyramid, rois[:0], torch.zeros(0).long()).grid(4, 0).shape == (0, 3, 4, 4)


def test_sampling_mutates_nothing(generator: torch.Generator):
    pyramid, rois = small_pyramid(generator), torch.tensor([[-3.0, 4.0, 60.0, 20.0]])
    before = [tensor.clone() for tensor in (*pyramid.maps, rois)]
    roi_pyramid = RoIPyramid.of(pyramid, rois, torch.tensor([1]))
    roi_pyramid.sample_context(torch.tensor([0]), torch.tensor([[0.1, 0.9]]), 28, 1)
    assert all(a.equal(b) for a, b in zip((*pyramid.maps, rois), before, strict=True))


def test_positions_tell_neighbours_of_the_finest_level_apart():
    code = sine_position(node_centres(torch.zeros(113).long(), torch.arange(113), 112), 64)
    assert (code[1:] - code[:-1]).abs().amax(dim=1).min() > 1
    assert code.abs().max() <= 1 and code[:, :32].eq(code[:1, :32]).all()  # the first half is y alone
    assert sine_position(torch.zeros(0, 2), 64).shape == (0, 64)


# groups of sequences


@pytest.mark.parametrize("budget", [1, 700, 2000, 1 << 30])
def test_groups_hold_every_roi_with_nodes_once_within_the_budget(budget: int):
    counts = torch.tensor([40, 0, 3, 500, 0, 77, 41, 1])
    roi = torch.arange(8).repeat_interleave(counts)
    quadtree = [nodes_at(torch.stack([part, part, part], dim=1), ROOT_SIDE) for part in (roi[::2], roi[1::2])]
    groups = list(length_groups(quadtree, 8, budget))
    assert sorted(torch.cat(groups).tolist()) == [0, 2, 3, 5, 6, 7]
    for group in groups:
        padded = int(counts[group].max() + REFERENCE_SIDE**2) * len(group)
        assert padded <= budget or len(group) == 1
    assert len(groups) == {1: 6, 700: 4, 2000: 2, 1 << 30: 2}[budget]  # six of 696 would be a large batch


@pytest.mark.parametrize(("scale", "expected"), [(1, [[0, 1, 2, 3, 4]]), (4, [[0, 1], [2, 3, 4]])])
def test_large_groups_hold_sequences_of_one_length(scale: int, expected: list[list[int]]):
    """Without this, attention would pay for padding by its square; small groups are not worth it."""
    lengths = torch.tensor([400, 390, 100, 100, 95]) * scale - REFERENCE_SIDE**2 * (scale > 1)
    roi = torch.arange(5).repeat_interleave(lengths)
    nodes = nodes_at(torch.stack([roi, roi, roi], dim=1), ROOT_SIDE)
    assert [group.tolist() for group in length_groups([nodes], 5, 1 << 30)] == expected


def test_no_groups_without_nodes():
    assert list(length_groups([nodes_at(torch.zeros(0, 3).long(), 28)], 4, 1000)) == []
    assert list(length_groups([], 4, 1000)) == []


def test_means_over_pixels_are_those_of_pooling(generator: torch.Generator):
    maps = torch.rand(2, 3, 14, 22, generator=generator)
    torch.testing.assert_close(halve(maps), F.avg_pool2d(maps, 2))
    for window in (1, 3, 7):
        pooled = F.avg_pool2d(maps, window, 1, window // 2, count_include_pad=False)
        torch.testing.assert_close(window_mean(maps, window), pooled)
