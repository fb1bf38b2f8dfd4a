"""The typed values: what they accept, what they refuse, and that selecting and moving keep everything together."""

import json
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle
from transfiner_refine.types import FeaturePyramid, Instances, LevelNodes, RefineDetails

H, W = 20, 30


def some_instances(**changes: Any) -> Instances:
    masks = torch.zeros(3, H, W, dtype=torch.bool)
    masks[0, 2:10, 3:9] = True
    masks[1, 5:18, 10:28] = True
    values: dict[str, Any] = {
        "boxes": torch.tensor([[3.0, 2, 9, 10], [10, 5, 28, 18], [0, 0, 5.5, 4]]),
        "masks": masks,
        "image_size": (H, W),
        "scores": torch.tensor([0.5, 0.25, 1.0]),
        "labels": torch.tensor([7, 0, 90]),
        "probs": torch.rand(3, 8, 8),
        "rois": torch.tensor([[2.0, 1, 10, 11], [9, 4, 29, 19], [0, 0, 6, 5]]),
        "kept_coarse": torch.tensor([False, True, False]),
    }
    return Instances(**values | changes)


def some_details() -> RefineDetails:
    """Three RoIs with nodes in no particular order; the second has none at level 1, and ``logits`` number the nodes."""
    level_0 = LevelNodes(
        roi=torch.tensor([2, 0, 1, 0, 2]),
        row=torch.arange(5),
        col=torch.arange(5) + 10,
        parent=torch.full((5,), -1),
        logits=torch.arange(5.0),
        side=28,
    )
    level_1 = LevelNodes(
        roi=torch.tensor([0, 2, 0, 2, 0]),
        row=torch.arange(5),
        col=torch.arange(5) + 20,
        parent=torch.tensor([3, 0, 1, 4, 3]),
        logits=torch.arange(5.0) + 100,
        side=56,
    )
    return RefineDetails(
        torch.rand(3, 28, 28), (level_0, level_1), torch.rand(3, 56, 56), (torch.rand(5), torch.rand(5))
    )


class TestInstances:
    def test_arrays_and_tensors_are_the_same(self):
        tensors = some_instances()
        arrays = Instances(
            boxes=np.asarray(tensors.boxes).astype(np.float64),  # pyright: ignore[reportArgumentType]
            masks=np.asarray(tensors.masks),  # pyright: ignore[reportArgumentType]
            image_size=(H, W),
            scores=[0.5, 0.25, 1.0],  # pyright: ignore[reportArgumentType]
            labels=np.array([7, 0, 90], np.int32),  # pyright: ignore[reportArgumentType]
        )
        for name, dtype in [("boxes", torch.float32), ("scores", torch.float32), ("labels", torch.int64)]:
            value = getattr(arrays, name)
            assert value.dtype == dtype and torch.equal(value, getattr(tensors, name))
        assert torch.equal(arrays.masks, tensors.masks)

    @pytest.mark.parametrize("scale", [1, 255])
    @pytest.mark.parametrize("dtype", [np.uint8, np.int64])
    def test_integer_masks_become_bool(self, dtype, scale):
        plain = some_instances()
        masks = np.asarray(plain.masks).astype(dtype) * dtype(scale)
        assert masks.dtype == dtype and masks.max() == scale
        assert torch.equal(some_instances(masks=masks).masks, plain.masks)

    def test_probabilities_stay_float32(self):
        masks = np.full((3, H, W), 0.25)
        held = some_instances(masks=masks).masks
        assert held.dtype == torch.float32 and bool((held == 0.25).all())

    def test_masks_convert_to_numpy(self):
        array = np.asarray(some_instances().masks)
        assert array.dtype == bool and array.shape == (3, H, W) and array[0].sum() == 48

    def test_read_only_and_mirrored_arrays_are_accepted_and_not_written(self):
        masks = np.asarray(some_instances().masks).copy()
        masks.flags.writeable = False
        mirrored = masks[:, :, ::-1]
        assert np.array_equal(np.asarray(some_instances(masks=mirrored).masks), mirrored)

    def test_no_instances(self):
        for masks in (np.zeros((0, H, W), bool), []):
            empty = Instances(boxes=[], masks=masks, image_size=(H, W), scores=[], labels=[])  # pyright: ignore
            assert len(empty) == 0 and empty.boxes.shape == (0, 4) and empty.masks.shape == (0, H, W)
            assert empty.labels is not None and empty.labels.dtype == torch.int64
            assert empty.to_coco(1) == [] and empty.to_rle() == [] and list(empty) == []
            assert len(empty[[]]) == 0 and len(empty[:]) == 0

    @pytest.mark.parametrize(
        "item, rows",
        [
            (1, [1]),
            (-1, [2]),
            (np.int64(0), [0]),
            (slice(None, None, -1), [2, 1, 0]),
            (slice(1, 9), [1, 2]),
            ([2, 0, 2], [2, 0, 2]),
            ([-1], [2]),
            ([], []),
            ([True, False, True], [0, 2]),
            (torch.tensor([False, True, True]), [1, 2]),
            (torch.tensor([1]), [1]),
            (np.array([2, 1]), [2, 1]),
        ],
    )
    def test_indexing_selects_every_field(self, item, rows):
        whole, details = some_instances(), some_details()
        chosen = replace(whole, details=details)[item]
        assert len(chosen) == len(rows) and chosen.image_size == (H, W)
        for name in ("boxes", "masks", "scores", "labels", "probs", "rois", "kept_coarse"):
            assert torch.equal(getattr(chosen, name), getattr(whole, name)[rows])
        assert chosen.details is not None and torch.equal(chosen.details.incoherence, details.incoherence[rows])

    def test_iteration_gives_each_instance(self):
        whole = some_instances()
        assert [one.boxes.tolist() for one in whole] == [[box] for box in whole.boxes.tolist()]

    def test_index_out_of_range(self):
        for item in (3, -4, [3]):
            with pytest.raises(IndexError):
                some_instances()[item]
        with pytest.raises(InvalidInputError, match="expected 3 booleans as index, got 2"):
            some_instances()[[True, False]]

    def test_to_moves_every_tensor(self):
        moved = replace(some_instances(), details=some_details()).to("meta")
        assert moved.details is not None
        parts: list[Any] = [getattr(moved, name) for name in ("boxes", "masks", "scores", "labels", "probs", "rois")]
        parts += [moved.kept_coarse, moved.details.incoherence, moved.details.coarse_probs, *moved.details.node_probs]
        parts += [getattr(level, name) for level in moved.details.quadtree for name in ("roi", "parent", "logits")]
        assert all(isinstance(part, Tensor) and part.device.type == "meta" for part in parts)

    def test_to_coco_is_plain_json_that_decodes_to_the_masks(self):
        instances = some_instances()
        results = instances.to_coco(42)
        assert json.loads(json.dumps(results)) == results
        assert [result["bbox"] for result in results] == [[3, 2, 6, 8], [10, 5, 18, 13], [0, 0, 5.5, 4]]
        assert [result["category_id"] for result in results] == [7, 0, 90]
        assert [result["score"] for result in results] == [0.5, 0.25, 1.0]
        assert {result["image_id"] for result in results} == {42}
        decoded = rle.decode_batch([result["segmentation"] for result in results], (H, W))
        assert np.array_equal(decoded, np.asarray(instances.masks))

    def test_to_coco_without_labels_and_scores(self):
        result = some_instances(labels=None, scores=None).to_coco("street")[0]
        assert (result["category_id"], result["score"], result["image_id"]) == (1, 1.0, "street")

    def test_probabilities_are_not_encoded(self):
        with pytest.raises(InvalidInputError, match="threshold"):
            some_instances(masks=torch.rand(3, H, W)).to_rle()

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"boxes": None}, "expected boxes as a tensor"),
            ({"boxes": torch.zeros(2, 4)}, r"expected boxes of shape \(3, 4\).*got \(2, 4\)"),
            ({"boxes": torch.zeros(3, 5)}, r"expected boxes of shape \(3, 4\).*got \(3, 5\)"),
            ({"masks": torch.zeros(H, W)}, r"expected masks of shape \(N, 20, 30\)"),
            ({"masks": torch.zeros(3, W, H)}, r"expected masks of shape \(N, 20, 30\)"),
            ({"masks": torch.full((3, H, W), 1.5)}, "sigmoid"),
            ({"masks": torch.full((3, H, W), 3)}, "0 and 1, or of 0 and 255"),
            ({"image_size": (H, W, 3)}, "height, width"),
            ({"image_size": (0, W)}, "at least 1"),
            ({"image_size": (20.0, 30.0)}, "two integers"),
            ({"scores": torch.zeros(4)}, r"expected scores of shape \(3,\)"),
            ({"labels": ["cat", "dog", "cup"]}, "expected labels as a tensor"),
            ({"labels": torch.zeros(3)}, "expected integer labels"),
            ({"probs": torch.zeros(3, 8)}, r"expected probs of shape \(3, S, S\)"),
            ({"rois": torch.zeros(1, 4)}, r"expected rois of shape \(3, 4\)"),
            ({"scores": torch.zeros(3, device="meta")}, "expected scores on cpu"),
            ({"details": some_details().select(torch.tensor([0]))}, "expected details of 3 instances, got 1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes, message):
        with pytest.raises(InvalidInputError, match=message):
            some_instances(**changes)

    def test_frozen_short_in_print_and_picklable(self):
        instances = replace(some_instances(), details=some_details())
        with pytest.raises(FrozenInstanceError):
            instances.boxes = instances.boxes  # pyright: ignore[reportAttributeAccessIssue]
        assert repr(instances).startswith("Instances(3 of image_size=(20, 30)") and len(repr(instances)) < 200
        assert torch.equal(pickle.loads(pickle.dumps(instances)).masks, instances.masks)


class TestRefineDetails:
    def nodes(self, details: RefineDetails, level: int) -> list[tuple]:
        """Each node of a level with its chain of ancestors, told by their logits, and its probability."""
        rows = []
        for k in range(len(details.quadtree[level])):
            nodes = details.quadtree[level]
            row = [int(nodes.roi[k]), int(nodes.row[k]), int(nodes.col[k]), float(nodes.logits[k])]
            row.append(float(details.node_probs[level][k]))
            parent, depth = int(nodes.parent[k]), level
            while depth:
                depth -= 1
                above = details.quadtree[depth]
                assert int(above.roi[parent]) == row[0]
                row.append(float(above.logits[parent]))
                parent = int(above.parent[parent])
            assert parent == -1
            rows.append(tuple(row))
        return rows

    @pytest.mark.parametrize("index", [[0, 1, 2], [2], [1], [2, 0], [0, 2, 0], []])
    def test_select_keeps_nodes_and_their_parents(self, index):
        details = some_details()
        selected = details.select(torch.tensor(index, dtype=torch.long))
        for level in range(2):
            expected = [
                (new, *row[1:]) for new, old in enumerate(index) for row in self.nodes(details, level) if row[0] == old
            ]
            assert self.nodes(selected, level) == expected
            assert selected.quadtree[level].side == details.quadtree[level].side
        assert torch.equal(selected.incoherence, details.incoherence[index])
        assert torch.equal(selected.coarse_probs, details.coarse_probs[index])

    def test_parts_that_do_not_fit_are_refused(self):
        details = some_details()
        with pytest.raises(InvalidInputError, match="one probability per node"):
            replace(details, node_probs=(torch.rand(5), torch.rand(4)))
        with pytest.raises(InvalidInputError, match="one incoherence map per coarse mask"):
            replace(details, coarse_probs=torch.rand(2, 56, 56))
        with pytest.raises(InvalidInputError, match="one shape"):
            replace(details.quadtree[0], row=torch.arange(4))


class TestFeaturePyramid:
    def pyramid(self, **changes: Any) -> FeaturePyramid:
        values: dict[str, Any] = {
            "maps": [torch.rand(2, 8, 25, 34), torch.rand(2, 8, 13, 17), torch.rand(2, 8, 7, 9)],
            "strides": [4, 8, 16],
            "scale": torch.tensor([[0.5, 0.5], [2.0, 1.5]]),
            "origin": torch.tensor([[0.0, 0.0], [100.0, 40.0]]),
        }
        return FeaturePyramid(**values | changes)

    def test_lists_become_tuples_and_sizes_are_known(self):
        pyramid = self.pyramid()
        assert isinstance(pyramid.maps, tuple) and pyramid.strides == (4, 8, 16)
        assert (pyramid.batch_size, pyramid.channels, pyramid.source) == (2, 8, "detector")
        named = self.pyramid(maps=dict(zip("012", pyramid.maps, strict=True)))  # as torchvision's FPN returns them
        assert all(a is b for a, b in zip(named.maps, pyramid.maps, strict=True))

    def test_to_network_follows_each_image(self):
        boxes = torch.tensor([[110.0, 50, 130, 80], [110, 50, 130, 80]])
        found = self.pyramid().to_network(boxes, torch.tensor([1, 0]))
        assert found.tolist() == [[20, 15, 60, 60], [55, 25, 65, 40]]

    def test_to_network_without_scale_and_origin_is_the_identity(self):
        boxes = torch.rand(5, 4)
        plain = self.pyramid(scale=None, origin=None)
        assert torch.equal(plain.to_network(boxes, torch.zeros(5, dtype=torch.long)), boxes)
        assert self.pyramid().to_network(boxes[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 4)

    def test_to_converts_maps_and_keeps_positions_precise(self):
        pyramid = self.pyramid().to(dtype=torch.bfloat16)
        assert {level.dtype for level in pyramid.maps} == {torch.bfloat16}
        assert pyramid.scale is not None and pyramid.scale.dtype == torch.float32

    def test_to_moves_everything(self):
        source = self.pyramid()
        assert source.scale is not None and source.origin is not None
        on_meta = FeaturePyramid(tuple(level.to("meta") for level in source.maps), source.strides).to("meta")
        assert {level.device.type for level in on_meta.maps} == {"meta"}

    def test_sizes_may_be_rounded_up_or_down_or_padded_by_a_cell(self):
        for height in (12, 13):
            self.pyramid(
                maps=[torch.rand(1, 8, 25, 34), torch.rand(1, 8, height, 18)], strides=(4, 8), scale=None, origin=None
            )

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"maps": [], "strides": []}, "at least one map"),
            ({"strides": [4, 8]}, "3 maps and strides"),
            ({"maps": [np.zeros((2, 8, 25, 34), np.float32)] * 3}, "maps as tensors, finest first, got ndarray"),
            ({"strides": [4, 8, 32]}, "double"),
            ({"strides": [16, 8, 4]}, "double"),
            ({"strides": [3, 6, 12]}, "powers of two"),
            ({"strides": [0, 0, 0]}, "powers of two"),
            ({"maps": [torch.rand(8, 25, 34)] * 3}, r"\(B, C, H, W\)"),
            ({"maps": [torch.zeros(2, 8, 25, 34, dtype=torch.int64)] * 3}, "int64"),
            ({"maps": [torch.rand(2, 8, 24, 32), torch.rand(2, 9, 12, 16), torch.rand(2, 8, 6, 8)]}, "channels"),
            ({"maps": [torch.rand(2, 8, 24, 32), torch.rand(1, 8, 12, 16), torch.rand(2, 8, 6, 8)]}, "batch size"),
            ({"maps": [torch.rand(2, 8, 24, 32), torch.rand(2, 8, 10, 16), torch.rand(2, 8, 6, 8)]}, "half the size"),
            ({"maps": [torch.rand(2, 8, 6, 8), torch.rand(2, 8, 12, 16), torch.rand(2, 8, 24, 32)]}, "half the size"),
            ({"maps": [torch.rand(2, 8, 2, 2), torch.rand(2, 8, 1, 1), torch.rand(2, 8, 0, 0)]}, "half the size"),
            ({"maps": [torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2).half(), torch.rand(2, 8, 1, 1)]}, "one dtype"),
            ({"scale": torch.ones(1, 2)}, r"scale of shape \(2, 2\)"),
            ({"scale": torch.ones(2, 2, dtype=torch.int64)}, "float"),
            ({"scale": torch.tensor([[1.0, 0.0], [1, 1]])}, "above 0"),
            ({"scale": torch.tensor([[1.0, float("nan")], [1, 1]])}, "finite scale"),
            ({"origin": torch.tensor([[1.0, float("inf")], [1, 1]])}, "finite origin"),
            ({"origin": torch.zeros(2, 2, device="meta")}, r"origin of shape .* on cpu"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes, message):
        with pytest.raises(InvalidInputError, match=message):
            self.pyramid(**changes)
