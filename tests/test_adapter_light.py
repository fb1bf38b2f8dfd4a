"""Results without a model: supervision, Ultralytics and Segment Anything, in and, for supervision, out again."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from small_models import discs, encoder_config, random_image

from transfiner_refine.adapters import sam, ultralytics
from transfiner_refine.errors import InvalidInputError, MissingDependencyError
from transfiner_refine.functional.rle import encode
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.types import Instances

SIZE = (101, 157)
CIRCLES = [(60.0, 50.0, 30.0), (120.0, 60.0, 25.0)]


def mask_iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.fixture
def identity() -> Refiner:
    """Untrained, with the residual decoder: it changes no coarse probability."""
    return Refiner(RefinerModel(encoder_config()).eval())


class TestSupervision:
    @pytest.fixture
    def sv(self):
        return pytest.importorskip("supervision", reason="supervision is not installed: pip install supervision")

    @pytest.fixture
    def adapter(self, sv):
        return importlib.import_module("transfiner_refine.adapters.supervision")

    @pytest.fixture
    def detections(self, sv):
        return sv.Detections(
            xyxy=np.array([[30, 20, 90, 80.5], [95, 35, 145, 85]]),
            mask=discs(*SIZE, CIRCLES).numpy(),
            confidence=np.array([0.9, 0.4]),
            class_id=np.array([3, 17]),
            tracker_id=np.array([5, 6]),
            data={"class_name": np.array(["cup", "cat"])},
            metadata={"camera": "left"},
        )

    def test_detections_become_instances(self, adapter, detections):
        coarse = adapter.from_detections(detections, SIZE)
        assert isinstance(coarse, Instances) and coarse.image_size == SIZE
        assert coarse.boxes.tolist() == [[30, 20, 90, 80.5], [95, 35, 145, 85]]
        assert torch.equal(coarse.masks, discs(*SIZE, CIRCLES))
        assert coarse.scores is not None and coarse.scores.tolist() == pytest.approx([0.9, 0.4])
        assert coarse.labels is not None and coarse.labels.tolist() == [3, 17]

    def test_what_detections_lack_instances_lack(self, sv, adapter, detections):
        coarse = adapter.from_detections(sv.Detections(xyxy=detections.xyxy, mask=detections.mask), SIZE)
        assert coarse.scores is None and coarse.labels is None

    def test_only_the_masks_change_on_the_way_back(self, sv, adapter, detections):
        refined = discs(*SIZE, [(x + 1, y, r) for x, y, r in CIRCLES])
        coarse = adapter.from_detections(detections, SIZE)
        back = adapter.to_detections(Instances(coarse.boxes, refined, SIZE), like=detections)
        assert type(back) is sv.Detections and np.array_equal(back.mask, refined)
        back.mask = detections.mask
        assert back == detections and back.metadata == detections.metadata

    def test_the_given_detections_are_not_touched(self, adapter, detections):
        refined = adapter.from_detections(detections, SIZE)
        back = adapter.to_detections(refined, like=detections)
        back.mask[:], back.xyxy[:], back.data["class_name"][:] = False, 0, "other"
        back.metadata["camera"] = "right"
        assert np.array_equal(detections.mask, discs(*SIZE, CIRCLES)) and refined.masks.any()
        assert detections.xyxy.any() and detections.data["class_name"].tolist() == ["cup", "cat"]
        assert detections.metadata == {"camera": "left"}

    def test_instances_of_any_origin_become_detections(self, sv, adapter):
        instances = Instances(
            torch.tensor([[1.0, 2, 3, 4]]), discs(*SIZE, CIRCLES[:1]), SIZE, torch.tensor([0.5]), torch.tensor([7])
        )
        found = adapter.to_detections(instances)
        expected = sv.Detections(
            xyxy=np.array([[1, 2, 3, 4]]),
            mask=instances.masks.numpy(),
            confidence=np.array([0.5]),
            class_id=np.array([7]),
        )
        assert found == expected
        assert adapter.to_detections(Instances(instances.boxes, instances.masks, SIZE)).confidence is None

    def test_compact_masks_come_back_dense(self, sv, adapter, detections):
        if not hasattr(sv, "CompactMask"):
            pytest.skip(f"supervision {sv.__version__} has no compact masks")
        dense = detections.mask
        detections.mask = sv.CompactMask.from_dense(dense, detections.xyxy, image_shape=SIZE)
        coarse = adapter.from_detections(detections, SIZE)
        assert torch.equal(coarse.masks, torch.from_numpy(np.array(detections.mask)))
        # Compact masks are cut at their boxes; a refined mask may leave its box.
        refined = Instances(coarse.boxes, ~coarse.masks, SIZE)
        assert np.array_equal(adapter.to_detections(refined, like=detections).mask, ~coarse.masks)

    def test_no_detections(self, sv, adapter):
        coarse = adapter.from_detections(sv.Detections.empty(), SIZE)
        assert len(coarse) == 0 and coarse.masks.shape == (0, *SIZE)
        assert len(adapter.to_detections(coarse, like=sv.Detections.empty())) == 0

    def test_refinement_goes_through(self, adapter, detections, identity: Refiner):
        (refined,) = identity.refine_batch([random_image(*SIZE)], [adapter.from_detections(detections, SIZE)])
        back = adapter.to_detections(refined, like=detections)
        assert back.tracker_id.tolist() == [5, 6]
        for mask, given in zip(back.mask, detections.mask, strict=True):
            assert mask_iou(torch.from_numpy(mask), torch.from_numpy(given)) > 0.95

    def test_misuse_is_named(self, sv, adapter, detections):
        with pytest.raises(InvalidInputError, match="expected detections with masks, got 2 with boxes alone"):
            adapter.from_detections(sv.Detections(xyxy=detections.xyxy), SIZE)
        with pytest.raises(InvalidInputError, match=r"expected masks of shape \(N, 157, 101\)"):
            adapter.from_detections(detections, SIZE[::-1])
        coarse = adapter.from_detections(detections, SIZE)
        with pytest.raises(InvalidInputError, match="as many detections in like as instances, 1, got 2"):
            adapter.to_detections(coarse[:1], like=detections)
        with pytest.raises(InvalidInputError, match=r"expected bool masks, got .*probabilities"):
            adapter.to_detections(Instances(coarse.boxes, coarse.masks.float(), SIZE))


def test_a_missing_supervision_is_named(uninstall: Callable[..., None]):
    uninstall("supervision", "transfiner_refine.adapters.supervision")
    with pytest.raises(MissingDependencyError, match="pip install supervision"):
        importlib.import_module("transfiner_refine.adapters.supervision")


LETTERBOXES = [
    ((101, 157), (128, 160), (12, 0, 115, 160)),
    ((157, 101), (160, 128), (0, 12, 160, 115)),
    ((101, 157), (160, 160), (28, 0, 131, 160)),
    ((480, 640), (480, 640), (0, 0, 480, 640)),
    ((97, 61), (96, 96), (0, 18, 96, 78)),
    ((33, 35), (64, 64), (2, 0, 62, 64)),
    ((1, 300), (32, 64), (15, 0, 16, 64)),
    ((427, 640), (224, 320), (5, 0, 219, 320)),
    ((375, 500), (224, 224), (28, 0, 196, 224)),
    ((113, 59), (96, 160), (0, 55, 96, 105)),
]
"""Image size, network size, and the rows and columns that ultralytics 8.4.190's LetterBox filled with a white image."""


def yolo_results(masks: torch.Tensor | None, boxes: torch.Tensor, size: tuple[int, int], xy: list | None = None):
    """What this package reads of an Ultralytics ``Results``, with the names, types and shapes that 8.4.190 has."""
    found = SimpleNamespace(
        xyxy=boxes, conf=torch.linspace(0.9, 0.4, len(boxes)), cls=torch.arange(len(boxes)).float() + 3
    )
    part = None if masks is None and xy is None else SimpleNamespace(data=masks, xy=xy, orig_shape=size)
    return SimpleNamespace(orig_shape=size, boxes=found, masks=part, names={3: "cup", 4: "cat"})


def letterboxed(masks: torch.Tensor, network: tuple[int, int], place: tuple[int, int, int, int]) -> torch.Tensor:
    """Resize masks ``(N, H, W)`` and put them into an empty input, as LetterBox does with an image; uint8."""
    top, left, bottom, right = place
    canvas = np.zeros((len(masks), *network), np.uint8)
    for target, mask in zip(canvas, masks.numpy(), strict=True):
        resized = cv2.resize(mask.astype(np.uint8) * 255, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
        target[top:bottom, left:right] = resized >= 128
    return torch.from_numpy(canvas)


class TestUltralytics:
    @pytest.mark.parametrize(("size", "network", "place"), LETTERBOXES)
    def test_the_letterbox_is_found(self, size, network, place):
        assert ultralytics.letterbox(network, size) == place

    @pytest.mark.parametrize(("size", "network", "place"), [x for x in LETTERBOXES if min(x[0]) > 50])
    def test_masks_lie_where_they_were_in_the_image(
        self, size: tuple[int, int], network: tuple[int, int], place: tuple[int, int, int, int]
    ):
        short = min(size)
        truth = discs(*size, [(0.4 * size[1], 0.6 * size[0], 0.3 * short), (size[1] - 10, 10, 0.2 * short)])
        boxes = boxes_from_masks(truth)
        coarse = ultralytics.from_results(yolo_results(letterboxed(truth, network, place), boxes, size))
        assert coarse.masks.dtype == torch.bool and coarse.image_size == size
        assert torch.equal(coarse.boxes, boxes)
        for mask, expected in zip(coarse.masks, truth, strict=True):
            assert mask_iou(mask, expected) > 0.97

    def test_scores_and_labels(self):
        truth = discs(*SIZE, CIRCLES)
        coarse = ultralytics.from_results(yolo_results(truth.byte(), boxes_from_masks(truth), SIZE))
        assert coarse.scores is not None and coarse.scores.tolist() == pytest.approx([0.9, 0.4])
        assert coarse.labels is not None and coarse.labels.tolist() == [3, 4]

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bool])
    @pytest.mark.parametrize("is_numpy", [False, True])
    def test_masks_at_the_size_of_the_image_are_taken_as_they_are(self, dtype: torch.dtype, is_numpy: bool):
        truth = discs(*SIZE, CIRCLES)
        results = yolo_results(truth.to(dtype), boxes_from_masks(truth), SIZE)
        if is_numpy:  # Results.numpy()
            results.masks.data = results.masks.data.numpy()
            for name in ("xyxy", "conf", "cls"):
                setattr(results.boxes, name, getattr(results.boxes, name).numpy())
        coarse = ultralytics.from_results(results)
        assert coarse.masks.dtype == torch.bool and torch.equal(coarse.masks, truth)

    def test_polygons_are_drawn_where_there_are_no_masks(self):
        truth = discs(*SIZE, CIRCLES)
        outlines = [
            cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][0].reshape(-1, 2).astype(np.float32)
            for mask in truth.byte().numpy()
        ]
        nothing = np.zeros((0, 2), np.float32)
        boxes = torch.cat([boxes_from_masks(truth), torch.tensor([[1.0, 1, 2, 2]])])
        coarse = ultralytics.from_results(yolo_results(None, boxes, SIZE, xy=[*outlines, nothing]))
        assert torch.equal(coarse.masks, torch.cat([truth, torch.zeros(1, *SIZE, dtype=torch.bool)]))

    @pytest.mark.parametrize("masks", [None, torch.zeros(0, 128, 160, dtype=torch.uint8)])
    def test_nothing_found(self, masks):
        coarse = ultralytics.from_results(yolo_results(masks, torch.zeros(0, 4), SIZE))
        assert len(coarse) == 0 and coarse.masks.shape == (0, *SIZE)

    def test_refinement_goes_through(self, identity: Refiner):
        truth = discs(*SIZE, CIRCLES)
        _, network, place = LETTERBOXES[0]
        results = yolo_results(letterboxed(truth, network, place), boxes_from_masks(truth), SIZE)
        (refined,) = identity.refine_batch([random_image(*SIZE)], [ultralytics.from_results(results)])
        assert all(mask_iou(mask, expected) > 0.95 for mask, expected in zip(refined.masks, truth, strict=True))

    def test_misuse_is_named(self):
        boxes = torch.tensor([[1.0, 2, 3, 4]])
        with pytest.raises(InvalidInputError, match=r"got a list of 1: pass results\[0\]"):
            ultralytics.from_results([yolo_results(None, boxes, SIZE)])
        with pytest.raises(InvalidInputError, match="expected masks, got results with 1 boxes alone"):
            ultralytics.from_results(yolo_results(None, boxes, SIZE))
        with pytest.raises(InvalidInputError, match="got dict without orig_shape, boxes, masks"):
            ultralytics.from_results({})
        classified = SimpleNamespace(orig_shape=SIZE, boxes=None, masks=None)
        with pytest.raises(InvalidInputError, match="expected Results with boxes, got none"):
            ultralytics.from_results(classified)


class TestSam:
    def annotations(self, form: str) -> list[dict]:
        """What ``SamAutomaticMaskGenerator`` returns for each of its output modes."""
        masks = discs(*SIZE, CIRCLES).numpy()
        runs = encode(masks)
        plain = [{"size": list(SIZE), "counts": _run_lengths(mask)} for mask in masks]
        segmentations = {"binary_mask": list(masks), "coco_rle": runs, "uncompressed_rle": plain}[form]
        return [
            {"segmentation": segmentation, "bbox": [1, 2, 3, 4], "predicted_iou": score, "stability_score": 0.9}
            for segmentation, score in zip(segmentations, (1.01, 0.75), strict=True)
        ]

    @pytest.mark.parametrize("form", ["binary_mask", "coco_rle", "uncompressed_rle"])
    def test_annotations_of_every_output_mode(self, form: str):
        coarse = sam.from_annotations(self.annotations(form))
        truth = discs(*SIZE, CIRCLES)
        assert coarse.image_size == SIZE and torch.equal(coarse.masks, truth)
        assert torch.equal(coarse.boxes, boxes_from_masks(truth))
        assert coarse.scores is not None and coarse.scores.tolist() == pytest.approx([1.01, 0.75])

    def test_annotations_without_scores(self):
        first, second = self.annotations("binary_mask")
        del second["predicted_iou"]
        assert sam.from_annotations([first, second]).scores is None

    def test_no_annotations_need_the_size(self):
        assert sam.from_annotations([], image_size=SIZE).masks.shape == (0, *SIZE)
        with pytest.raises(InvalidInputError, match=r"expected image_size=\(H, W\)"):
            sam.from_annotations([])

    @pytest.mark.parametrize("masks", [discs(*SIZE, CIRCLES), discs(*SIZE, CIRCLES).float().numpy()])
    def test_one_mask_each(self, masks):
        coarse = sam.from_masks(masks, np.array([0.5, 0.25]))
        truth = discs(*SIZE, CIRCLES)
        assert torch.equal(coarse.masks >= 0.5, truth) and torch.equal(coarse.boxes, boxes_from_masks(truth))
        assert coarse.scores is not None and coarse.scores.tolist() == [0.5, 0.25]

    def test_the_best_of_the_candidates_is_taken(self):
        candidates = torch.stack([discs(*SIZE, [(x, y, r - 5 * k) for x, y, r in CIRCLES]) for k in range(3)], dim=1)
        coarse = sam.from_masks(candidates, torch.tensor([[0.1, 0.2, 0.9], [0.5, 0.8, 0.3]]))
        assert torch.equal(coarse.masks, torch.stack([candidates[0, 2], candidates[1, 1]]))
        assert coarse.scores is not None and coarse.scores.tolist() == pytest.approx([0.9, 0.8])

    def test_a_single_candidate_needs_no_score(self):
        masks = discs(*SIZE, CIRCLES)
        assert torch.equal(sam.from_masks(masks[:, None]).masks, masks)

    @pytest.mark.parametrize("shape", [(0, *SIZE), (0, 3, *SIZE)])
    def test_nothing_found(self, shape: tuple[int, ...]):
        scores = torch.zeros(shape[:-2])
        coarse = sam.from_masks(torch.zeros(shape, dtype=torch.bool), scores)
        assert len(coarse) == 0 and coarse.image_size == SIZE

    def test_an_empty_mask_comes_back_unchanged(self, identity: Refiner):
        masks = torch.cat([discs(*SIZE, CIRCLES), torch.zeros(1, *SIZE, dtype=torch.bool)])
        (refined,) = identity.refine_batch([random_image(*SIZE)], [sam.from_masks(masks)])
        assert refined.boxes[2].tolist() == [0, 0, 0, 0] and not refined.masks[2].any()
        assert all(mask_iou(mask, given) > 0.95 for mask, given in zip(refined.masks[:2], masks, strict=False))

    @pytest.mark.parametrize(
        ("masks", "scores", "message"),
        [
            (torch.zeros(*SIZE), None, r"\(N, H, W\) or \(N, K, H, W\), got \(101, 157\)"),
            (torch.zeros(2, 3, *SIZE), None, r"expected scores of shape \(N, K\) = \(2, 3\) .* got none"),
            (torch.zeros(2, 3, *SIZE), torch.zeros(3), r"\(2, 3\) .* got \(3,\)"),
            (torch.zeros(2, 0, *SIZE), torch.zeros(2, 0), r"expected scores"),
            (torch.full((2, *SIZE), -8.0), None, "apply a sigmoid to logits"),
            (torch.zeros(2, *SIZE), torch.zeros(3), r"expected scores of shape \(2,\)"),
        ],
    )
    def test_masks_that_do_not_fit_are_refused(self, masks, scores, message: str):
        with pytest.raises(InvalidInputError, match=message):
            sam.from_masks(masks, scores)

    def test_annotations_that_do_not_fit_are_refused(self):
        first, second = self.annotations("coco_rle")
        with pytest.raises(InvalidInputError, match="got a single one: put it into a list"):
            sam.from_annotations(first)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InvalidInputError, match=r"got none in those at \[1\]"):
            sam.from_annotations([first, {"bbox": [0, 0, 1, 1]}])
        with pytest.raises(InvalidInputError, match="segmentation 1: expected run lengths of size"):
            sam.from_annotations([first, second | {"segmentation": {"size": [9, 9], "counts": [81]}}])


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs down the columns; the mask begins with background."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    return np.diff(changes, prepend=0, append=len(flat)).tolist()
