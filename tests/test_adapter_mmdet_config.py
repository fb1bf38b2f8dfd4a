"""MMDetection's configs, runner and checkpoints with a refiner behind the detector."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import adapter_cases as cases
import pytest
import torch
from mmcv_ext import (
    MASK_RCNN,
    SMALL,
    assert_equal,
    build,
    call,
    config_path,
    import_mmdet,
    results,
    small_config,
)
from PIL import Image
from small_models import discs
from torch import Tensor

from transfiner_refine.adapters import adapt
from transfiner_refine.functional.rle import encode

import_mmdet()
apis, runners = import_module("mmdet.apis"), import_module("mmengine.runner")
import_module("transfiner_refine.adapters.mmdet")  # as custom_imports does
MODELS = import_module("mmdet.registry").MODELS
Config = import_module("mmengine.config").Config
CLASSES = ("disc", "square", "cross")
IMAGES = [cases.random_scene(height, width) for height, width in cases.SIZES]


def predicted(model: Any) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return results(call(model.eval(), IMAGES))


def write_data(folder: Path) -> None:
    """Two images of discs and their annotations in the layout of COCO."""
    images, annotations = [], []
    circles = [(60.0, 50.0, 30.0), (120.0, 80.0, 20.0)]
    for index in range(2):
        masks = discs(120, 160, circles)
        Image.fromarray((60 + 120 * masks.any(dim=0).byte()).numpy()).convert("RGB").save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 120, "width": 160})
        for (x, y, r), segmentation in zip(circles, encode(masks.numpy()), strict=True):
            box = [x - r, y - r, 2 * r, 2 * r]
            annotations.append({"id": len(annotations) + 1, "image_id": index, "category_id": 1, "bbox": box})
            annotations[-1].update(area=box[2] * box[3], iscrowd=0, segmentation=segmentation)
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(data))


CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=["transfiner_refine.adapters.mmdet"])
model = dict(
    type="TransfinerDetector",
    detector="MaskRCNN",
    refiner=dict(depth=2, channels=16, layers=1, heads=2, ffn_channels=16, decoder="residual"),
    joint=dict(max_rois=8, options=dict(keep_if_iou_below=0.0), loss=dict(nodes_per_level=[20, 20])),
)
dataset = dict(
    metainfo=dict(classes={classes!r}), data_root={folder!r}, ann_file="annotations.json", data_prefix=dict(img="")
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
val_evaluator = dict(ann_file={annotations!r})
test_dataloader, test_evaluator = val_dataloader, val_evaluator
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=2))
randomness = dict(seed=0)
"""


def runner_config(folder: Path) -> Any:
    """A config file on MMDetection's own Mask R-CNN, with the refiner, made small."""
    write_data(folder)
    annotations = str(folder / "annotations.json")
    text = CONFIG.format(base=str(config_path(MASK_RCNN)), folder=str(folder), annotations=annotations, classes=CLASSES)
    (folder / "config.py").write_text(text)
    config = Config.fromfile(folder / "config.py")
    config.merge_from_dict({"model": SMALL, "work_dir": str(folder / "work")})
    for part in (config.train_dataloader, config.val_dataloader):
        next(step for step in part.dataset.pipeline if step.type == "Resize").scale = (192, 128)
    return config


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning")
def test_a_config_with_mmengines_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train, evaluate, save and load by MMDetection's own means."""
    # What mmengine 0.10 saves beside the weights, torch 2.6 and newer refuse to load without this.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    config = runner_config(tmp_path)
    runner: Any = runners.Runner.from_cfg(config)
    runner.model.init_weights()
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert {"train/loss_mask", "train/loss_refine", "train/loss_incoherence"} <= scalars.keys()
    assert "val/coco/segm_mAP" in scalars
    after = runner.model.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"detector", "refiner_model"}
    assert not torch.equal(before["detector.backbone.conv1.weight"], after["detector.backbone.conv1.weight"])

    runner.model.cfg = config
    saved = str(tmp_path / "work" / "iter_2.pth")
    loaded: Any = apis.init_detector(config, saved, device="cpu")
    assert loaded.dataset_meta["classes"] == CLASSES
    assert_equal(predicted(loaded), predicted(runner.model))


def registered(**changes: Any) -> dict[str, Any]:
    """A model config with a refiner."""
    return {**small_config().model, "type": "TransfinerDetector", "detector": "MaskRCNN", **changes}


def test_a_checkpoint_of_the_detector_alone_fits_the_refined_one(tmp_path: Path):
    detector = build(small_config())
    model = MODELS.build(registered(refiner={"channels": 16, "heads": 2, "decoder": "residual"}))  # changes nothing
    torch.save({"state_dict": detector.state_dict()}, tmp_path / "detector.pth")
    runners.load_checkpoint(model, str(tmp_path / "detector.pth"), strict=False)
    model.cfg = detector.cfg
    assert_equal(predicted(model), predicted(detector))
    model.load_state_dict(model.state_dict())  # its own, strictly


def test_a_saved_model_in_a_config_keeps_its_weights(tmp_path: Path):
    adapter = adapt(build(small_config()))
    model: Any = cases.wrapped(adapter, cases.refiner_for(adapter)).train()
    model.save_pretrained(tmp_path)
    again = MODELS.build(registered(refiner=str(tmp_path)))
    new = MODELS.build(registered(refiner={"channels": 16, "heads": 2}, joint={"train": "heads"}))
    before, built = again.state_dict(), new.detector.state_dict()
    built = {name: value.clone() for name, value in built.items()}
    for each in (again, new):
        each.init_weights()  # as a runner does before it trains
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert any(not torch.equal(value, built[name]) for name, value in new.detector.state_dict().items())
    assert new.joint.train == "heads" and new.refiner_model.config.channels == 16
