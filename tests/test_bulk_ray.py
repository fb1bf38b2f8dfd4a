"""The bulk command on a Ray cluster: the same bytes, also where a worker dies."""

import json
import os
import pickle
import signal
import sys
import time
from functools import partial
from pathlib import Path

import bulk_cases
import pytest
from bulk_cases import Run

from transfiner_refine.bulk.coco_results import CocoResults
from transfiner_refine.bulk.parts import pack
from transfiner_refine.bulk.ray_engine import ShardRefiner
from transfiner_refine.bulk.work import Work

COUNT = 40


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return partial(bulk_cases.run_here, monkeypatch, capfd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bulk_cases.make_photos(tmp_path / "photos", COUNT)
    bulk_cases.make_results(tmp_path / "dets.json", COUNT)
    bulk_cases.save_refiner(tmp_path / "model")
    return tmp_path


def test_a_worker_makes_the_shard_that_this_process_would(folder: Path):
    """What Ray does to a worker, without Ray: it is pickled, and called with the range of a shard."""
    work = Work(CocoResults(folder / "photos", folder / "dets.json"), bulk_cases.OPTIONS, str(folder / "model"))
    worker = ShardRefiner(pickle.loads(pickle.dumps(work)))
    done = worker({"shard": 5, "start": 2, "stop": 4})
    assert done == {"shard": 5, "content": pack(list(work.run(work.load_refiner(), [2, 3]))), "error": ""}


def test_an_error_of_the_input_is_no_reason_to_try_again(folder: Path):
    source = CocoResults(folder / "photos", folder / "dets.json")
    (folder / "photos" / "003.png").write_bytes(b"damaged")
    worker = ShardRefiner(Work(source, bulk_cases.OPTIONS, str(folder / "model"), strict=True))
    done = worker({"shard": 1, "start": 2, "stop": 4})
    assert "image_id 3: expected an image file" in done["error"]


def test_without_ray_the_extra_is_named(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(bulk_cases.arguments(folder, engine="ray"))
    assert code == 2 and "transfiner-refine[ray]" in err
    assert not (folder / "out.json.parts").exists()


def test_options_of_ray_need_its_engine(folder: Path, run: Run):
    code, _, err = run(bulk_cases.arguments(folder, workers=2))
    assert code == 2 and "--engine ray" in err


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(folder: Path, run: Run):
    pytest.importorskip("ray.data", reason="Ray: pip install '.[ray]'")
    psutil = pytest.importorskip("psutil", reason="psutil, which finds the worker to kill")
    home = folder / "home"
    home.mkdir()
    words = bulk_cases.arguments(folder, engine="ray", workers=2, summary=folder / "summary.json")
    process = bulk_cases.start(words, HOME=str(home))
    parts = folder / "out.json.parts"
    killed = []
    try:
        while process.poll() is None and not killed:
            if len(list(parts.glob("shard_*"))) >= 2:
                children = psutil.Process(process.pid).children(recursive=True)
                workers = [child for child in children if "ShardRefiner" in " ".join(child.cmdline())]
                assert len(workers) == 2
                os.kill(workers[0].pid, signal.SIGKILL)
                killed.append(workers[0].pid)
            time.sleep(0.05)
        out, _ = process.communicate(timeout=600)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0 and killed, out
    assert run(bulk_cases.arguments(folder, output=folder / "local.json"))[0] == 0
    assert (folder / "out.json").read_bytes() == (folder / "local.json").read_bytes()
    assert json.loads((folder / "summary.json").read_text())["refined_images"] == COUNT
    assert not parts.exists()
    assert os.listdir(home) == []
