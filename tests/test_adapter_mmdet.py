"""MMDetection's detectors behind their adapter: Mask R-CNN, and with it whatever else has masks."""

from importlib import import_module
from pathlib import Path
from typing import Any

import adapter_cases as cases
import pytest
import torch
from adapter_cases import Host
from mmcv_ext import (
    CIRCLES,
    SMALL,
    assert_equal,
    batch_of,
    bgr,
    build,
    call,
    import_mmdet,
    losses,
    results,
    small_config,
    training_batch,
)
from small_models import encoder_config, eventful_model
from torch import Tensor, nn
from torchvision.ops import box_iou

from transfiner_refine import InvalidInputError, Refiner
from transfiner_refine.adapters import adapt

import_mmdet()
apis = import_module("mmdet.apis")
DetDataSample = import_module("mmdet.structures").DetDataSample


def make(seed: int = 0) -> nn.Module:
    return build(small_config(), seed)


HOST = Host(make, call, results, losses)


def test_a_refiner_that_changes_nothing():
    cases.check_identity(HOST)


def test_every_instance_is_refined():
    cases.check_every_instance_is_refined(HOST)


def test_batch_equals_loop():
    cases.check_batch_equals_loop(HOST, alike=((96, 128), (94, 127)))


def test_detach():
    cases.check_detach(HOST)


def test_threads():
    cases.check_threads(HOST)


def test_training_on_the_image_is_refused():
    cases.check_training_on_the_image_is_refused(HOST)


def test_listening_leaves_what_others_put_in_place():
    head: Any = make().roi_head.mask_head  # type: ignore[union-attr]
    listening: Any = import_module("transfiner_refine.adapters.mmdet")._listening
    own = head.predict_by_feat

    def mine(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    with listening(head, "predict_by_feat"):
        head.predict_by_feat = mine
    assert head.predict_by_feat is mine
    first, second = listening(head, "predict_by_feat"), listening(head, "predict_by_feat")
    arguments: dict[str, Any] = {"mask_preds": (), "results_list": [], "batch_img_metas": [], "rcnn_test_cfg": None}
    one = first.__enter__()
    two = second.__enter__()
    head.predict_by_feat(**arguments)
    first.__exit__(None, None, None)
    head.predict_by_feat(**arguments)
    second.__exit__(None, None, None)
    assert (len(one), len(two)) == (1, 2) and head.predict_by_feat is mine


def test_joint_training():
    cases.check_joint_training(HOST)


def test_scopes():
    cases.check_scopes(HOST)


def test_saved_model(tmp_path: Path):
    cases.check_saved_model(HOST, tmp_path / "model")


class Pooled(nn.Module):
    """In place of the neck: averages of the network's input, with the normalisation undone."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.before, self.channels = detector.data_preprocessor, detector.neck.out_channels

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        pixels = (pixels * self.before.std + self.before.mean) / 255
        return tuple(cases.pooled(pixels, (4, 8, 16, 32, 64), self.channels))


@pytest.mark.parametrize("scale", [(192, 128), (300, 280)])
def test_features_lie_where_they_were_painted(scale: tuple[int, int]):
    config = small_config()
    config.test_dataloader.dataset.pipeline[1].scale = scale
    detector = build(config)
    detector.neck, detector.backbone = Pooled(detector), nn.Identity()
    images = [cases.position_image(height, width) for height, width in (*cases.SIZES, (210, 90))]
    adapter: Any = adapt(detector)
    cases.check_pattern(adapter.detect(images), tolerance=0.7)
    batch = detector.data_preprocessor(batch_of(detector, images), False)
    with torch.no_grad():
        in_network_pixels = adapter.predict(batch["inputs"], batch["data_samples"], rescale=False)
    assert in_network_pixels[0].instances.image_size == batch["data_samples"][0].img_shape
    cases.check_pattern(in_network_pixels, tolerance=2.1)


def test_coarse_instances_are_the_hosts_own():
    detector, images = make(), HOST.images()
    plain = call(detector, images)
    for given in (batch_of(detector, images), images, [bgr(image)[:, :, ::-1] for image in images]):
        predictions = adapt(detector).detect(given)
        for prediction, sample in zip(predictions, plain, strict=True):
            found, own = prediction.instances, sample.pred_instances
            assert found.image_size == sample.ori_shape
            for a, b in ((found.boxes, own.bboxes), (found.scores, own.scores), (found.labels, own.labels)):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert torch.equal(found.masks, own.masks)
            assert torch.equal(prediction.host.pred_instances.masks, own.masks)
            assert prediction.indices.tolist() == [0, 1]
    assert "pred_instances" not in batch_of(detector, images)["data_samples"][0]


def assert_box_probs(prediction: Any) -> None:
    """They are those of the label: pasted by the host they give its masks."""
    paste = import_module("mmdet.models.roi_heads.mask_heads.fcn_mask_head")._do_paste_mask
    boxes, size = prediction.instances.boxes, prediction.instances.image_size
    assert prediction.box_probs.shape == (2, 28, 28) and prediction.box_probs.dtype == torch.float32
    pasted, _ = paste(prediction.box_probs[:, None], boxes, *size, skip_empty=False)
    assert torch.equal(pasted >= 0.5, prediction.instances.masks) and prediction.instances.masks.any(dim=(1, 2)).all()


def test_box_probabilities():
    for prediction in adapt(make()).detect(HOST.images()):
        assert_box_probs(prediction)


def test_a_batch_that_is_detected_is_not_written_to():
    detector = make()
    batch = batch_of(detector, HOST.images())
    before = batch["inputs"][0].clone()
    adapt(detector).detect(batch)
    assert torch.equal(batch["inputs"][0], before)
    assert all("pred_instances" not in sample for sample in batch["data_samples"])


def test_inference_detector():
    """The call of MMDetection's own tutorial, on one image and on a list."""
    detector, image = make(), HOST.images()[0]
    adapter = adapt(detector)
    plain = apis.inference_detector(detector, bgr(image))
    same = apis.inference_detector(cases.wrapped(adapter, cases.refiner_for(adapter)), bgr(image))
    assert type(same) is DetDataSample and same.ori_shape == (97, 131)
    assert torch.equal(same.pred_instances.masks, plain.pred_instances.masks)
    refined = apis.inference_detector(
        cases.wrapped(adapter, cases.eventful_refiner(adapter, depth=1)), [bgr(image)] * 2
    )
    assert len(refined) == 2 and (refined[1].pred_instances.masks != plain.pred_instances.masks).any()


def test_masks_in_network_pixels():
    """``rescale=False``, as test-time augmentation asks for."""
    detector: Any = make()
    adapter = adapt(detector)
    model: Any = cases.wrapped(adapter, cases.eventful_refiner(adapter, depth=1))
    batch = detector.data_preprocessor(batch_of(detector, HOST.images()), False)
    with torch.no_grad():
        plain = [s.new() for s in detector.predict(batch["inputs"], batch["data_samples"], rescale=False)]
        refined = model.predict(batch["inputs"], batch["data_samples"], rescale=False)
        original = call(model, HOST.images())
    for before, after, small in zip(plain, refined, original, strict=True):
        assert torch.equal(before.pred_instances.bboxes, after.pred_instances.bboxes)
        masks = after.pred_instances.masks
        assert masks.shape[1:] == after.img_shape and (masks != before.pred_instances.masks).any(dim=(1, 2)).all()
        resized = nn.functional.interpolate(masks[None].float(), small.ori_shape, mode="bilinear", antialias=True)[0]
        assert cases.share_different(resized, small.pred_instances.masks) < 0.02


def image_refiner() -> Refiner:
    """A refiner with an image encoder, of random weights, that changes what it can."""
    return Refiner(eventful_model(encoder_config(depth=1)))


def test_a_refiner_on_the_image():
    """It sees what the network saw, in the original size and in RGB."""
    detector: Any = make()
    adapter: Any = adapt(detector)
    images = HOST.images()
    batch = detector.data_preprocessor(batch_of(detector, images), False)
    seen = adapter.images(batch["inputs"], batch["data_samples"])
    assert [image.shape[1:] for image in seen] == list(cases.SIZES)
    # Resized there and back, the noise of these images is blurred.
    assert all(float((a - b).abs().mean()) < 0.05 for a, b in zip(seen, images, strict=True))

    refiner, plain = image_refiner(), call(detector, images)
    expected = [
        refiner.refine(image, boxes=p.instances.boxes, masks=p.box_probs, mask_frame="box", options=cases.LEFT_ALONE)
        for image, p in zip(seen, adapter.detect(images), strict=True)
    ]
    refined = call(cases.wrapped(adapter, refiner), images)
    for one, sample, before in zip(expected, refined, plain, strict=True):
        assert (sample.pred_instances.masks != before.pred_instances.masks).any(dim=(1, 2)).all()
        assert cases.share_different(one.masks, sample.pred_instances.masks) < 2e-3


@pytest.mark.parametrize("flipped", [True, False])
def test_colours_are_rgb_again(flipped: bool):
    colours = torch.tensor([0.9, 0.5, 0.1])[:, None, None].expand(3, 60, 80)
    detector = build(small_config(data_preprocessor={"bgr_to_rgb": flipped}))
    batch = detector.data_preprocessor(batch_of(detector, [colours]), False)
    adapter: Any = adapt(detector)
    (seen,) = adapter.images(batch["inputs"], batch["data_samples"])
    torch.testing.assert_close(seen, colours, rtol=0, atol=1 / 255)


def test_no_instance():
    detector = make()
    detector.roi_head.test_cfg.score_thr = 1.0  # type: ignore[union-attr]
    adapter = adapt(detector)
    model = cases.wrapped(adapter, cases.eventful_refiner(adapter, depth=1))
    for result, size in zip(HOST.run(model, HOST.images()), cases.SIZES, strict=True):
        assert result["masks"].shape == (0, *size) and result["masks"].dtype == torch.bool
    assert [len(prediction) for prediction in adapter.detect(HOST.images())] == [0, 0, 0]
    assert adapter.detect([]) == []


def test_an_image_without_instance_in_a_batch():
    detector: Any = make()
    adapter = adapt(detector)
    scores = torch.cat([p.instances.scores for p in adapter.detect(HOST.images()) if p.instances.scores is not None])
    detector.roi_head.test_cfg.score_thr = float(scores.sort().values[-2])
    model = cases.wrapped(adapter, cases.eventful_refiner(adapter, depth=1))
    counts = [len(result["masks"]) for result in HOST.run(model, HOST.images())]
    assert sorted(counts) == [0, 0, 1]


def test_training_sees_the_true_masks_where_they_are(monkeypatch: pytest.MonkeyPatch):
    """The RoIs, true masks and features of a padded batch, and no more RoIs than were asked for."""
    detector: Any = make().train()
    logits = detector.roi_head.mask_head.conv_logits
    logits.weight.data.zero_()
    logits.bias.data.copy_(torch.tensor([2.0, -2.0, 0.0]))  # of the first disc's class, the second's, and none
    adapter = adapt(detector)
    model: Any = cases.wrapped(adapter, cases.refiner_for(adapter, box_margin=0.1), max_rois=6).train()
    batch = detector.data_preprocessor(training_batch((1, 2)), True)
    seen: list[Any] = []
    monkeypatch.setattr(model, "refinement_losses", lambda *args: seen.append(args) or {})
    with torch.no_grad():
        model(**batch, mode="loss")
        expected = detector.extract_feat(batch["inputs"])
    ((pyramid, rois, image, coarse, truth),) = seen
    assert pyramid.strides == (4, 8, 16, 32) and pyramid.scale is None and pyramid.source == "mmdet:MaskRCNN"
    assert all(torch.equal(a, b) for a, b in zip(pyramid.maps, expected, strict=False))

    discs = torch.tensor([[x - r, y - r, x + r, y + r] for x, y, r in CIRCLES])
    disc = torch.where(image == 1, box_iou(rois, discs).argmax(dim=1), 0)  # the first image has the first disc alone
    assert image.bincount().tolist() == [6, 6] and set(disc[6:].tolist()) == {0, 1}
    side = 2 * model.side
    assert coarse.shape == (12, side // 2, side // 2) and truth.shape == (12, side, side)
    torch.testing.assert_close(coarse[:, side // 4, side // 4], torch.tensor([2.0, -2.0]).sigmoid()[disc])
    step = (torch.arange(side) + 0.5) / side
    for roi, index, found in zip(rois, disc.tolist(), truth, strict=True):
        x, y = roi[0] + step * (roi[2] - roi[0]), roi[1] + step * (roi[3] - roi[1])
        cx, cy, r = CIRCLES[index]
        inside = (x[None] - cx) ** 2 + (y[:, None] - cy) ** 2 <= r * r
        assert float((inside ^ found).float().mean()) < 0.02


@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_training_on_images_without_instances(counts: tuple[int, int]):
    adapter = adapt(make())
    model = cases.wrapped(adapter, cases.refiner_for(adapter)).train()
    found = losses(model, counts)
    assert {"loss_refine", "loss_incoherence"} <= found.keys()
    cases.total(found).backward()
    assert all(bool(torch.isfinite(value)) for value in found.values())
    assert all(parameter.grad is not None for parameter in model.refiner_model.parameters())


def test_losses_reach_the_coarse_head_if_they_may():
    for detached in (True, False):
        adapter: Any = adapt(make())
        model = cases.wrapped(adapter, cases.eventful_refiner(adapter, depth=1), detach_coarse=detached).train()
        found = losses(model)
        (found["loss_refine"] + found["loss_incoherence"]).backward()
        gradient = adapter.mask_head.conv_logits.weight.grad
        assert (gradient is None or not gradient.any()) == detached


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # MMDetection's
def test_a_cascade_of_mask_heads():
    """Of which the result averages all stages, and the last stage's losses count."""
    config = small_config("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py")
    heads = [{**head, **SMALL["roi_head"]["bbox_head"]} for head in config.model.roi_head.bbox_head]
    config.merge_from_dict({"model": {**SMALL, "roi_head": {**SMALL["roi_head"], "bbox_head": heads}, "train_cfg": {}}})
    detector = build(config)
    adapter = adapt(detector)
    plain, model = HOST.run(detector, HOST.images()), cases.wrapped(adapter, cases.refiner_for(adapter))
    assert_equal(HOST.run(model, HOST.images()), plain)
    for prediction in adapter.detect(HOST.images()):
        assert_box_probs(prediction)
    model.train()
    found = losses(model)
    assert {"s2.loss_mask", "loss_refine", "loss_incoherence"} <= found.keys()
    found["loss_refine"].backward()


@pytest.mark.filterwarnings("ignore:DeprecationWarning. pos_bboxes:UserWarning")  # MMDetection's
def test_pointrend_is_trained_on_the_masks_of_inference(monkeypatch: pytest.MonkeyPatch):
    """Its mask head alone gives 7×7 of them, which its point head makes 224×224."""
    name = "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py"
    wide, classes = {"out_channels": 16}, {"num_classes": 3}
    heads = {
        "bbox_roi_extractor": wide,
        "mask_roi_extractor": wide,
        "bbox_head": {"in_channels": 16, "fc_out_channels": 32, **classes},
        "mask_head": {"in_channels": 16, "conv_out_channels": 16, "fc_out_channels": 32, **classes},
        "point_head": {"in_channels": 16, "fc_channels": 16, **classes},
    }
    detector = build(small_config(name, **{**SMALL, "roi_head": heads}))
    adapter = adapt(detector)
    sides = {prediction.box_probs.shape[-1] for prediction in adapter.detect(HOST.images())}  # type: ignore[union-attr]
    model: Any = cases.wrapped(adapter, cases.refiner_for(adapter)).train()
    found = losses(model)
    assert {"loss_mask", "loss_point", "loss_refine", "loss_incoherence"} <= found.keys()
    cases.total(found).backward()
    assert detector.training and detector.roi_head.point_head.training

    given: list[Tensor] = []
    module = "transfiner_refine.adapters.mmdet.crop_box_masks"
    crop = import_module("transfiner_refine.functional.paste").crop_box_masks
    monkeypatch.setattr(module, lambda probs, *rest: given.append(probs) or crop(probs, *rest))
    losses(model)
    assert sides == {given[0].shape[-1]} == {224} and not given[0].requires_grad
    assert {"loss_refine", "loss_incoherence"} <= losses(model, (2, 0)).keys()


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # MMDetection's
def test_a_detector_without_boxes_of_its_own():
    """SOLOv2 has masks alone: it is refined on the image, in the boxes of its masks."""
    head = {"num_classes": 3, "in_channels": 16, "feat_channels": 32, "stacked_convs": 1, "num_grids": [8, 6, 4, 4, 4]}
    head["mask_feature_head"] = {"feat_channels": 32, "out_channels": 32}
    found = {"score_thr": 0.0, "filter_thr": 0.0, "max_per_img": 3}
    adapter = adapt(build(small_config("solov2/solov2_r50_fpn_1x_coco.py", mask_head=head, test_cfg=found)))
    (prediction,) = adapter.detect(HOST.images()[:1])
    assert prediction.features is None and prediction.box_probs is None
    assert len(prediction) and (prediction.instances.boxes[:, 2:] > prediction.instances.boxes[:, :2]).all()
    refined = HOST.run(cases.wrapped(adapter, image_refiner()), HOST.images()[:1])[0]["masks"]
    assert refined.shape == prediction.instances.masks.shape and (refined != prediction.instances.masks).any()
    with pytest.raises(InvalidInputError, match=r"expected a detector with a RoI head.*got 'mmdet:SOLOv2'"):
        adapter.config()
    with pytest.raises(InvalidInputError, match="expected a detector with a RoI head"):
        losses(adapter.with_refiner(image_refiner()))


def test_a_detector_without_masks():
    config = small_config()
    config.model.roi_head.mask_head = config.model.roi_head.mask_roi_extractor = None
    with pytest.raises(InvalidInputError, match="expected a detector with a mask head, got MaskRCNN without"):
        adapt(build(config))
    head = {"in_channels": 16, "feat_channels": 16, "stacked_convs": 1}
    config = small_config("retinanet/retinanet_r50_fpn_1x_coco.py", bbox_head=head)
    with pytest.raises(InvalidInputError, match=r"gives masks, got 'mmdet:RetinaNet', which gives \['bboxes'"):
        adapt(build(config)).detect(HOST.images()[:1])


def test_what_cannot_be_used():
    adapter: Any = adapt(make())
    with pytest.raises(InvalidInputError, match="expected an MMDetection detector, got Linear"):
        type(adapter)(nn.Linear(1, 1))
    del adapter.model.cfg
    with pytest.raises(InvalidInputError, match="expected a detector with its config"):
        adapter.detect(HOST.images())
