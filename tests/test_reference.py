"""The vectorised pipeline against loops written from the paper's text (``reference.py``), step by step.

Feature maps, weights and masks are float64 on both sides. The package holds positions inside of a RoI, logits and
probabilities in float32 whatever the model's dtype: what is sampled at a position agrees to ``SAMPLED``; what went
through the sine code, whose highest frequency turns 64 times across a RoI, and through the attention that follows, to
``ENCODED``. Steps that are float64 throughout agree to ``EXACT``. The way between image and RoI: ``test_paste.py``.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from torchvision.ops import roi_align

from transfiner_refine.config import MAX_DEPTH, REFERENCE_SIDE, ROOT_SIDE, TransfinerConfig
from transfiner_refine.functional import incoherence, quadtree, sampling
from transfiner_refine.functional.coarse import coarse_levels, coarse_logits
from transfiner_refine.functional.position import sine_position
from transfiner_refine.modeling.transfiner import MaskTransfiner, TransfinerOutput, above_threshold
from transfiner_refine.types import FeaturePyramid, LevelNodes

EXACT, FLOAT32, SAMPLED, ENCODED = 1e-10, 1e-6, 1e-4, 5e-4

STRIDES = (4, 8, 16, 32)
ROIS = torch.tensor(
    [
        [20.3, 30.7, 180.2, 201.9],  # plain
        [-40.5, 100.25, 90.0, 300.75],  # across the left and the lower border
        [5.0, 5.0, 29.5, 21.0],  # small: its finer levels want maps that do not exist
        [-300.0, -200.0, 700.0, 900.0],  # huge: most of it is outside, its root wants P6
        [200.0, 40.0, 203.0, 250.0],  # a sliver
    ]
)
IMAGE = torch.tensor([0, 1, 1, 0, 1])
ALL_CUES = ("fine", "coarse", "context", "position", "guidance")


def agree(actual: Tensor, expected: object, tolerance: float) -> None:
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance)


def cells_of(nodes: LevelNodes) -> list[reference.Cell]:
    return list(zip(nodes.roi.tolist(), nodes.row.tolist(), nodes.col.tolist(), strict=True))


def in_order(values: dict[reference.Cell, float], nodes: LevelNodes) -> list[float]:
    """The reference's values in the package's order, once both have the same cells."""
    cells = cells_of(nodes)
    assert len(cells) == len(set(cells)) and set(cells) == set(values)
    return [values[cell] for cell in cells]


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def random_maps(generator: torch.Generator, channels: int = 5) -> tuple[Tensor, ...]:
    """Feature maps of two images of 256×320 pixels."""
    return tuple(uniform(generator, 2, channels, 256 // s, 320 // s) * 4 - 2 for s in STRIDES)


def random_coarse(generator: torch.Generator, rois: int, side: int) -> Tensor:
    """Soft discs with noise, ``(rois, side, side)`` in [0, 1], flat inside and outside."""
    y, x = torch.meshgrid(*[(torch.arange(side, dtype=torch.float64) + 0.5) / side] * 2, indexing="ij")
    centre = uniform(generator, 2, rois, 1, 1) * 0.4 + 0.3
    distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2).sqrt()
    return ((0.3 - distance + 0.05 * uniform(generator, rois, side, side)) * 8 + 0.5).clamp(0, 1)


def random_model(generator: torch.Generator, **changes) -> MaskTransfiner:
    """A small float64 model, every weight random: norms, biases and the decoder that starts at zero too."""
    small = {"feature_channels": 5, "channels": 8, "layers": 2, "heads": 2, "ffn_channels": 12}
    model = MaskTransfiner(TransfinerConfig(**{**small, **changes})).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 3 / weight[0].numel() ** 0.5 if weight.dim() > 1 else 0.5
            weight.copy_((uniform(generator, *weight.shape) - 0.5) * 2 * spread + ("norm" in name and "weight" in name))
    return model


def network_of(model: MaskTransfiner) -> reference.Network:
    return reference.Network({name: tensor.numpy() for name, tensor in model.state_dict().items()}, model.config)


def scene_of(maps: tuple[Tensor, ...]) -> reference.Scene:
    return reference.Scene([level.numpy() for level in maps], STRIDES, ROIS.double().numpy(), IMAGE.tolist())


def gap_near(logits: Tensor, share: float) -> Tensor:
    """A value with about this share of logits below it, and none so close that rounding could take it across."""
    near = logits.sort().values[int((share - 0.02) * len(logits)) : int((share + 0.02) * len(logits)) + 2]
    widest = near.diff().argmax()
    return near[widest : widest + 2].mean()


@dataclass
class Run:
    """One random problem, and what the package and the reference made of it."""

    model: MaskTransfiner
    roi_pyramid: sampling.RoIPyramid
    coarse: Tensor
    output: TransfinerOutput
    expected: reference.Refined


@cache
def run(seed: int = 0, depth: int = 3, **changes) -> Run:
    generator = torch.Generator().manual_seed(seed)
    model = random_model(generator, **{"depth": depth, **changes})
    maps = random_maps(generator)
    coarse = random_coarse(generator, len(ROIS), ROOT_SIDE << max(depth - 1, 0))
    with torch.no_grad():
        roi_pyramid = model.roi_pyramid(FeaturePyramid(maps, STRIDES), ROIS, IMAGE)
        # Random weights find all cells incoherent or none: shift the logits to find 2 % of the root cells and about
        # half of the children.
        detector = model.incoherence_detector
        for level, classifier in enumerate([detector.classifier, *detector.finer_classifier][:depth]):
            found = detector(roi_pyramid, coarse_levels(coarse, depth), level + 1, above_threshold(0.5))
            classifier.bias -= gap_near(found.candidates[level].logits, 0.5 if level else 0.98)
        output = model(roi_pyramid, coarse, depth, above_threshold(0.5))
    expected = reference.refine(scene_of(maps), network_of(model), coarse.numpy(), depth)
    return Run(model, roi_pyramid, coarse, output, expected)


RUNS = {
    "paper": {},
    "paper, other numbers": {"seed": 1},
    "residual": {"seed": 2, "decoder": "residual"},
    "level by level": {"seed": 3, "joint_levels": False},
    "keys of trees": {"seed": 9, "tree_keys": True},
    "keys of trees, level by level": {"seed": 10, "tree_keys": True, "joint_levels": False},
    "no propagation": {"seed": 4, "propagate": False},
    "residual, no propagation": {"seed": 5, "decoder": "residual", "propagate": False},
    "no guidance between levels": {"seed": 6, "lower_level_guidance": False},
    "every cue": {"seed": 7, "node_cues": ALL_CUES, "level_embedding": True, "heads": 4},
    "one cue": {"seed": 8, "node_cues": ("coarse",)},
    "depth 0": {"seed": 9, "depth": 0},
    "depth 1": {"seed": 10, "depth": 1},
    "depth 2": {"seed": 11, "depth": 2, "decoder": "residual"},
    "depth 4": {"seed": 12, "depth": 4},
}
every_run = pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())


# The whole method


@every_run
def test_same_cells_are_judged_and_found_incoherent(changes: dict):
    both = run(**changes)
    found, expected = both.output.detection, both.expected.found
    depth = changes.get("depth", 3)
    assert len(found.quadtree) == len(found.candidates) == depth
    agree(found.guidance, np.stack(expected.root_features), SAMPLED)
    for level, (nodes, candidates) in enumerate(zip(found.quadtree, found.candidates, strict=True)):
        assert nodes.side == candidates.side == ROOT_SIDE << level
        agree(candidates.logits, in_order(expected.candidates[level], candidates), SAMPLED)
        assert 0 < len(nodes) < len(candidates)
        assert set(cells_of(nodes)) == set(expected.nodes[level])


@every_run
def test_parent_links_lead_to_the_cell_above(changes: dict):
    levels = run(**changes).output.detection.quadtree
    assert not levels or levels[0].parent.eq(-1).all()
    for parents, nodes in pairwise(levels):
        above = cells_of(parents)
        for (roi, row, col), parent in zip(cells_of(nodes), nodes.parent.tolist(), strict=True):
            assert above[parent] == (roi, row // 2, col // 2)


@every_run
def test_same_refined_probability_at_every_node(changes: dict):
    both = run(**changes)
    quadtree = both.output.detection.quadtree
    for nodes, probs, logits in zip(quadtree, both.output.node_probs, both.expected.logits, strict=True):
        agree(probs, [reference.sigmoid(logit) for logit in in_order(logits, nodes)], ENCODED)


@every_run
def test_same_refined_masks(changes: dict):
    both = run(**changes)
    agree(both.output.probs, both.expected.probs, ENCODED)
    agree(both.output.touched, both.expected.touched, EXACT)
    assert both.output.touched.any() == (changes.get("depth", 3) > 0)


@pytest.mark.parametrize("decoder", ["label", "residual"])
def test_without_incoherent_nodes_the_coarse_masks_are_returned(generator: torch.Generator, decoder: str):
    model, coarse = random_model(generator, decoder=decoder), random_coarse(generator, len(ROIS), 4 * ROOT_SIDE)
    roi_pyramid = model.roi_pyramid(FeaturePyramid(random_maps(generator), STRIDES), ROIS, IMAGE)
    output = model(roi_pyramid, coarse, 3, above_threshold(1.0))
    assert output.probs.equal(coarse) and not output.touched.any()


def test_small_token_budget_changes_nothing():
    both = run()
    with torch.no_grad():
        output = both.model(both.roi_pyramid, both.coarse, 3, above_threshold(0.5), token_budget=1)
    agree(output.probs, both.output.probs, FLOAT32)


def test_shallower_call_of_a_deeper_model_is_the_model_cut_short():
    deep = run(seed=12, depth=4)
    coarse = coarse_levels(deep.coarse, 4)[1]
    with torch.no_grad():
        output = deep.model(deep.roi_pyramid, coarse, 2, above_threshold(0.5))
    for level in range(2):
        agree(output.detection.quadtree[level].logits, deep.output.detection.quadtree[level].logits, FLOAT32)
    assert output.probs.shape == (len(ROIS), 2 * ROOT_SIDE, 2 * ROOT_SIDE)


# Sec. 3.1: incoherence


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("depth", range(MAX_DEPTH + 1))
def test_incoherence_of_all_levels(seed: int, depth: int):
    generator = torch.Generator().manual_seed(seed)
    masks = random_coarse(generator, 3, 7 << depth) + 0.2 * uniform(generator, 3, 7 << depth, 7 << depth) > 0.6
    maps = incoherence.incoherence_levels(masks, depth)
    covered = incoherence.cover_children(maps)
    for index, mask in enumerate(masks.numpy()):
        expected = reference.incoherence_levels(mask, depth)
        assert len(maps) == len(expected) == depth
        for level, expected_covered in enumerate(reference.cover(expected)):
            assert (maps[level][index].numpy() == expected[level]).all()
            assert (covered[level][index].numpy() == expected_covered).all()


# Sec. 3.4: RoI pyramid


def test_roi_levels(generator: torch.Generator):
    size = 2 ** (uniform(generator, 500, 2) * 14 - 2)
    corner = (uniform(generator, 500, 2) - 0.5) * 1000
    at_steps = torch.tensor([[0, 0, w, h] for w, h in [(224, 224), (112, 448), (56, 56), (896, 896), (223.9, 224)]])
    boxes = torch.cat([torch.cat([corner, corner + size], dim=1), at_steps])
    for k0 in (4, 5):
        expected = [reference.roi_level(box, k0) for box in boxes.numpy()]
        assert sampling.assign_levels(boxes, k0).tolist() == expected
    assert expected[500:] == [5, 5, 3, 7, 4]


@pytest.mark.parametrize("canonical_level", [4, 5])
def test_maps_that_serve_each_level(generator: torch.Generator, canonical_level: int):
    pyramid = FeaturePyramid(random_maps(generator), STRIDES)
    roi_pyramid = sampling.RoIPyramid.of(pyramid, ROIS, IMAGE, canonical_level)
    scene = scene_of(pyramid.maps)
    scene.canonical_level = canonical_level
    for level in range(MAX_DEPTH):
        expected = [reference.serving_map(scene, roi, level) for roi in range(len(ROIS))]
        assert roi_pyramid.map_index(level).tolist() == expected


def test_bilinear_sampling_up_to_and_beyond_the_border(generator: torch.Generator):
    maps = random_maps(generator)
    table = sampling.FeatureTable.of(FeaturePyramid(maps, STRIDES))
    # Half a cell outside of the map's edge, the border's value ends, on either side.
    special = torch.tensor([-32.0, -16, -2, 0, 2, 16, 128, 240, 254, 256, 258, 272, 304, 318, 320, 322, 336, 400])
    xy = torch.cat([uniform(generator, 300, 2) * 500 - 100, torch.cartesian_prod(special, special).double()])
    image, index = (torch.randint(high, (len(xy),), generator=generator) for high in (2, 4))
    expected = [
        reference.bilinear(maps[k][b].numpy(), x / STRIDES[k] - 0.5, y / STRIDES[k] - 0.5)
        for (x, y), b, k in zip(xy.tolist(), image.tolist(), index.tolist(), strict=True)
    ]
    agree(table.sample(xy, image, index), expected, EXACT)


def test_sampling_of_rois_and_their_context(generator: torch.Generator):
    maps = random_maps(generator)
    scene, roi_pyramid = scene_of(maps), sampling.RoIPyramid.of(FeaturePyramid(maps, STRIDES), ROIS, IMAGE)
    for level in range(MAX_DEPTH):
        side = ROOT_SIDE << level
        roi = torch.randint(len(ROIS), (40,), generator=generator)
        row, col = torch.randint(side, (2, 40), generator=generator)
        row[:8], col[4:12] = side - 1, 0  # cells of the rim, whose neighbours lie outside of the RoI
        centres = quadtree.node_centres(row, col, side)
        cells = list(zip(roi.tolist(), row.tolist(), col.tolist(), strict=True))

        def at(r: int, i: int, j: int, side: int = side, level: int = level) -> np.ndarray:
            return reference.feature(scene, r, *reference.centre(i, j, side), level)

        agree(roi_pyramid.sample(roi, centres, level), [at(*cell) for cell in cells], SAMPLED)
        around = [[at(r, i + down, j + right) for down, right in reference.OFFSETS] for r, i, j in cells]
        agree(roi_pyramid.sample_context(roi, centres, side, level), around, SAMPLED)


@pytest.mark.parametrize("level", range(MAX_DEPTH))
def test_sampling_is_roi_align_with_one_sample_per_bin(generator: torch.Generator, level: int):
    maps, side = random_maps(generator), ROOT_SIDE << level
    roi_pyramid = sampling.RoIPyramid.of(FeaturePyramid(maps, STRIDES), ROIS, IMAGE)
    grid = roi_pyramid.grid(side, level)
    assert sampling.RoIPyramid.of(roi_pyramid.table, ROIS, IMAGE).grid(side, level).equal(grid)  # flattened before
    rois = torch.cat([IMAGE[:, None], ROIS], dim=1).double()
    for roi, index in enumerate(roi_pyramid.map_index(level).tolist()):
        expected = roi_align(maps[index], rois[roi : roi + 1], side, 1 / STRIDES[index], sampling_ratio=1, aligned=True)
        agree(grid[roi : roi + 1], expected, SAMPLED)


# Sec. 3.3: node encoder, sequence encoder, pixel decoder


def test_sine_positions(generator: torch.Generator):
    xy = uniform(generator, 50, 2).float()
    for channels in (8, 20, 256):
        expected = [reference.position(x, y, channels) for x, y in xy.tolist()]
        agree(sine_position(xy, channels), expected, SAMPLED)


CUES = [(cue,) for cue in ALL_CUES if cue != "position"] + [("fine", "coarse", "context", "position"), ALL_CUES]


@pytest.mark.parametrize("cues", CUES, ids="+".join)
@pytest.mark.parametrize("level_embedding", [False, True])
def test_node_tokens(generator: torch.Generator, cues: tuple[str, ...], level_embedding: bool):
    model = random_model(generator, node_cues=cues, level_embedding=level_embedding)
    maps, guidance = random_maps(generator), uniform(generator, len(ROIS), 8, ROOT_SIDE, ROOT_SIDE)
    roi_pyramid = model.roi_pyramid(FeaturePyramid(maps, STRIDES), ROIS, IMAGE)
    scene, network = scene_of(maps), network_of(model)
    found = reference.Detected(root_features=list(guidance.numpy()))
    for level, side in [(-1, REFERENCE_SIDE)] + [(level, ROOT_SIDE << level) for level in range(3)]:
        roi, coarse = torch.randint(len(ROIS), (15,), generator=generator), uniform(generator, 15)
        row, col = torch.randint(side, (2, 15), generator=generator)
        centres = quadtree.node_centres(row, col, side)
        tokens = model.node_encoder(roi_pyramid, guidance, coarse, roi, centres, side, level)
        expected = [
            reference.token(scene, network, found, value, (r, i, j), side, level)
            for value, r, i, j in zip(coarse.tolist(), roi.tolist(), row.tolist(), col.tolist(), strict=True)
        ]
        agree(tokens, expected, SAMPLED)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("share", [False, True])
def test_encoded_sequences_of_unequal_length(generator: torch.Generator, heads: int, share: bool):
    model = random_model(generator, heads=heads)
    sequence = torch.arange(4).repeat_interleave(torch.tensor([1, 30, 7, 18]))
    sequence = sequence[torch.randperm(len(sequence), generator=generator)]
    tokens = uniform(generator, len(sequence), 8) * 4 - 2
    key = torch.randint(9, sequence.shape, generator=generator) if share else None
    encoded = model.sequence_encoder(tokens, sequence, 4, key)
    for index in range(4):
        members = sequence == index
        together = None if key is None else key[members].tolist()
        agree(encoded[members], reference.encode(network_of(model), list(tokens[members].numpy()), together), EXACT)


@pytest.mark.parametrize("decoder", ["label", "residual"])
def test_decoded_logits(generator: torch.Generator, decoder: str):
    model = random_model(generator, decoder=decoder)
    tokens = uniform(generator, 20, 8) * 4 - 2
    coarse = torch.cat([torch.tensor([0.0, 1.0, 0.5, 1e-9, 1 - 1e-9]).double(), uniform(generator, 15)])
    pairs = zip(tokens.numpy(), coarse.tolist(), strict=True)
    expected = [reference.decode(network_of(model), token, value) for token, value in pairs]
    agree(model.pixel_decoder(tokens, coarse), expected, FLOAT32)


def test_coarse_masks_of_all_levels(generator: torch.Generator):
    for depth in range(1, MAX_DEPTH + 1):
        finest = random_coarse(generator, 2, ROOT_SIDE << (depth - 1))
        levels = coarse_levels(finest, depth)
        expected = reference.coarse_levels(finest.numpy(), depth)
        assert len(levels) == depth
        for level in range(depth):
            agree(levels[level], expected[level], EXACT)
            agree(coarse_logits(levels[level]), np.vectorize(reference.coarse_logit)(expected[level]), FLOAT32)


# Sec. 3.2: propagation


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("depth", range(MAX_DEPTH + 1))
@pytest.mark.parametrize("hand_down", [True, False])
def test_propagation(seed: int, depth: int, hand_down: bool):
    """Nodes at random cells, with and without a parent that is one: children of nodes need not be nodes."""
    generator = torch.Generator().manual_seed(seed)
    sides = [6 << level for level in range(max(depth, 1))]
    coarse = [uniform(generator, 2, side, side) for side in sides]
    nodes, values, refined = [], [], []
    for level in range(depth):
        cells = (uniform(generator, 2, sides[level], sides[level]) < 0.15).nonzero()
        blank = torch.zeros(len(cells))
        nodes.append(LevelNodes(*cells.unbind(dim=1), parent=blank.long(), logits=blank, side=sides[level]))
        values.append(uniform(generator, len(cells)))
        refined.append(dict(zip(cells_of(nodes[-1]), values[-1].tolist(), strict=True)))
    as_arrays = [level.numpy() for level in coarse]
    for function, corrections in [(quadtree.propagate, False), (quadtree.propagate_corrections, True)]:
        probs, touched = function(coarse, nodes, values, hand_down)
        expected, expected_touched = reference.propagate(as_arrays, refined, hand_down, corrections)
        agree(probs, expected, EXACT)
        agree(touched, expected_touched, EXACT)
