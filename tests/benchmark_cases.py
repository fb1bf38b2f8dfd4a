"""A set that the tests of the benchmarks draw themselves, and the way they run a benchmark's command."""

import base64
import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from transfiner_refine.functional.rle import encode


def make_disc_set(parent: Path) -> Path:
    """One photo of a bright disc, detected as a polygon-like blob, another object that nobody detected."""
    height, width = 120, 160
    truth = np.zeros((2, height, width), bool)
    y, x = np.mgrid[:height, :width]
    truth[0] = (x - 60) ** 2 + (y - 60) ** 2 < 40**2
    truth[1, 10:30, 120:150] = True
    coarse = truth[:1].copy()
    coarse[0, :, 20:26] = False
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    photo = np.where(truth[0][..., None], (200, 60, 40), (30, 90, 160)) + noise
    folder = parent / "discs"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / "images" / "disc.png")
    annotations = {
        "images": [{"id": 7, "file_name": "disc.png", "height": height, "width": width}],
        "annotations": [{"id": i, "image_id": 7, "segmentation": rle} for i, rle in enumerate(encode(truth))],
    }
    box = coarse[0, 21:100, 20:101].astype(np.uint8) * 255
    soft = cv2.resize(box, (28, 28), interpolation=cv2.INTER_AREA)
    detection = {
        "image_id": 7,
        "bbox": [20, 21, 81, 79],
        "segmentation": encode(coarse)[0],
        "soft28": base64.b64encode(soft.tobytes()).decode(),
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "detections.json").write_text(json.dumps([detection]))
    return folder


def run(module: ModuleType, *arguments: str) -> Result:
    """Run a benchmark's command."""
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, arguments)
