"""What the tests of the bulk command share: photos, coarse masks, a small refiner, and the command in a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import encoder_config

from transfiner_refine import RefineOptions, cli
from transfiner_refine.functional import rle
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner

SIZE = 96, 128  # H, W of the photos
OPTIONS = RefineOptions(keep_if_iou_below=0, keep_if_gain_below=-1)  # all refinements count, even of a random model
Run = Callable[[list[str]], tuple[int, str, str]]
MODULE = "from transfiner_refine.cli import main; main()"


def save_refiner(folder: Path) -> Path:
    """A small refiner that changes masks: every cell is incoherent, and its decoder's last layer is random."""
    torch.manual_seed(0)
    model = RefinerModel(encoder_config(channels=8, layers=1, heads=1, ffn_channels=8, depth=1))
    with torch.no_grad():
        detector = model.transfiner.incoherence_detector
        detector.classifier.weight.zero_()  # type: ignore[operator]
        detector.classifier.bias.fill_(5)  # type: ignore[operator]
        model.transfiner.pixel_decoder.layers[2].weight.normal_(std=3)  # type: ignore[operator]
    return Refiner(model).save_pretrained(folder)


def make_photos(folder: Path, count: int) -> list[str]:
    """Small noisy photos, ``000.png`` and so on."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{number:03}.png" for number in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / name)
    return names


def disc(x: float, y: float, radius: float) -> np.ndarray:
    """``(H, W)`` bool."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def coarse_masks(number: int) -> list[np.ndarray]:
    """Two masks of photo ``number``, one of them small by COCO's measure."""
    return [disc(60 + number % 7, 50, 30), disc(20, 30 + number % 5, 10)]


def make_results(path: Path, count: int) -> list[dict[str, Any]]:
    """Results of photos 0 to ``count``, the entries of each apart: all first masks, then all second ones."""
    results = []
    for which in range(2):
        for number in range(count):
            (code,) = rle.encode(coarse_masks(number)[which][None])
            results.append({"image_id": number, "segmentation": code, "score": 0.5, "note": f"ä{number}-{which}"})
    path.write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    return results


def arguments(folder: Path, **options: object) -> list[str]:
    """The command line of the job in ``folder``; an option of None is left out, one of True is a flag."""
    given: dict[str, object] = {
        "images": folder / "photos",
        "predictions": folder / "dets.json",
        "output": folder / "out.json",
        "model": folder / "model",
        "threads": 1,
        "shard_images": 2,
        "keep_if_iou_below": OPTIONS.keep_if_iou_below,
        "keep_if_gain_below": OPTIONS.keep_if_gain_below,
        **options,
    }
    words = ["coco"]
    for name, value in given.items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str]
) -> tuple[int, str, str]:
    """Run the command in this process; returns the exit code, standard output and standard error."""
    monkeypatch.setattr("sys.argv", ["transfiner-refine", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capfd.readouterr()
    return int(end.value.code or 0), out, err


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """Run the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", MODULE, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
