"""Original checkpoints turned into directories, and fetched by name from a Hub on the loopback interface."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Client, FakeHub, Handler, client_of
from released_cases import TRAINING_ONLY, constants, flat_checkpoint, original_shapes, released_folder
from torch import Tensor

from transfiner_refine import InvalidInputError, WeightsError
from transfiner_refine.commands.convert import convert
from transfiner_refine.modeling.released import ReleasedConfig, ReleasedMaskTransfiner
from transfiner_refine.modeling.released_files import convert_checkpoint, read_checkpoint
from transfiner_refine.modeling.released_hub import SOURCES

CONFIG, WEIGHTS, RECORD, DETECTRON2 = "config.json", "model.safetensors", "conversion.json", "detectron2_mask_rcnn.pth"
DEFORMABLE = ReleasedConfig(50, deformable=True)


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def checkpoint_of(config: ReleasedConfig = DEFORMABLE, seed: int = 0) -> dict[str, Any]:
    """A checkpoint as Detectron2 saves it, of the true layout; small, each tensor being one random number."""
    generator = torch.Generator().manual_seed(seed)
    shapes = original_shapes(config)
    weights = {key: torch.rand(1, generator=generator).expand(shape) for key, shape in shapes.items()}
    return {"model": weights | constants(), "iteration": 269999, "scheduler": {"last_epoch": 270000}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "output_3x_transfiner_r50_deform.pth"
    torch.save(checkpoint_of(), path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> Path:
    """What the command makes of it. Not to be changed."""
    output = checkpoint.parent / "new" / "converted"
    convert(checkpoint, output)
    return output


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def first_values(model: ReleasedMaskTransfiner) -> dict[str, float]:
    return {name: float(value.flatten()[0]) for name, value in model.state_dict().items()}


class TestConvert:
    @pytest.mark.parametrize(
        ("keys", "config"), [("keys_r50.json", ReleasedConfig()), ("keys_r50_deform.json", DEFORMABLE)]
    )
    def test_the_layout_is_the_released_one(self, keys: str, config: ReleasedConfig):
        recorded = json.loads((released_folder() / keys).read_text())
        assert {key: list(shape) for key, shape in original_shapes(config).items()} == recorded

    def test_what_is_converted_is_what_comes_back(self, converted: Path):
        model = ReleasedMaskTransfiner.from_pretrained(converted, score_threshold=0.5)
        assert model.config == ReleasedConfig(50, deformable=True, score_threshold=0.5)
        assert first_values(model) == first_values(ReleasedMaskTransfiner.from_original(checkpoint_of()["model"]))

    def test_record_names_every_key(self, checkpoint: Path, converted: Path):
        record, given = json.loads((converted / RECORD).read_text()), checkpoint_of()["model"]
        assert sorted([*record["used"], *record["training_only"], *record["constants"]]) == sorted(given)
        assert set(record["training_only"]) == set(TRAINING_ONLY) and set(record["constants"]) == set(constants())
        assert record["source"]["file"] == checkpoint.name and record["source"]["size"] == checkpoint.stat().st_size

    def test_command_says_what_it_did(self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        convert(checkpoint, tmp_path / "out")
        printed = capsys.readouterr().out
        keys = len(checkpoint_of()["model"])
        assert f"{keys} keys: {keys - 6 - 7} used, 6 needed in training alone, 7 constants" in printed
        assert "ResNet-50, deformable" in printed and {x.name for x in (tmp_path / "out").iterdir()} == {
            CONFIG,
            WEIGHTS,
            RECORD,
            DETECTRON2,
        }

    def test_detector_keeps_detectron2s_names(self, converted: Path):
        """As in Detectron2's own Mask R-CNN: no key of the refinement, and the coarse mask head whole."""
        plain = torch.load(converted / DETECTRON2, weights_only=True)["model"]
        heads = {key for key in plain if key.startswith("roi_heads.mask_")}
        layers = ("mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4", "deconv", "predictor")
        assert heads == {f"roi_heads.mask_head.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        given = checkpoint_of()["model"]
        rest = {key for key in given if not key.startswith("roi_heads.mask_") and key not in constants()}
        assert set(plain) == heads | rest
        assert all(torch.equal(value, given[key]) for key, value in plain.items() if value.numel() < 1e5)

    def test_state_dict_without_a_wrapper(self, tmp_path: Path):
        torch.save(flat_checkpoint(), tmp_path / "bare.pth")
        assert read_checkpoint(tmp_path / "bare.pth").keys() == flat_checkpoint().keys()

    def test_refuses_to_overwrite(self, checkpoint: Path, tmp_path: Path):
        (tmp_path / "note.txt").write_text("mine")
        with pytest.raises(InvalidInputError, match="expected a new or an empty directory"):
            convert_checkpoint(checkpoint, tmp_path)
        assert [x.name for x in tmp_path.iterdir()] == ["note.txt"]

    def test_an_output_that_cannot_be_made_is_known_first(self, tmp_path: Path):
        """Before the checkpoint is read: there is none."""
        (tmp_path / "note.txt").write_text("mine")
        for output in (tmp_path / "note.txt" / "model", tmp_path / "note.txt" / "new" / "model"):
            with pytest.raises(InvalidInputError, match=f"expected a directory {output} that can be made, got: Not"):
                convert_checkpoint(tmp_path / "none.pth", output)
        with pytest.raises(WeightsError, match="which is no file"):
            convert_checkpoint(tmp_path / "none.pth", tmp_path / "new" / "model")
        assert [x.name for x in tmp_path.iterdir()] == ["note.txt"]


class TestRefusal:
    """One clear error each, nothing written, nothing run."""

    @staticmethod
    def refused(path: Path, message: str) -> None:
        output = path.parent / "out"
        before = sorted(path.parent.iterdir())
        with pytest.raises(WeightsError, match=message) as error:
            convert_checkpoint(path, output)
        assert "\n" not in str(error.value) and path.name in str(error.value)
        assert sorted(path.parent.iterdir()) == before

    @pytest.mark.parametrize("legacy", [False, True])
    def test_code_is_not_run(self, tmp_path: Path, legacy: bool):
        path = tmp_path / "evil.pth"
        payload = checkpoint_of() | {"hook": Payload(tmp_path / "marker")}
        torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
        self.refused(path, "mkdir, which was not run")

    def test_missing(self, tmp_path: Path):
        self.refused(tmp_path / "nothing.pth", "which is no file")

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_truncated(self, checkpoint: Path, tmp_path: Path, share: float):
        content = checkpoint.read_bytes()
        (tmp_path / "short.pth").write_bytes(content[: int(share * len(content))])
        self.refused(tmp_path / "short.pth", "damaged or no file of torch.save")

    def test_tampered(self, tmp_path: Path):
        """A changed number, which torch alone would not notice."""
        path = tmp_path / "changed.pth"
        torch.save({"model": {"weight": torch.full((4096,), 1.5)}}, path)
        content = bytearray(path.read_bytes())
        place = content.index(np.full(64, 1.5, np.float32).tobytes())
        content[place] ^= 1
        path.write_bytes(content)
        assert bool((torch.load(path, weights_only=True)["model"]["weight"] != 1.5).any())
        self.refused(path, "the checksum of .* is wrong")

    def test_not_a_checkpoint(self, tmp_path: Path):
        (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
        self.refused(tmp_path / "page.pth", "damaged or no file of torch.save")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([torch.zeros(1)], "got list"),
            ({}, "a dict of 0 values"),
            ({"state": {"weight": torch.zeros(1)}}, "with the keys 'state'"),
            ({"model": {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}}, "0 bottleneck blocks in res4"),
        ],
    )
    def test_another_kind_of_model(self, tmp_path: Path, content: Any, message: str):
        torch.save(content, tmp_path / "other.pth")
        self.refused(tmp_path / "other.pth", message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"roi_heads.mask_head.encoder.conv_fuse.bias": None}, "1 missing .*conv_fuse.bias.*0 unknown"),
            ({"roi_heads.box_head.fc3.weight": torch.zeros(1)}, "0 missing, 1 unknown .*fc3.weight"),
            # LVIS has more classes.
            ({"roi_heads.box_predictor.cls_score.bias": torch.zeros(1231)}, r"cls_score.bias of shape \(81,\)"),
        ],
    )
    def test_another_mask_r_cnn(self, tmp_path: Path, change: dict[str, Tensor | None], message: str):
        weights = {key: value for key, value in (flat_checkpoint() | change).items() if value is not None}
        torch.save({"model": weights}, tmp_path / "other.pth")
        self.refused(tmp_path / "other.pth", message)


class TestDirectory:
    @staticmethod
    def refused(directory: Path, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            ReleasedMaskTransfiner.from_pretrained(directory)

    def test_changed_weights(self, copy: Path):
        with (copy / WEIGHTS).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        self.refused(copy, "it was changed after the conversion")

    def test_truncated_weights(self, copy: Path):
        os.truncate(copy / WEIGHTS, 1 << 20)
        self.refused(copy, "is damaged")

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_missing_file(self, copy: Path, name: str):
        (copy / name).unlink()
        self.refused(copy, f"{name} is missing")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"depth": 101}, "does not fit its config.json: .* the first is"),
            ({"deformable": False}, "does not fit its config.json"),
            ({"depth": 34}, "expected depth 50 or 101"),
            ({"feature_channels": 256}, "a refiner loads with Refiner.from_pretrained"),
        ],
    )
    def test_other_config(self, converted: Path, tmp_path: Path, changes: dict[str, Any], message: str):
        for name in (WEIGHTS, RECORD):
            os.link(converted / name, tmp_path / name)
        (tmp_path / CONFIG).write_text(json.dumps(json.loads((converted / CONFIG).read_text()) | changes))
        self.refused(tmp_path, message)

    def test_config_that_is_no_json(self, tmp_path: Path):
        (tmp_path / CONFIG).write_text("{")
        self.refused(tmp_path, "expected JSON")


NAME, SPACE, REVISION = "released/r50-dcn-3x", "lkeab/transfiner", "b65bf73"
FILE = "output_3x_transfiner_r50_deform.pth"


class Space:
    """The authors' Space on a fake Hub, and the real client in another process."""

    def __init__(self, hub: FakeHub, client: Client, content: bytes):
        self.hub, self.client, self.content = hub, client, content
        hub.publish(SPACE, {FILE: content}, REVISION)
        hub.fault = as_space

    def load(self, cache: Path, name: str = NAME, **options: Any) -> tuple[ReleasedConfig, dict[str, float]]:
        return self.client._pool.submit(load_released, name, options | {"cache_dir": cache}).result(timeout=300)

    def refused(self, cache: Path, message: str, **options: Any) -> str:
        """Loading fails, and leaves no model and no download."""
        with pytest.raises(WeightsError, match=message) as error:
            self.load(cache, **options)
        assert not [path for path in cache.rglob("*") if path.suffix in (".pth", ".safetensors", ".download")]
        return str(error.value)


def load_released(name: str, options: dict[str, Any]) -> tuple[ReleasedConfig, dict[str, float]]:
    """In the client's process."""
    model = ReleasedMaskTransfiner.from_pretrained(name, **options)
    return model.config, first_values(model)


def as_space(handler: Handler) -> bool:
    """Serve what the fake Hub holds as a Space, and nothing as a model."""
    if not handler.path.startswith("/spaces/"):
        handler.refuse(401, "RepoNotFound")
        return True
    handler.path = handler.path.removeprefix("/spaces")
    return False


@pytest.fixture
def space(checkpoint: Path, client: tuple[FakeHub, Client]) -> Iterator[Space]:
    hub, process = client
    hub.repositories.clear()
    hub.requests.clear()
    yield Space(hub, process, checkpoint.read_bytes())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, Client]]:
    hub = FakeHub()
    with client_of(hub, tmp_path_factory.mktemp("home")) as process:
        yield hub, process
    hub.stop()


class TestDownload:
    def test_first_use_downloads_and_later_ones_do_not(self, space: Space, tmp_path: Path):
        first = space.load(tmp_path)
        assert first == (DEFORMABLE, first_values(ReleasedMaskTransfiner.from_original(checkpoint_of()["model"])))
        files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {CONFIG, RECORD, WEIGHTS, "r50-dcn-3x.seen.json"}
        (record,) = tmp_path.rglob(RECORD)
        source = json.loads(record.read_text())["source"]
        assert source["space"] == SPACE and source["revision"] == space.hub.repositories[SPACE].branches[REVISION]
        space.hub.requests.clear()
        space.hub.stop()
        try:
            assert space.load(tmp_path) == first
            assert space.load(tmp_path, local_files_only=True) == first
        finally:
            space.hub.start()
        assert not space.hub.requests

    def test_content_that_is_not_what_the_hub_states(self, space: Space, tmp_path: Path):
        """Same length, other bytes: changed on the way."""
        changed = bytearray(space.content)
        changed[len(changed) // 2] ^= 1

        def tamper(handler: Handler) -> bool:
            if handler.command == "GET":
                handler.answer(200, bytes(changed))
                return True
            return as_space(handler)

        space.hub.fault = tamper
        space.refused(tmp_path, f"expected {FILE} of sha256")
        space.hub.fault = as_space
        assert space.load(tmp_path)[0] == DEFORMABLE  # the damaged file is not taken for a good one

    def test_connection_that_breaks_off(self, space: Space, tmp_path: Path):
        def break_off(handler: Handler) -> bool:
            if handler.command == "GET":
                handler.answer(200, space.content[: len(space.content) // 2], Content_Length=str(len(space.content)))
                handler.hang_up()
                return True
            return as_space(handler)

        space.hub.fault = break_off
        with pytest.raises(WeightsError, match="could not be downloaded"):
            space.load(tmp_path)
        assert not list(tmp_path.rglob(WEIGHTS))

    def test_file_that_was_replaced_since(self, space: Space, tmp_path: Path):
        space.load(tmp_path)
        (weights,) = tmp_path.rglob(WEIGHTS)
        shutil.rmtree(weights.parent)
        other = tmp_path / "other.bin"
        torch.save(checkpoint_of(seed=1), other)
        space.hub.publish(SPACE, {FILE: other.read_bytes()}, REVISION)
        message = space.refused(tmp_path, "as it was first seen here")
        (seen,) = tmp_path.rglob("*.seen.json")
        assert str(seen) in message
        seen.unlink()
        assert space.load(tmp_path)[0] == DEFORMABLE

    def test_code_in_the_download(self, space: Space, tmp_path: Path):
        evil = tmp_path / "evil.bin"
        torch.save({"model": Payload(tmp_path / "marker")}, evil)
        space.hub.publish(SPACE, {FILE: evil.read_bytes()}, REVISION)
        space.refused(tmp_path / "cache", "which was not run")
        assert not (tmp_path / "marker").exists()

    def test_hub_out_of_reach(self, space: Space, tmp_path: Path):
        space.hub.stop()
        try:
            message = space.refused(tmp_path, "not cached and the Hub cannot be reached")
        finally:
            space.hub.start()
        assert SOURCES[NAME].drive_id in message and "transfiner-refine convert" in message

    def test_file_that_is_gone(self, space: Space, tmp_path: Path):
        space.hub.publish(SPACE, {}, REVISION)
        space.refused(tmp_path, "could not be downloaded")

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            (NAME, {"local_files_only": True}, "connect once without local_files_only"),
            ("released/r101-3x", {}, "Google Drive alone: download https://drive.google.com/file/d/1Jn27jTpFFWjuX22"),
            ("released/swin-b", {}, "expected one of released/r50-1x, "),
        ],
    )
    def test_names_that_cannot_be_fetched(self, tmp_path: Path, name: str, options: dict[str, Any], message: str):
        with pytest.raises(WeightsError, match=message):
            ReleasedMaskTransfiner.from_pretrained(name, cache_dir=tmp_path, **options)
