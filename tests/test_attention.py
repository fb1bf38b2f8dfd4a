"""Attention of a node: the weights are those that the layer itself used, and the picture shows them where they lie."""

import numpy as np
import pytest
import torch
from small_models import discs, encoder_config, eventful_model, random_image

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.attention import NodeAttention, NodePlace, draw_attention, nearest_node, node_attention
from transfiner_refine.canvas import INK, PAPER
from transfiner_refine.config import REFERENCE_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.types import LevelNodes
from transfiner_refine.visualize import node_boxes

SIDE = 128
OPTIONS = RefineOptions(keep_if_iou_below=0.0, keep_if_gain_below=-1.0)


def refiner_of(**changes) -> Refiner:
    return Refiner(eventful_model(encoder_config(**changes)))


@pytest.fixture(scope="module")
def refiner() -> Refiner:
    return refiner_of(heads=1)


@pytest.fixture(scope="module")
def scene() -> dict:
    """A photo, and a disc on it."""
    return {
        "image": random_image(SIDE, SIDE),
        "mask": discs(SIDE, SIDE, [(64.0, 64.0, 40.0)])[0],
        "box": torch.tensor([24.0, 24.0, 104.0, 104.0]),
    }


@pytest.mark.parametrize("tree_keys", [True, False])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("layer", [0, -1])
def test_weights_are_those_of_the_layer(scene: dict, tree_keys: bool, joint: bool, layer: int):
    """With one head, what the layer handed on for the node is the mean of the values under just these weights."""
    refiner = refiner_of(heads=1, joint_levels=joint, tree_keys=tree_keys)
    watched = refiner.model.transfiner.sequence_encoder.layers[layer]
    values, handed_on = [], []
    qkv = watched.get_submodule("qkv")

    def keep_values(module: torch.nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        values.append(torch.nn.functional.linear(out[0], qkv.weight, qkv.bias).chunk(3, 1)[2])  # pyright: ignore

    watched.get_submodule("norm_attention").register_forward_hook(keep_values)
    watched.get_submodule("project").register_forward_hook(lambda module, given, out: handed_on.append(given[0][0]))
    found = node_attention(refiner, **scene, point=(90.0, 70.0), layer=layer, options=OPTIONS)
    place = found.place
    call = 0 if joint else [level for level, nodes in enumerate(found.quadtree) if len(nodes)].index(place.level)
    levels = range(len(found.quadtree)) if joint else [place.level]
    weights = torch.cat([found.reference.flatten(), *(found.nodes[level] for level in levels)])
    before = sum(len(found.quadtree[level]) for level in levels if level < place.level)
    row = REFERENCE_SIDE**2 + before + place.index
    # Each call of the layer is seen twice: it makes its queries and keys once more for the weights.
    torch.testing.assert_close(weights @ values[2 * call], handed_on[call][row], rtol=1e-4, atol=1e-5)
    assert [len(part) for part in found.nodes] == [len(nodes) for nodes in found.quadtree]


def test_weights_of_several_heads_sum_to_one(scene: dict):
    found = node_attention(refiner_of(heads=2), **scene, point=(30.0, 64.0), options=OPTIONS)
    total = found.reference.sum() + sum(part.sum() for part in found.nodes)
    assert float(total) == pytest.approx(1, abs=1e-5)
    assert found.layer == 1 and found.reference.shape == (REFERENCE_SIDE, REFERENCE_SIDE)


def test_model_is_left_as_it_was(refiner: Refiner, scene: dict):
    layer = refiner.model.transfiner.sequence_encoder.layers[-1]
    node_attention(refiner, **scene, point=(64.0, 64.0), options=OPTIONS)
    assert not layer.get_submodule("qkv")._forward_hooks


def test_each_node_is_nearest_to_its_own_centre(refiner: Refiner, scene: dict):
    masks, boxes = scene["mask"][None].repeat(2, 1, 1), torch.stack([scene["box"], scene["box"] - 16])
    options = RefineOptions(return_quadtree=True)
    refined = refiner.refine(scene["image"], boxes=boxes, masks=masks, options=options)
    assert refined.details is not None and refined.rois is not None
    for level, nodes in enumerate(refined.details.quadtree):
        cells = node_boxes(nodes, refined.rois.double().numpy())
        for index in range(0, len(nodes), 17):
            centre = (cells[index, :2] + cells[index, 2:]) / 2
            place = nearest_node(refined, (centre[0], centre[1]))
            assert (place.instance, place.level, place.index) == (int(nodes.roi[index]), level, index)


def test_what_cannot_be_looked_at_is_refused(refiner: Refiner, scene: dict):
    with pytest.raises(InvalidInputError, match="layer from 0 to 1"):
        node_attention(refiner, **scene, point=(0.0, 0.0), layer=2)
    with pytest.raises(InvalidInputError, match="incoherent nodes, got none"):
        node_attention(refiner, **scene, point=(0.0, 0.0), options=RefineOptions(incoherence_threshold=1.0))
    plain = refiner.refine(scene["image"], boxes=scene["box"][None], masks=scene["mask"][None])
    with pytest.raises(InvalidInputError, match="return_quadtree"):
        nearest_node(plain, (0.0, 0.0))


def test_picture_is_bright_where_the_weights_are():
    """Three cells of 28 × 28 in a RoI of 56 pixels: the first has nearly all of the weight, the third is the node."""
    row, col = torch.tensor([4, 4, 20]), torch.tensor([4, 20, 10])
    zero = torch.zeros(3, dtype=torch.long)
    nodes = LevelNodes(zero, row, col, zero - 1, torch.zeros(3), 28)
    weights = torch.tensor([0.98, 0.01, 0.01])
    roi = torch.tensor([10.0, 10.0, 66.0, 66.0])
    found = NodeAttention(NodePlace(0, 0, 2), 0, torch.zeros(14, 14), (weights,), (nodes,), roi)
    image = np.full((80, 80, 3), 128, np.uint8)
    picture = draw_attention(image, found, scale=4)
    assert picture.shape == (320, 320, 3) and (image == 128).all()

    def at(x: float, y: float) -> np.ndarray:
        """Colour at a point of the photo."""
        return picture[int(4 * y), int(4 * x)].astype(int)

    high, low, none = at(19, 19), at(51, 19), at(5, 5)
    assert high[0] > low[0] + 60, "cividis goes from blue to yellow, with ever more red"
    assert (low != none).any() and (at(40, 40) == none).all(), "cells without weight show the photo"
    ring = picture[204 - 8 : 204 + 8, 124 - 8 : 124 + 8].reshape(-1, 3)  # row 20, column 10: (31, 51) in the photo
    assert (ring == PAPER).all(axis=1).any() and (ring == INK).all(axis=1).any()
