"""Detectron2's R-CNNs behind their adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import adapter_cases as cases
import numpy as np
import pytest
import torch
from detectron2_host import import_detectron2, small_config
from small_models import discs
from torch import Tensor, nn

from transfiner_refine import InvalidInputError, RefineOptions, Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.functional.paste import crop_box_masks
from transfiner_refine.inputs import boxes_from_masks

import_detectron2()
structures, transforms = import_module("detectron2.structures"), import_module("detectron2.data.transforms")
EventStorage = import_module("detectron2.utils.events").EventStorage
build_model = import_module("detectron2.modeling").build_model
Detectron2Adapter = import_module("transfiner_refine.adapters.detectron2").Detectron2Adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

RESIZE = transforms.ResizeShortestEdge(128, 160)


class DiscPredictor(nn.Module):
    """Gives every instance a disc, beside what it has learnt: without training there would be no outline to look at."""

    def __init__(self, learnt: nn.Module) -> None:
        super().__init__()
        self.learnt = learnt
        y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
        self.register_buffer("disc", 11 - (x**2 + y**2).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return self.learnt(x) + self.disc


def make(seed: int = 0, config: Any = None) -> Any:
    torch.manual_seed(seed)
    model = build_model(config or small_config()).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("anchor_deltas.weight", "bbox_pred.weight")):
            parameter.data.mul_(0.01)  # boxes of the anchors' sizes: random ones are often smaller than a pixel
    if hasattr(model.roi_heads.mask_head, "predictor"):
        model.roi_heads.mask_head.predictor = DiscPredictor(model.roi_heads.mask_head.predictor)
    return model


def as_input(image: Tensor) -> dict[str, Any]:
    """What Detectron2's ``DefaultPredictor`` makes of an RGB image in [0, 1]."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()[:, :, ::-1]
    resized = RESIZE.get_transform(pixels).apply_image(pixels)
    tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    return {"image": tensor, "height": pixels.shape[0], "width": pixels.shape[1]}


def results(output: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    found = []
    for image in output:
        assert set(image) == {"instances"} and type(image["instances"]) is structures.Instances
        fields = dict(image["instances"].get_fields())
        boxes, masks = fields.pop("pred_boxes"), fields.pop("pred_masks")
        assert type(boxes) is structures.Boxes and masks.dtype == torch.bool
        size = torch.tensor(image["instances"].image_size)
        assert tuple(size) == masks.shape[1:]
        found.append({**fields, "boxes": boxes.tensor, "masks": masks, "size": size})
    return found


def training_input(masks: Tensor, labels: Sequence[int], polygons: bool = False) -> dict[str, Any]:
    """An image of bright ``masks`` ``(N, H, W)`` bool with its ground truth, as Detectron2's data loader gives it."""
    instances = structures.Instances((masks.shape[1], masks.shape[2]))
    instances.gt_boxes = structures.Boxes(boxes_from_masks(masks))
    instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
    instances.gt_masks = structures.BitMasks(masks)
    if polygons:
        instances.gt_masks = structures.PolygonMasks([[outline(mask)] for mask in masks])
    image = 25 + 205 * masks.any(dim=0).expand(3, -1, -1).float()
    return {"image": image, "instances": instances, "height": 2 * masks.shape[1], "width": 2 * masks.shape[2]}


def outline(mask: Tensor) -> np.ndarray:
    """A disc's outline as a polygon ``x, y, x, y, ...``."""
    x1, y1, x2, y2 = boxes_from_masks(mask[None])[0].double().numpy()
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    points = [(x1 + x2 + (x2 - x1) * np.cos(angle)) / 2, (y1 + y2 + (y2 - y1) * np.sin(angle)) / 2]
    return np.stack(points, axis=1).reshape(-1)


def batch(polygons: bool = True) -> list[dict[str, Any]]:
    """Two images of different sizes, with two instances and one, which may be given as a polygon."""
    first = discs(97, 131, [(40.0, 45.0, 30.0), (100.0, 60.0, 22.0)])
    second = discs(120, 101, [(50.0, 60.0, 38.0)])
    return [training_input(first, [0, 1]), training_input(second, [1], polygons)]


def losses(model: nn.Module, inputs: list[dict[str, Any]] | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)  # the host and the losses draw their samples
    with EventStorage(0):
        return model(inputs or batch())


def call(model: nn.Module, images: Sequence[Tensor | Mapping[str, Any]]) -> Any:
    return model([image if isinstance(image, Mapping) else as_input(image) for image in images])


@dataclass(frozen=True)
class Detectron2Host(cases.Host):
    """Images are Detectron2's dicts, so that ``detect`` does not resize them to its usual size."""

    def images(self) -> list[Any]:
        return [as_input(image) for image in super().images()]


HOST = Detectron2Host(make=make, call=call, results=results, losses=losses)


@pytest.mark.parametrize(
    "check",
    [
        cases.check_identity,
        cases.check_every_instance_is_refined,
        cases.check_detach,
        cases.check_threads,
        cases.check_training_on_the_image_is_refused,
        cases.check_joint_training,
        cases.check_scopes,
    ],
    ids=lambda check: check.__name__,
)
def test_as_every_host(check: Callable[[cases.Host], None]):
    check(HOST)


def test_a_batch_of_mixed_sizes_equals_one_by_one():
    # 119 × 160 and 120 × 160 of the network: both are padded to 128 × 160.
    cases.check_batch_equals_loop(HOST, alike=[(97, 131), (100, 133), (101, 136)])


def test_saved_and_loaded(tmp_path: Path):
    cases.check_saved_model(HOST, tmp_path)


class Painted(nn.Module):
    """Averages the network's input, with Detectron2's normalisation and channel order undone."""

    size_divisibility = 32

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.mean, self.std, self.is_bgr = model.pixel_mean, model.pixel_std, model.input_format == "BGR"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pixels = (x * self.std + self.mean) / 255
        maps = cases.pooled(pixels.flip(1) if self.is_bgr else pixels, (4, 8, 16, 32, 64), 16)
        return dict(zip(("p2", "p3", "p4", "p5", "p6"), maps, strict=True))


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_features_lie_where_the_image_says(order: str):
    model = make(config=small_config("INPUT.FORMAT", order))
    adapter = Detectron2Adapter(model, min_size=200, max_size=300)
    model.backbone = Painted(model)
    images = [cases.position_image(height, width) for height, width in [(97, 131), (203, 117), (240, 320)]]
    predictions = adapter.detect(images)
    assert [prediction.instances.image_size for prediction in predictions] == [(97, 131), (203, 117), (240, 320)]
    cases.check_pattern(predictions, tolerance=0.5)
    arrays = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    for a, b in zip(adapter.detect(arrays), predictions, strict=True):
        assert torch.equal(a.instances.boxes, b.instances.boxes)
        assert a.features is not None and b.features is not None
        torch.testing.assert_close(a.features.maps[0], b.features.maps[0])


class TestInput:
    def test_like_detectron2s_own_predictor(self):
        model = make()
        images = [cases.random_scene(97, 131), cases.random_scene(64, 151, seed=1)]
        given = Detectron2Adapter(model, min_size=128, max_size=160).detect(images)
        assert len(given[0]) > 0
        for found, expected in zip(given, HOST.run(model, images), strict=True):
            torch.testing.assert_close(found.instances.boxes, expected["boxes"])
            assert torch.equal(found.instances.masks, expected["masks"])
            assert found.instances.labels is not None
            assert torch.equal(found.instances.labels, expected["pred_classes"])

    @pytest.mark.parametrize("order", ["BGR", "RGB"])
    def test_the_image_encoder_sees_the_image(self, order: str):
        adapter = Detectron2Adapter(make(config=small_config("INPUT.FORMAT", order)), min_size=200, max_size=400)
        image = cases.position_image(150, 220)
        given = adapter._as_input(image)
        assert given["image"].shape == (3, 200, 293)
        torch.testing.assert_close(adapter.original(given, (150, 220)), image, rtol=0, atol=0.01)

    def test_a_refiner_with_an_image_encoder(self):
        model = make()
        plain = HOST.run(model, HOST.images())
        anything = RefineOptions(keep_if_iou_below=0.0, keep_if_gain_below=-1.0)
        refined = HOST.run(cases.wrapped(adapt(model), Refiner.from_pretrained(), options=anything), HOST.images())
        for before, after in zip(plain, refined, strict=True):
            assert (before["masks"] != after["masks"]).flatten(1).any(dim=1).any()
            assert torch.equal(before["boxes"], after["boxes"])

    def test_instances_that_the_host_drops(self):
        """Its post-processing leaves out boxes without area."""
        model = make()

        def flatten_the_second(head: nn.Module, args: tuple[Any, ...]) -> None:
            args[1][0].pred_boxes.tensor[1, 2] = args[1][0].pred_boxes.tensor[1, 0]

        model.roi_heads.mask_head.register_forward_pre_hook(flatten_the_second)
        given = as_input(cases.random_scene(97, 131))
        with torch.no_grad():
            (raw,) = model.inference([given], do_postprocess=False)
        (prediction,) = adapt(model).detect([given])
        assert prediction.indices.tolist() == [0, *range(2, len(raw))]
        assert prediction.box_probs is not None and prediction.instances.scores is not None
        assert torch.equal(raw.scores[prediction.indices], prediction.instances.scores)
        assert torch.equal(raw.pred_masks[prediction.indices, 0], prediction.box_probs)

    def test_no_detections(self):
        model = make()
        model.roi_heads.box_predictor.test_score_thresh = 1.0
        model = cases.wrapped(adapt(model), cases.eventful_refiner(adapt(model)))
        (found,) = HOST.run(model, [cases.random_scene(97, 131)])
        assert found["masks"].shape == (0, 97, 131) and found["masks"].dtype == torch.bool
        assert adapt(model.detector).detect([]) == []

    @pytest.mark.parametrize(
        ("architecture", "mask_on"), [("ProposalNetwork", True), ("GeneralizedRCNN", False), ("RetinaNet", True)]
    )
    def test_models_without_masks(self, architecture: str, mask_on: bool):
        retina = ("MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]) if architecture == "RetinaNet" else ()
        config = small_config("MODEL.META_ARCHITECTURE", architecture, "MODEL.MASK_ON", mask_on, *retina)
        with pytest.raises(InvalidInputError, match=rf"mask head .MODEL.MASK_ON., got {architecture}: refine masks"):
            adapt(build_model(config))

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(3, 50, 50), "expected a list of images, got Tensor"),
            ([{"pixels": 0}], "expected \"image\" in each of Detectron2's dicts, got the keys 'pixels'"),
            ([as_input(torch.zeros(3, 50, 50)), torch.zeros(3, 50, 50)], "expected an image as a path, .* got dict"),
        ],
    )
    def test_other_images(self, images: Any, message: str):
        with pytest.raises(InvalidInputError, match=message):
            adapt(make()).detect(images)

    def test_other_channel_orders(self):
        model = make()
        model.input_format = "YUV-BT.601"
        with pytest.raises(InvalidInputError, match="of input format"):
            adapt(model).detect([torch.zeros(3, 50, 50)])
        assert len(adapt(model).detect(HOST.images())) == 3


def point_rend() -> Any:
    """A PointRend, whose mask head gives 224×224; it finds everything inside of every box."""
    module = import_module("detectron2.projects.point_rend")
    config = small_config()
    module.add_pointrend_config(config)
    config.merge_from_list(
        [
            *("MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""),
            *("MODEL.ROI_MASK_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.NUM_FC", 1),
            *("MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", True, "MODEL.POINT_HEAD.NUM_CLASSES", 2),
            *("MODEL.POINT_HEAD.FC_DIM", 16, "MODEL.POINT_HEAD.NUM_FC", 1),
        ]
    )
    model = make(config=config)
    model.roi_heads.mask_head.point_head.predictor.bias.data.fill_(0.5)
    return model


def c4() -> Any:
    """A detector without FPN, whose heads share one map of stride 16."""
    return make(
        config=small_config(
            *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
            *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64, 96, 128]]),
            *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 28, "MODEL.ROI_MASK_HEAD.NUM_CONV", 0),
        )
    )


def cascade() -> Any:
    """Three box heads, one after the other, with boxes of no class."""
    return make(
        config=small_config("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    )


@pytest.mark.parametrize(
    ("build", "strides", "side"),
    [(point_rend, (4, 8, 16, 32), 224), (c4, (16,), 28), (cascade, (4, 8, 16, 32), 28)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_heads(build: Callable[[], Any], strides: tuple[int, ...], side: int):
    """They are refined, and trained jointly."""
    model = build()
    adapter = adapt(model)
    assert adapter.strides == strides
    plain, predictions = HOST.run(model, HOST.images()), adapter.detect(HOST.images())
    eraser = cases.find_everywhere(cases.refiner_for(adapter))
    eraser.model.transfiner.pixel_decoder.layers[2].bias.data.fill_(-30.0)  # type: ignore[union-attr]
    erased = HOST.run(cases.wrapped(adapter, eraser), HOST.images())
    for before, after, prediction in zip(plain, erased, predictions, strict=True):
        assert prediction.box_probs is not None and prediction.box_probs.shape == (len(before["masks"]), side, side)
        assert torch.equal(prediction.instances.masks, before["masks"])
        assert before["masks"].flatten(1).any(dim=1).all() and not after["masks"].any()
    joint = cases.wrapped(adapter, cases.refiner_for(adapter), detach_coarse=False).train()
    found = losses(joint, batch(polygons=False))  # which PointRend does not take
    (found["loss_refine"] + found["loss_incoherence"]).backward()
    assert all(bool(torch.isfinite(value)) for value in found.values())
    assert any(p.grad is not None and bool(p.grad.any()) for p in adapter.backbone.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.roi_heads.mask_head.parameters())


def test_whatever_else_a_host_returns_is_kept():
    """Panoptic FPN gives a semantic and a panoptic segmentation too."""
    changes = ("MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 16)
    model = make(config=small_config(*changes, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.SEM_SEG_HEAD.NORM", "BN"))
    joint = cases.wrapped(adapt(model), cases.eventful_refiner(adapt(model)))
    with torch.no_grad():
        (plain,), (refined,) = (host(HOST.images()[:1]) for host in (model, joint))
    assert set(plain) == set(refined) == {"instances", "sem_seg", "panoptic_seg"}
    assert torch.equal(plain["sem_seg"], refined["sem_seg"])
    assert torch.equal(plain["panoptic_seg"][0], refined["panoptic_seg"][0])
    assert (plain["instances"].pred_masks != refined["instances"].pred_masks).any()


def seen_by_losses(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """What a training step gives to the refinement losses."""
    adapter = adapt(model)
    joint = cases.wrapped(adapter, cases.refiner_for(adapter), **options).train()
    seen: dict[str, Any] = {}
    losses_of = joint.refinement_losses

    def spy(*args: Any) -> Any:
        seen.update(zip(("pyramid", "rois", "image", "coarse", "truth"), args, strict=True))
        return losses_of(*args)

    monkeypatch.setattr(joint, "refinement_losses", spy)
    losses(joint)
    return seen


class TestTraining:
    def test_what_the_losses_see(self, monkeypatch: pytest.MonkeyPatch):
        """RoIs, coarse masks of the right class and true masks, in one frame, of as many proposals as are allowed."""
        model = make(config=small_config("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512))
        learnt = model.roi_heads.mask_head.predictor.learnt
        learnt.weight.data.zero_()
        learnt.bias.data.copy_(torch.tensor([0.0, -50.0]))  # nothing but for the first class
        seen = seen_by_losses(model, monkeypatch, max_rois=5)
        assert torch.bincount(seen["image"]).tolist() == [5, 5]
        seen = seen_by_losses(model, monkeypatch, max_rois=512)
        count, side = len(seen["rois"]), seen["coarse"].shape[1]
        assert seen["coarse"].shape == (count, side, side) and seen["truth"].shape == (count, 2 * side, 2 * side)
        found = set()
        for roi, image, coarse, truth in zip(seen["rois"], seen["image"], seen["coarse"], seen["truth"], strict=True):
            # Detectron2 adds the true boxes to its proposals: there the truth is a disc that fills the RoI.
            given = batch()[image]["instances"]
            for label in given.gt_classes[(given.gt_boxes.tensor == roi).all(dim=1)].tolist():
                found.add(label)
                assert abs(float(truth.float().mean()) - np.pi / 4) < 0.02
                area = np.pi * (11 / 28) ** 2 if label == 0 else 0
                assert abs(float((coarse >= 0.5).float().mean()) - area) < 0.02
        assert found == {0, 1}

    def test_coarse_masks_are_those_of_inference(self, monkeypatch: pytest.MonkeyPatch):
        model = make(config=small_config("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True))
        model.roi_heads.mask_head.predictor.learnt.weight.data.mul_(1000)
        seen = seen_by_losses(model, monkeypatch, max_rois=5)
        features = dict(zip(("p2", "p3", "p4", "p5"), seen["pyramid"].maps, strict=True))
        known = []
        for index in range(2):
            rois = seen["rois"][seen["image"] == index]
            labels = torch.zeros(len(rois), dtype=torch.long)
            known.append(structures.Instances((97, 131), pred_boxes=structures.Boxes(rois), pred_classes=labels))
        with torch.no_grad():
            found = model.eval().roi_heads.forward_with_given_boxes(features, known)
        probs = torch.cat([instances.pred_masks for instances in found])[:, 0]
        expected = crop_box_masks(probs, seen["rois"], seen["rois"], seen["coarse"].shape[1])
        assert float(expected.std(dim=0).mean()) > 0.01  # each has its own
        torch.testing.assert_close(seen["coarse"], expected, atol=1e-4, rtol=0)

    def test_coarse_masks_are_detached_unless_asked_for(self):
        model = make()
        adapter = adapt(model)
        joint = cases.wrapped(adapter, cases.refiner_for(adapter)).train()
        found = losses(joint)
        (found["loss_refine"] + found["loss_incoherence"]).backward()
        assert not any(p.grad is not None and bool(p.grad.any()) for p in model.roi_heads.mask_head.parameters())

    def test_an_image_without_instances(self):
        adapter = adapt(make())
        model = cases.wrapped(adapter, cases.refiner_for(adapter)).train()
        empty = training_input(torch.zeros(0, 97, 131, dtype=torch.bool), [])
        for inputs in ([batch()[0], empty], [empty]):
            found = losses(model, inputs)
            assert all(bool(torch.isfinite(value)) for value in found.values())
            cases.total(found).backward()

    def test_detectron2s_own_trainer(self, tmp_path: Path):
        """Built from a config, started from a detector's checkpoint, trained, saved, and loaded by its checkpointer."""
        engine, checkpoint = import_module("detectron2.engine"), import_module("detectron2.checkpoint")
        config = small_config()
        Detectron2 = import_module("transfiner_refine.adapters.detectron2")
        Detectron2.add_transfiner_config(config)
        small = "{depth: 2, channels: 16, layers: 1, heads: 2, ffn_channels: 16}"
        path = tmp_path / "config.yaml"
        keys = f"{{META_ARCHITECTURE: TransfinerRCNN, TRANSFINER: {{REFINER: {small}, MAX_ROIS: 8}}}}"
        path.write_text(f"VERSION: 2\nMODEL: {keys}")
        config.merge_from_file(str(path))
        model = build_model(config)
        assert model.joint.max_rois == 8 and model.refiner_model.config.channels == 16

        detector = build_model(small_config())
        torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
        checkpoint.DetectionCheckpointer(model).load(str(tmp_path / "detector.pth"))
        for name, value in detector.state_dict().items():
            assert torch.equal(model.detector.state_dict()[name], value)

        of_three = {**detector.state_dict(), "roi_heads.mask_head.predictor.bias": torch.zeros(3)}
        unused = model.load_state_dict(of_three, strict=False).unexpected_keys
        assert unused == ["roi_heads.mask_head.predictor.bias"]

        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = import_module("detectron2.solver").build_optimizer(config, model)
        trainer = engine.SimpleTrainer(model, [batch()] * 2, optimizer)
        trainer.train(0, 2)
        history = trainer.storage.histories()
        assert {"loss_mask", "loss_cls", "loss_rpn_cls", "loss_refine", "loss_incoherence"} <= set(history)
        after = model.state_dict()
        moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
        assert moved == {"detector", "refiner_model"}

        checkpoint.DetectionCheckpointer(model, str(tmp_path)).save("trained")
        again = build_model(config)
        checkpoint.DetectionCheckpointer(again).load(str(tmp_path / "trained.pth"))
        for a, b in zip(HOST.run(model.eval(), HOST.images()), HOST.run(again.eval(), HOST.images()), strict=True):
            assert torch.equal(a["masks"], b["masks"]) and torch.equal(a["scores"], b["scores"])
