"""Every file of examples/ runs as its first line says, and writes what it announces."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import transfiner_refine
from transfiner_refine.functional.rle import decode

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as ``python examples/NAME`` does, in a folder of its own; returns what it printed."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def disc(tmp_path: Path) -> tuple[Path, Path]:
    """A photo of a bright disc, and a mask of it that is off by three pixels."""
    y, x = np.mgrid[:120, :160]
    truth = (x - 80) ** 2 + (y - 60) ** 2 < 40**2
    photo, mask = tmp_path / "in" / "disc.jpg", tmp_path / "in" / "disc" / "object.png"
    mask.parent.mkdir(parents=True)
    Image.fromarray(np.where(truth[..., None], (220, 200, 60), (30, 60, 90)).astype(np.uint8)).save(photo)
    Image.fromarray(np.roll(truth, 3, axis=1).astype(np.uint8) * 255).save(mask)
    return photo, mask


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_refine_photo(run: Run, tmp_path: Path):
    assert "instance 0:" in run("refine_photo.py")
    (given,) = (x for x in json.loads((DEMO / "detections.json").read_text()) if x["image_id"] == 2)
    (refined,) = json.loads((tmp_path / "outputs/refine_photo/refined.json").read_text())
    assert {**refined, "segmentation": 0, "bbox": 0} == {
        **given,
        "segmentation": 0,
        "bbox": 0,
        "score": refined["score"],
    }
    assert refined["bbox"] == pytest.approx(given["bbox"], abs=1e-3)
    assert (decode(refined["segmentation"], (400, 600)) ^ decode(given["segmentation"], (400, 600))).any()
    assert picture(tmp_path / "outputs/refine_photo/before_after.png").shape[2] == 3


def test_refine_masks_only_takes_a_labelling_folder(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    photo, mask = disc
    run("refine_masks_only.py", "--photos", photo.parent, "--masks", mask.parent.parent, "--output", "refined")
    refined = picture(tmp_path / "refined" / "disc" / "object.png")
    assert refined.shape == (120, 160) and set(np.unique(refined)) == {0, 255}
    truth = picture(photo)[..., 0] > 125
    errors = [np.count_nonzero((given > 0) ^ truth) for given in (picture(mask), refined)]
    assert errors[1] < errors[0]


def test_refine_masks_only_makes_a_folder_of_the_bundled_photo(run: Run, tmp_path: Path):
    assert "cup.png" in run("refine_masks_only.py")
    assert (tmp_path / "outputs/refine_masks_only/refined/coffee/cup.png").exists()


def test_refine_coco_results(run: Run, tmp_path: Path):
    out = run("refine_coco_results.py", "--batch-size", 2)
    given = json.loads((DEMO / "detections.json").read_text())
    refined = json.loads((tmp_path / "outputs/refine_coco_results/refined.json").read_text())
    assert [x["image_id"] for x in refined] == [x["image_id"] for x in given]
    assert all(a["segmentation"] != b["segmentation"] for a, b in zip(refined, given, strict=True))
    assert all(name in out for name in ("astronaut.jpg", "coffee.jpg", "chelsea.jpg"))


def test_inspect_quadtree(run: Run, tmp_path: Path, disc: tuple[Path, Path]):
    out = run("inspect_quadtree.py", "--photo", disc[0], "--mask", disc[1], "--depth", 2)
    assert [line[:8] for line in out.splitlines()[:-1]] == ["level 0:", "level 1:"]
    for name in ("incoherence.png", "quadtree.png"):
        assert picture(tmp_path / "outputs/inspect_quadtree" / name).std() > 0


def test_detector_features(run: Run, disc: tuple[Path, Path]):
    out = run("detector_features.py", "--photo", disc[0], "--mask", disc[1])
    assert out.startswith("0 of ")  # untrained, the residual decoder is the identity
    assert "refuses them: expected features of 64 channels" in out


def test_every_example_is_short_and_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in source, path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name
