"""The detector of the released checkpoints, and the whole model, against recorded outputs and against Detectron2."""

import importlib
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2_host import import_detectron2, mask_rcnn
from released_cases import RecordedCase, constants, flat_checkpoint, recorded_case
from torch import Tensor

from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.inputs import as_image
from transfiner_refine.modeling.released import (
    COCO_CATEGORY_IDS,
    ReleasedConfig,
    ReleasedMaskTransfiner,
    in_image_frame,
    network_input,
    normalise,
)
from transfiner_refine.modeling.released_detector import apply_deltas, cell_anchors, level_anchors
from transfiner_refine.modeling.released_files import DETECTRON2, convert_checkpoint
from transfiner_refine.threads import torch_threads

RECORDED = {"full_r50": "keys_r50.json", "full_r50_deform": "keys_r50_deform.json"}


@cache
def recorded_model(name: str) -> tuple[RecordedCase, ReleasedMaskTransfiner]:
    case = recorded_case(name)
    settings = {key: case.settings[key] for key in ("score_threshold", "detections_per_image", "min_size")}
    return case, ReleasedMaskTransfiner.from_original(case.weights(RECORDED[name]), **settings)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As the recordings were made: with one thread oneDNN sums in another order, and features change by up to 4e-5."""
    with torch_threads(2):
        yield


@cache
def sums_as_recorded() -> bool:
    """Whether this processor's convolutions give the recorded features bit by bit; needs two threads."""
    case, model = recorded_model("full_r50")
    with torch.no_grad():
        features = model.backbone(normalise(case.tensors["network_input"]))
    return torch.equal(features[3], case.tensors["fpn_p5"])


def recorded_image(case: RecordedCase, data_root: Path) -> Tensor:
    path = data_root / case.settings["image"]
    if not path.exists():
        pytest.skip(f"no {path}: it is the image of the recorded case")
    return as_image(path)


def recorded_masks(case: RecordedCase, size: tuple[int, int]) -> Tensor:
    bits = np.unpackbits(case.tensors["masks_packed"].numpy(), axis=1)[:, : size[0] * size[1]]
    return torch.from_numpy(bits.reshape(-1, *size).astype(bool))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", RECORDED)
class TestRecorded:
    @torch.no_grad()
    def test_each_step(self, name: str, data_root: Path):
        """Activations deviate by about 6, so that 1e-3 of them is a relative 2e-4."""
        case, model = recorded_model(name)
        recorded = case.tensors
        pixels = network_input(recorded_image(case, data_root), model.config.min_size)
        assert torch.equal(pixels, recorded["network_input"])
        size = (pixels.shape[1], pixels.shape[2])
        features = model.backbone(normalise(pixels))
        for found, key in (
            (features[0][:, :, ::8, ::8], "fpn_p2_sampled"),
            (features[1][:, :, ::4, ::4], "fpn_p3_sampled"),
            (features[3], "fpn_p5"),
        ):
            torch.testing.assert_close(found, recorded[key], atol=1e-3, rtol=0)
        proposals, logits = model.rpn_head.propose(features, size)
        torch.testing.assert_close(proposals[:100], recorded["proposal_boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(logits[:100], recorded["proposal_logits"], atol=1e-3, rtol=0)
        boxes, scores, classes = model.box_predictor.detect(
            model.box_head(features[:4], proposals),
            proposals,
            size,
            model.config.score_threshold,
            model.config.detections_per_image,
        )
        torch.testing.assert_close(boxes, recorded["boxes_network"], atol=1e-3, rtol=0)
        torch.testing.assert_close(scores, recorded["scores"], atol=1e-4, rtol=0)
        assert torch.equal(classes, recorded["classes"])

    def test_pasting(self, name: str, data_root: Path):
        case, _ = recorded_model(name)
        recorded = case.tensors
        image = recorded_image(case, data_root)
        size = (image.shape[1], image.shape[2])
        _, height, width = recorded["network_input"].shape
        boxes, probs, scores, labels = (
            recorded[key] for key in ("boxes_network", "refined_probs_112", "scores", "classes")
        )
        out = in_image_frame(boxes, probs, scores, labels, (height, width), size)
        torch.testing.assert_close(out.boxes, recorded["boxes"], atol=1e-4, rtol=0)
        assert torch.equal(out.masks, recorded_masks(case, size))

    def test_image_to_instances_past_the_limit(self, name: str, data_root: Path):
        self.check(name, data_root, max_instances=0)

    @pytest.mark.slow
    def test_image_to_instances(self, name: str, data_root: Path):
        self.check(name, data_root, max_instances=10)

    def check(self, name: str, data_root: Path, max_instances: int) -> None:
        case, model = recorded_model(name)
        recorded = case.tensors
        image = recorded_image(case, data_root)
        out = model(image, max_instances)
        assert out.probs is not None and out.scores is not None and out.labels is not None
        torch.testing.assert_close(out.boxes, recorded["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(out.scores, recorded["scores"], atol=1e-4, rtol=0)
        assert torch.equal(out.labels, recorded["classes"])
        masks = recorded_masks(case, out.image_size)
        # The random features change by about their deviation from pixel to pixel. Rounding in the convolutions moves a
        # box by 1e-4 pixels, and that shows: by up to 2.1e-4 with one thread, 6.7e-5 with sums as they were recorded.
        tolerance = 1e-4 if sums_as_recorded() else 5e-4
        for part in (slice(max_instances), slice(10, None)):
            torch.testing.assert_close(out.probs[part], recorded["refined_probs_112"][part], atol=tolerance, rtol=0)
            differ = (out.masks[part] != masks[part]).sum(dim=(1, 2))
            assert bool((differ <= 1e-3 * masks[part].sum(dim=(1, 2)) + 2).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of Detectron2
@torch.no_grad()
def test_agrees_with_detectron2(tmp_path: Path):
    """Stock Detectron2 loads the detector that a conversion wrote, and computes the same to the coarse mask."""
    import_detectron2()
    case, model = recorded_model("full_r50")
    torch.save({"model": case.weights("keys_r50.json")}, tmp_path / "original.pth")
    convert_checkpoint(tmp_path / "original.pth", tmp_path / "converted")
    host = mask_rcnn(min_size=320, score_threshold=0.03, limit=15)
    checkpointer = importlib.import_module("detectron2.checkpoint").DetectionCheckpointer(host)
    names = torch.load(tmp_path / "converted" / DETECTRON2, weights_only=True)["model"].keys()
    assert names == host.state_dict().keys()
    checkpointer.load(str(tmp_path / "converted" / DETECTRON2))

    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (1, 3, 10, 14), generator=generator).float()
    photo = F.interpolate(coarse, (320, 460), mode="bicubic").clamp(0, 255).to(torch.uint8)[0]
    pixels, size = network_input(photo, 320), (320, 460)
    images = host.preprocess_image([{"image": pixels}])
    torch.testing.assert_close(normalise(pixels), images.tensor)
    features, expected = model.backbone(normalise(pixels)), host.backbone(images.tensor)
    for level, found in zip(("p2", "p3", "p4", "p5", "p6"), features, strict=True):
        torch.testing.assert_close(found, expected[level], atol=1e-3, rtol=0)
    # From here on the same features, so that no step hides another's error.
    features = [expected[level] for level in ("p2", "p3", "p4", "p5", "p6")]
    (proposed,), _ = host.proposal_generator(images, expected, None)
    proposals, logits = model.rpn_head.propose(features, size)
    torch.testing.assert_close(proposals, proposed.proposal_boxes.tensor, atol=1e-3, rtol=0)
    torch.testing.assert_close(logits, proposed.objectness_logits, atol=1e-3, rtol=0)
    (detected,), _ = host.roi_heads(images, expected, [proposed], None)
    hidden = model.box_head(features[:4], proposals)
    boxes, scores, classes = model.box_predictor.detect(hidden, proposals, size, 0.03, 15)
    assert torch.equal(classes, detected.pred_classes)
    torch.testing.assert_close(boxes, detected.pred_boxes.tensor, atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, detected.scores, atol=1e-3, rtol=0)
    masks = model.mask_branch(features[:4], [detected.pred_boxes.tensor], [classes], max_instances=0)
    torch.testing.assert_close(masks.coarse_logits.sigmoid(), detected.pred_masks[:, 0], atol=1e-3, rtol=0)


class TestInput:
    @pytest.mark.parametrize(
        ("image", "network"),
        [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1200), (333, 1333)), ((1, 3000), (1, 1333))],
    )
    def test_size(self, image: tuple[int, int], network: tuple[int, int]):
        """Shorter side 800, unless the longer one would exceed 1333."""
        pixels = network_input(torch.zeros(3, *image, dtype=torch.uint8), 800)
        assert pixels.shape[1:] == network
        padded = normalise(pixels)
        assert padded.shape[2] % 32 == padded.shape[3] % 32 == 0
        assert padded.shape[2] - network[0] < 32 and padded.shape[3] - network[1] < 32

    def test_channels_and_padding(self):
        red = torch.zeros(3, 33, 40, dtype=torch.uint8)
        red[0] = 255
        pixels = normalise(network_input(red, 33))
        expected = torch.tensor([0 - 103.53, 0 - 116.28, 255 - 123.675])
        torch.testing.assert_close(pixels[0, :, 0, 0], expected)
        assert not bool(pixels[:, :, 33:].any() or pixels[:, :, :, 40:].any())

    def test_float_images_are_rounded_to_8_bits(self):
        image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
        assert torch.equal(network_input(image / 255, 40), network_input(image, 40))


class TestBoxes:
    def test_anchors(self):
        """Of one area per level, height over width 1/2, 1 and 2, centred on the corners of the cells."""
        assert torch.allclose(cell_anchors()[0][1], torch.tensor([-16.0, -16.0, 16.0, 16.0]))
        for side, anchors in zip((32, 64, 128, 256, 512), cell_anchors(), strict=True):
            size = anchors[:, 2:] - anchors[:, :2]
            torch.testing.assert_close(size.prod(dim=1), torch.full((3,), float(side**2)))
            torch.testing.assert_close(size[:, 1] / size[:, 0], torch.tensor([0.5, 1.0, 2.0]))
        placed = level_anchors(1, torch.empty(1, 1, 2, 3)).view(2, 3, 3, 4)
        torch.testing.assert_close(placed[1, 2], cell_anchors()[1] + torch.tensor([16.0, 8.0, 16.0, 8.0]))

    def test_deltas_move_and_scale(self):
        boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
        assert torch.equal(apply_deltas(boxes, torch.zeros(1, 4)), boxes)
        deltas = torch.tensor([[1.0, -5.0, 5 * math.log(2.0), 1e9]])
        moved = apply_deltas(boxes, deltas, (10.0, 10.0, 5.0, 5.0))
        # Centre (20, 40) moves by a tenth of 20 and minus half of 40; the height's factor is limited to 62.5.
        torch.testing.assert_close(moved, torch.tensor([[2.0, 20 - 1250.0, 42.0, 20 + 1250.0]]))


class TestPaste:
    def test_is_interpolation_with_zeros_around(self):
        """Boxes of some hundred pixels, so that half a cell, across which a mask fades out, is more than one pixel."""
        size, limit = (300, 500), torch.tensor([500.0, 300.0, 500.0, 300.0])
        boxes = torch.tensor([[3.2, 4.7, 490.1, 290.3], [-10.0, 5.0, 300.0, 380.0], [455.0, 235.0, 459.0, 239.5]])
        probs = torch.rand(3, 112, 112, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.4
        out = in_image_frame(boxes, probs, torch.ones(3), torch.zeros(3, dtype=torch.long), size, size)
        clipped = boxes.clamp(min=0).minimum(limit)
        assert torch.equal(out.boxes, clipped)
        y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
        for index, (x1, y1, x2, y2) in enumerate(clipped.tolist()):
            grid = torch.stack([(x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1], dim=2)
            expected = F.grid_sample(probs[index, None, None], grid[None], align_corners=False)[0, 0]
            clear = (expected - 0.5).abs() > 1e-4  # rounding decides the others
            assert torch.equal(out.masks[index][clear], (expected >= 0.5)[clear])

    def test_boxes_without_area_are_dropped(self):
        boxes = torch.tensor([[5.0, 5.0, 20.0, 20.0], [90.0, 5.0, 99.0, 20.0]])
        labels = torch.tensor([3, 4])
        out = in_image_frame(boxes, torch.ones(2, 112, 112), torch.ones(2), labels, (80, 100), (40, 45))
        assert len(out) == 2
        out = in_image_frame(boxes, torch.ones(2, 112, 112), torch.ones(2), labels, (80, 80), (40, 40))
        assert out.labels is not None and out.labels.tolist() == [3]


class TestModel:
    @pytest.mark.parametrize("depth", [50, 101])
    @pytest.mark.parametrize(("deformable", "modulated"), [(False, False), (True, False), (True, True)])
    def test_keys_tell_the_architecture(self, depth: int, deformable: bool, modulated: bool):
        config = ReleasedConfig(depth, deformable, modulated)
        assert ReleasedConfig.from_keys(flat_checkpoint(config)) == config

    @pytest.mark.parametrize(("deformable", "modulated"), [(False, False), (True, False), (True, True)])
    def test_an_image_without_detections(self, deformable: bool, modulated: bool):
        config = ReleasedConfig(50, deformable, modulated)
        model = ReleasedMaskTransfiner.from_original(flat_checkpoint(config) | constants(), min_size=64)
        out = model(np.full((50, 70, 3), 200, np.uint8))  # all classes score 1/81, below the threshold
        assert len(out) == 0 and out.image_size == (50, 70) and out.masks.shape == (0, 50, 70)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"pixel_std": torch.full((3,), 57.0)}, "pixel_std to be .1.0, 1.0, 1.0., got"),
            ({"pixel_mean": torch.tensor([123.675, 116.28, 103.53])}, "pixel_mean to be"),
            ({"proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}, "cell_anchors.0 to be"),
        ],
    )
    def test_other_constants_are_refused(self, change: dict, message: str):
        with pytest.raises(WeightsError, match=message):
            ReleasedMaskTransfiner.from_original(flat_checkpoint() | change)

    def test_step_counters_are_no_error(self):
        counter = {"backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.tensor(7)}
        ReleasedMaskTransfiner.from_original(flat_checkpoint() | counter)

    @pytest.mark.parametrize(
        "settings",
        [
            {"score_threshold": 1.5},
            {"detections_per_image": 0},
            {"min_size": 0},
            {"depth": 34},
            {"modulated": True},
            {"model_type": "refiner"},
        ],
    )
    def test_settings_out_of_range(self, settings: dict):
        with pytest.raises(InvalidInputError, match="expected"):
            ReleasedConfig(**settings)

    def test_category_ids(self):
        assert len(COCO_CATEGORY_IDS) == 80
        assert (COCO_CATEGORY_IDS[0], COCO_CATEGORY_IDS[11], COCO_CATEGORY_IDS[-1]) == (1, 13, 90)  # person, stop sign
