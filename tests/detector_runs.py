"""A tiny Mask R-CNN of torchvision, a data set of discs and runs on them: ``python detector_runs.py OPTION...``.

The detector goes by the name ``maskrcnn_tiny``, as if torchvision had it.
"""

import json
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import discs, small_config
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from transfiner_refine import cli
from transfiner_refine.data.annotated import DataFiles
from transfiner_refine.functional.rle import encode
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel

WIDTH = 16
NAME = "maskrcnn_tiny"
SIZE = (64, 80)
OBJECTS = ([(3, 30, 32, 20)], [(3, 24, 30, 16), (7, 60, 34, 12)], [(7, 40, 32, 24)], [], [(3, 44, 30, 18)])
"""Category, centre and radius of the discs on each photo."""


class TinyBackbone(nn.Module):
    """Four stages of one convolution and a batch norm each, and an FPN."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        stages = [(3, 4), (WIDTH, 2), (WIDTH, 2), (WIDTH, 2)]
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, WIDTH, 5, stride, 2), nn.BatchNorm2d(WIDTH), nn.ReLU())
            for inputs, stride in stages
        )
        self.fpn = FeaturePyramidNetwork([WIDTH] * 4, WIDTH, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = OrderedDict()
        for name, stage in enumerate(self.body):
            stages[str(name)] = x = stage(x)
        return self.fpn(stages)


def maskrcnn_tiny(*, weights: Any = None, weights_backbone: Any = None, num_classes: int = 91, **options: Any):
    """Torchvision's signature; ``weights="DEFAULT"`` gives a detector of COCO's 91 labels without a download."""
    assert weights_backbone is None
    if weights is not None:
        torch.manual_seed(7)
        num_classes = 91
    values: dict[str, Any] = {
        "min_size": 64,
        "max_size": 96,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 5,
        "rpn_pre_nms_top_n_train": 50,
        "rpn_post_nms_top_n_train": 20,
        "rpn_pre_nms_top_n_test": 50,
        "rpn_post_nms_top_n_test": 20,
        "box_batch_size_per_image": 16,
        "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64, 128)), ((1.0,),) * 5),
        "box_head": TwoMLPHead(WIDTH * 49, 32),
        "box_predictor": FastRCNNPredictor(32, num_classes),
        "mask_head": MaskRCNNHeads(WIDTH, (WIDTH,), 1),
        "mask_predictor": MaskRCNNPredictor(WIDTH, WIDTH, num_classes),
    }
    return MaskRCNN(TinyBackbone(), None, **(values | options))


detection.maskrcnn_tiny = maskrcnn_tiny  # type: ignore[attr-defined]


def draw_set(folder: Path) -> DataFiles:
    """Photos of discs of two categories, one of them empty, and a crowd."""
    (folder / "photos").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, objects in enumerate(OBJECTS):
        photo = np.full((*SIZE, 3), (30, 90, 160)) + rng.normal(0, 8, (*SIZE, 3))
        for category, x, y, radius in objects:
            mask = discs(*SIZE, [(x, y, radius)]).numpy()
            photo[mask[0]] = (200, 60, 40) if category == 3 else (60, 200, 40)
            annotations.append({"image_id": number, "category_id": category, "segmentation": encode(mask)[0]})
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / "photos" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
    crowd = {"image_id": 3, "category_id": 3, "iscrowd": 1, "segmentation": encode(np.ones((1, *SIZE), bool))[0]}
    annotations.append(crowd)
    for number, entry in enumerate(annotations, 1):
        entry |= {"id": number, "iscrowd": entry.get("iscrowd", 0)}
    categories = [{"id": 7, "name": "lime"}, {"id": 3, "name": "tomato"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return DataFiles(folder / "photos", folder / "annotations.json")


def save_refiner(folder: Path) -> Path:
    """A small refiner on features of the detector's width."""
    torch.manual_seed(0)
    config = small_config(feature_channels=WIDTH, depth=1, layers=1, feature_source="torchvision:MaskRCNN")
    return save_model(RefinerModel(config), folder, torch.float32)


def options(files: DataFiles, refiner: Path | None, output: Path, **changes: object) -> list[str]:
    """Options of a run of four short steps of two photos."""
    values = {"images": files.images, "annotations": files.annotations, "output": output, "model": refiner}
    values |= {"detector": f"torchvision:{NAME}", "validation-share": 0.25, "steps": 4, "batch-size": 2}
    values |= {"micro-batch": 1, "validate-every": 2, "workers": 0, "max-rois": 4, "learning-rate": 1e-3} | changes
    return [str(part) for name, value in values.items() if value is not None for part in (f"--{name}", value)]


def command(*arguments: str) -> int:
    """Run ``transfiner-refine train``; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["transfiner-refine", "train", *arguments])
        patch.setattr("transfiner_refine.training.metrics.draw_metrics", lambda records: b"")
        cli.main()
    return end.value.code or 0  # type: ignore[return-value]


def start(arguments: list[str], environment: dict[str, str], script: str) -> subprocess.Popen[bytes]:
    """Run the command in a process of its own."""
    return subprocess.Popen([sys.executable, script, *arguments], env=os.environ | environment)


def run_in_two_processes(arguments: list[str], script: str = __file__) -> list[int]:
    """Run the command in two processes that share each batch, over gloo on the loopback interface; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [start(arguments, group | {"RANK": rank, "LOCAL_RANK": rank}, script) for rank in "01"]
    try:
        return [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()


def metrics(directory: Path) -> list[dict[str, float]]:
    """The figures that a run has written."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    raise SystemExit(command(*sys.argv[1:]))
