"""The bulk command on COCO results: kill and resume, images that cannot be refined, the summary."""

import errno
import fcntl
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import bulk_cases
import numpy as np
import pytest
from bulk_cases import Run

from transfiner_refine import RefineOptions, Refiner, cli
from transfiner_refine.bulk import json_index, work
from transfiner_refine.bulk.coco_results import CocoResults
from transfiner_refine.bulk.figures import Figures
from transfiner_refine.bulk.json_index import ResultsIndex
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle

COUNT = 7


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return partial(bulk_cases.run_here, monkeypatch, capfd)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bulk_cases.save_refiner(tmp_path_factory.mktemp("refiner"))


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """Photos, results and the model; ``bulk_cases.arguments`` knows their names."""
    bulk_cases.make_photos(tmp_path / "photos", COUNT)
    bulk_cases.make_results(tmp_path / "dets.json", COUNT)
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def left_in(folder: Path) -> set[str]:
    """What a job left beside its inputs."""
    return set(os.listdir(folder)) - {"photos", "dets.json", "model"}


class TestOutput:
    def test_equals_the_refiner_called_image_by_image(self, run: Run, folder: Path):
        code, out, err = run(bulk_cases.arguments(folder))
        assert code == 0, err
        assert "14 masks of 7 images refined, 0 kept coarse, 0 images skipped" in out
        refiner = Refiner.from_pretrained(folder / "model")
        given = json.loads((folder / "dets.json").read_text(encoding="utf-8"))
        for number in range(COUNT):
            masks = [entry["segmentation"] for entry in given if entry["image_id"] == number]
            codes = iter(
                refiner.refine(folder / "photos" / f"{number:03}.png", masks=masks, options=bulk_cases.OPTIONS).to_rle()
            )
            for entry in given:
                if entry["image_id"] == number:
                    entry["segmentation"] = next(codes)
        assert (folder / "out.json").read_text() == json.dumps(given)
        first = rle.decode(given[0]["segmentation"], bulk_cases.SIZE)
        assert not np.array_equal(first, bulk_cases.coarse_masks(0)[0]), "this refiner should change masks"
        assert left_in(folder) == {"out.json"}

    def test_does_not_depend_on_the_size_of_shards(self, run: Run, folder: Path):
        assert run(bulk_cases.arguments(folder))[0] == 0
        assert run(bulk_cases.arguments(folder, output=folder / "other.json", shard_images=100))[0] == 0
        assert (folder / "out.json").read_bytes() == (folder / "other.json").read_bytes()

    def test_images_are_read_as_they_are_needed(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        source = CocoResults(folder / "photos", folder / "dets.json")
        loaded: list[int] = []
        load = CocoResults.load
        monkeypatch.setattr(CocoResults, "load", lambda self, index: loaded.append(index) or load(self, index))
        job = work.Work(source, RefineOptions(), str(folder / "model"))
        outcomes = job.run(job.load_refiner(), range(COUNT))
        assert next(outcomes).index == 0
        # It, those that wait behind the refiner and before it, and the one in between.
        assert len(loaded) <= 2 * work.AHEAD + 2 < COUNT
        assert [outcome.index for outcome in outcomes] == list(range(1, COUNT))
        assert sorted(loaded) == list(range(COUNT))


class TestResume:
    def test_a_killed_job_goes_on_to_the_same_bytes(self, run: Run, folder: Path):
        count = 40
        shutil.rmtree(folder / "photos")
        bulk_cases.make_photos(folder / "photos", count)
        bulk_cases.make_results(folder / "dets.json", count)
        parts = folder / "out.json.parts"
        process = bulk_cases.start(bulk_cases.arguments(folder))
        try:
            while not (parts / "shard_000001").exists():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.communicate()
        finished = list(parts.glob("shard_*"))
        assert 2 <= len(finished) < count // 2
        assert not (folder / "out.json").exists()
        code, _, err = run(bulk_cases.arguments(folder, summary=folder / "summary.json"))
        assert code == 0, err
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["resumed_images"] == 2 * len(finished)
        assert left_in(folder) == {"out.json", "summary.json"}
        assert run(bulk_cases.arguments(folder, output=folder / "whole.json"))[0] == 0
        assert (folder / "out.json").read_bytes() == (folder / "whole.json").read_bytes()

    @pytest.fixture
    def interrupted(self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A job that was stopped after its second shard."""
        photo = folder / "photos" / "004.png"
        content = photo.read_bytes()
        photo.write_bytes(b"damaged")
        code, _, err = run(bulk_cases.arguments(folder, strict=True))
        assert code == 2 and "image_id 4: expected an image file" in err
        assert {path.name for path in (folder / "out.json.parts").iterdir()} == {
            "lock",
            "manifest.json",
            "shard_000000",
            "shard_000001",
        }
        photo.write_bytes(content)
        return folder

    def test_finished_shards_are_not_refined_again(self, interrupted: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
        called: list[int] = []
        encode = work.Work._encode
        monkeypatch.setattr(work.Work, "_encode", lambda self, item: called.append(item[0]) or encode(self, item))
        assert run(bulk_cases.arguments(interrupted))[0] == 0
        assert sorted(called) == [4, 5, 6]

    def test_another_job_is_refused(self, interrupted: Path, run: Run):
        parts = interrupted / "out.json.parts"
        before = sorted(os.listdir(parts))

        def refused(*names: str, **options: object) -> None:
            code, _, err = run(bulk_cases.arguments(interrupted, **options))
            lines = [line for line in err.splitlines() if not line.startswith("Refining")]
            assert code == 2 and len(lines) == 1, err
            assert all(name in lines[0] for name in (*names, "delete that folder", "another --output"))
            assert sorted(os.listdir(parts)) == before

        refused("depth (None instead of 0)", depth=0)
        refused("shard_images (2 instead of 3)", shard_images=3)
        refused("threads (1 instead of 2)", threads=2)
        refused("model", model=Path(cli.__file__).parent / "pretrained")
        bulk_cases.make_results(interrupted / "dets.json", COUNT - 1)
        refused("predictions")

    def test_a_job_that_runs_is_not_run_twice(self, interrupted: Path, run: Run):
        """Two at once would write the same shards, and the first to end would remove those of the other."""
        parts = interrupted / "out.json.parts"
        with (parts / "lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            before = sorted(os.listdir(parts))
            code, _, err = run(bulk_cases.arguments(interrupted))
            assert code == 2 and "one job at a time" in err and "another --output" in err
            assert sorted(os.listdir(parts)) == before and not (interrupted / "out.json").exists()
        assert run(bulk_cases.arguments(interrupted))[0] == 0
        assert (interrupted / "out.json").is_file() and not parts.exists()

    def test_what_was_damaged_since_is_named(self, interrupted: Path, run: Run):
        parts = interrupted / "out.json.parts"

        def fails_with(*messages: str) -> None:
            code, _, err = run(bulk_cases.arguments(interrupted, threads=None))
            lines = [line for line in err.splitlines() if not line.startswith("Refining")]
            assert code == 2 and len(lines) == 1 and all(message in lines[0] for message in messages), err

        shard, manifest = parts / "shard_000001", parts / "manifest.json"
        content = shard.read_bytes()
        for damaged in (content[:-1], content[:30], b"", b"[]\n", b"\xff"):
            shard.write_bytes(damaged)
            fails_with(f"a whole shard of 2 images in {shard}", "delete it")
        description = manifest.read_bytes()
        for damaged in (b"[]", b"{", b""):
            manifest.write_bytes(damaged)
            fails_with(str(manifest), f"delete {parts} to start anew")
        manifest.write_bytes(description)
        shard.unlink()
        assert run(bulk_cases.arguments(interrupted))[0] == 0

    def test_a_file_in_place_of_the_folder(self, folder: Path, run: Run):
        (folder / "out.json.parts").write_text("mine")
        code, _, err = run(bulk_cases.arguments(folder))
        assert code == 2 and "remove what is there" in err and len(err.splitlines()) <= 2, err
        assert (folder / "out.json.parts").read_text() == "mine"

    def test_a_full_disk_loses_nothing(self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
        def write(self: CocoResults, target: Path, records: object, scratch: Path) -> None:
            target.write_bytes(b"[")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(CocoResults, "write", write)
            code, _, err = run(bulk_cases.arguments(folder))
        lines = [line for line in err.splitlines() if not line.startswith("Refining")]
        assert code == 2 and len(lines) == 1 and "got: No space left on device" in lines[0], err
        assert left_in(folder) == {"out.json.parts"} and not (folder / "out.json.parts" / "scratch").exists()
        code, _, _ = run(bulk_cases.arguments(folder, summary=folder / "summary.json"))
        assert code == 0 and json.loads((folder / "summary.json").read_text())["resumed_images"] == COUNT

    def test_strict_holds_for_what_an_earlier_run_skipped(
        self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ):
        (folder / "photos" / "001.png").write_bytes(b"damaged")
        encode = work.Work._encode

        def killed(self: work.Work, item: tuple) -> work.Outcome:
            if item[0] == 4:
                raise InvalidInputError("killed")
            return encode(self, item)

        with monkeypatch.context() as patch:
            patch.setattr(work.Work, "_encode", killed)
            assert run(bulk_cases.arguments(folder))[0] == 2
        shards = sorted(os.listdir(folder / "out.json.parts"))
        assert "shard_000000" in shards
        code, _, err = run(bulk_cases.arguments(folder, strict=True))
        assert code == 2 and "image_id 1: expected an image file" in err and "or leave out --strict" in err
        assert sorted(os.listdir(folder / "out.json.parts")) == shards
        assert run(bulk_cases.arguments(folder))[0] == 0

    def test_threads_are_those_of_the_job_begun(self, interrupted: Path, run: Run):
        assert run(bulk_cases.arguments(interrupted, threads=None))[0] == 0

    def test_a_folder_of_something_else_is_left_alone(self, folder: Path, run: Run):
        (folder / "out.json.parts").mkdir()
        (folder / "out.json.parts" / "thesis.tex").write_text("mine")
        code, _, err = run(bulk_cases.arguments(folder))
        assert code == 2 and "move it away" in err
        assert (folder / "out.json.parts" / "thesis.tex").read_text() == "mine"


class TestSkippedImages:
    @pytest.fixture
    def broken(self, folder: Path) -> Path:
        """Photo 1 is missing, 2 damaged, 3 of another size than its masks; a mask of photo 6 is damaged."""
        photos = folder / "photos"
        (photos / "001.png").unlink()
        (photos / "002.png").write_bytes((photos / "002.png").read_bytes()[:200])
        shutil.copy(Path(cli.__file__).parent / "assets" / "demo" / "coffee.jpg", photos / "003.jpg")
        (photos / "003.png").unlink()
        results = json.loads((folder / "dets.json").read_text(encoding="utf-8"))
        results[6]["segmentation"] = {"size": list(bulk_cases.SIZE), "counts": "zz~"}
        (folder / "dets.json").write_text(json.dumps(results))
        return folder

    def test_stay_coarse_and_are_listed(self, broken: Path, run: Run):
        code, out, err = run(bulk_cases.arguments(broken, summary=broken / "summary.json"))
        assert code == 0, err
        assert "warning: 4 of 7 images stay coarse" in err and "out.json.skipped.json" in err
        assert "6 masks of 3 images refined" in out and "4 images skipped" in out
        skipped = json.loads((broken / "out.json.skipped.json").read_text())
        assert [entry["image_id"] for entry in skipped] == [1, 2, 3, 6]
        reasons = ["got none", "that Pillow can read", "another image", "entry 6: expected counts"]
        assert all(reason in entry["reason"] for entry, reason in zip(skipped, reasons, strict=True))
        given = json.loads((broken / "dets.json").read_text())
        for before, after in zip(given, json.loads((broken / "out.json").read_text()), strict=True):
            assert {**before, "segmentation": None} == {**after, "segmentation": None}
            if before["image_id"] in (1, 2, 3, 6):
                assert before == after
        summary = json.loads((broken / "summary.json").read_text())
        assert (summary["images"], summary["refined_images"], summary["skipped_images"]) == (7, 3, 4)
        assert summary["skipped"] == skipped

    def test_a_job_without_any_removes_an_older_list(self, folder: Path, run: Run):
        (folder / "out.json.skipped.json").write_text("[]")
        assert run(bulk_cases.arguments(folder))[0] == 0
        assert left_in(folder) == {"out.json"}

    def test_no_image_at_all_is_an_error(self, folder: Path, run: Run):
        for photo in (folder / "photos").iterdir():
            photo.write_bytes(b"damaged")
        code, _, err = run(bulk_cases.arguments(folder))
        assert code == 2 and "none of 7; the first, image_id 0: expected an image file" in err
        assert left_in(folder) == set()

    def test_strict_finds_missing_images_before_it_begins(self, broken: Path, run: Run):
        code, _, err = run(bulk_cases.arguments(broken, strict=True))
        assert code == 2 and "named after every image_id" in err and "got 1 without: 1" in err
        assert left_in(broken) == set()


def test_summary_counts_by_size(folder: Path, run: Run):
    words = bulk_cases.arguments(folder, summary=folder / "summary.json")
    code, out, _ = run(words)
    summary = json.loads((folder / "summary.json").read_text())
    assert code == 0 and "small" in out and "medium" in out and "large" not in out
    given, refined = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("dets.json", "out.json"))
    for size, start in (("medium", 0), ("small", COUNT)):  # the order of the entries
        pairs = [
            [rle.decode(entry["segmentation"], bulk_cases.SIZE) for entry in pair]
            for pair in zip(given[start : start + COUNT], refined[start : start + COUNT], strict=True)
        ]
        means = summary["sizes"][size]
        assert (means["masks"], means["kept_coarse"]) == (COUNT, 0)
        assert means["area_change"] == pytest.approx(np.mean([b.sum() / a.sum() - 1 for a, b in pairs]))
        assert means["iou_with_coarse"] == pytest.approx(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))
    assert summary["sizes"]["large"] == {"masks": 0, "area_change": None, "iou_with_coarse": None, "kept_coarse": 0}
    assert summary["images_per_second"] == pytest.approx(COUNT / summary["seconds"])
    assert run(bulk_cases.arguments(folder, summary=folder / "summary.json", keep_if_iou_below=1))[0] == 0
    assert json.loads((folder / "summary.json").read_text())["kept_coarse_share"] == 1


def test_figures_survive_a_shard():
    masks = np.stack(bulk_cases.coarse_masks(0))
    figures = Figures.of_image(masks, np.zeros_like(masks), np.array([True, False]))
    assert Figures.from_json(json.loads(json.dumps(figures.to_json()))) == figures
    assert (figures.sizes["medium"].area_change, figures.sizes["medium"].iou, figures.kept_coarse) == (-1, 0, 1)


class TestResultsIndex:
    @pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
    @pytest.mark.parametrize("layout", [None, 2])
    def test_entries_are_found_wherever_a_chunk_ends(
        self, tmp_path: Path, chunk: int, layout: int | None, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(json_index, "CHUNK", chunk)
        results = [
            {"image_id": "ö", "segmentation": {"counts": '\\"]},{'}},
            {"image_id": 3, "segmentation": [[1, 2.5, -3e2]], "x": None},
            {"image_id": "ö", "segmentation": [], "text": "漢字"},
        ]
        path = tmp_path / "dets.json"
        path.write_text("\n " + json.dumps(results, indent=layout, ensure_ascii=False) + " \n", encoding="utf-8")
        index = ResultsIndex(path)
        content = path.read_bytes()
        assert [json.loads(content[start:end]) for start, end in index.ranges] == results
        assert index.image_ids == ["ö", 3]
        assert [index.of_image(0), index.of_image(1)] == [[0, 2], [1]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"image_id": 1, "segmentation": []}', "not JSON"),
            ('[{"image_id": 1, "segmentation": []}] x', "not JSON"),
            ('[{"image_id": 1, "segmentation": []}, 5]', "entry 1: expected an object"),
            ("5", "got int"),
            ("", "not JSON"),
            ('[{"image_id": 1, "segmentation": [], "score": 0' + "1" * 5000 + "}]", "not JSON"),
            ('[{"image_id": 1, "segmentation": [], "score": ' + "1" * 5000 + "}]", "not JSON"),
            ('[{"image_id": 1, "segmentation": ' + "[" * 100_000 + "]" * 100_000 + "}]", "nested too deeply"),
            ('\ufeff[{"image_id": 1, "segmentation": []}]', "without a byte order mark"),
        ],
    )
    def test_what_is_no_results_file_is_named(self, tmp_path: Path, text: str, message: str):
        (tmp_path / "dets.json").write_text(text, encoding="utf-8")
        with pytest.raises(InvalidInputError, match=message):
            ResultsIndex(tmp_path / "dets.json")


def test_lvis_names_its_images_by_url(folder: Path, run: Run):
    """As LVIS does: photos of two splits of COCO, in the folders of these or in one."""
    photos = folder / "photos"
    (photos / "train2017").mkdir()
    (photos / "000.png").rename(photos / "train2017" / "000.png")
    images = [
        {"id": number, "coco_url": f"http://images.cocodataset.org/{split}/{number:03}.png"}
        for number, split in zip(range(COUNT), ["train2017"] + ["val2017"] * COUNT, strict=False)
    ]
    (folder / "lvis.json").write_text(json.dumps({"images": images}))
    code, out, err = run(bulk_cases.arguments(folder, annotations=folder / "lvis.json"))
    assert code == 0 and "14 masks of 7 images refined" in out and "0 images skipped" in out, err
