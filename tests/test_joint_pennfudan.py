"""The benchmarks of joint training, on a set that is made up."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benchmark_cases import run
from PIL import Image
from small_models import discs

from transfiner_refine.functional.rle import encode

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed: pip install faster-coco-eval")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four photos of discs, as Penn-Fudan is kept."""
    folder = tmp_path / "data" / "pennfudan"
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, 5):
        masks = discs(96, 128, [(20.0 * number, 40.0, 18.0), (64.0, 70.0, 15.0)]).numpy()
        name = f"{number}.png"
        Image.fromarray((40 + 160 * masks.max(axis=0)).astype(np.uint8)).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "height": 96, "width": 128})
        for rle in encode(masks):
            annotations.append({"id": len(annotations), "image_id": number, "category_id": 1, "segmentation": rle})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder.parent


@pytest.mark.parametrize("name", ["joint_pennfudan", "joint_pennfudan_queries"])
def test_a_tiny_run(name: str, benchmark: Callable[[str], ModuleType], data: Path, tmp_path: Path):
    if name == "joint_pennfudan_queries":
        pytest.importorskip("transformers", minversion="5.4", reason="transformers is not installed")
        pytest.importorskip("scipy", reason="scipy, with which transformers matches queries, is not installed")
    module = benchmark(name)
    folder = tmp_path / "runs"
    tiny = ["--side", "64", "--seeds", "1", "--train-photos", "2", "--data", str(data)]
    result = run(module, str(folder), *tiny, "--steps", "1")
    assert result.exit_code == 0, result.output
    runs = json.loads((folder / "figures.json").read_text())["runs"]
    assert set(runs) == {"0 alone", "0 joint"} and runs["0 alone"]["refined_ap"] is None
    assert runs["0 joint"]["refined_boundary_ap"] is not None
    assert (folder / "seed_0" / "detector.safetensors").exists()

    again = run(module, str(folder), *tiny, "--steps", "1")
    assert again.exit_code == 0 and "alone:" not in again.output, "what is known was run again"
    other = run(module, str(folder), *tiny, "--steps", "2")
    assert other.exit_code == 1 and "expected the budget of" in other.output
