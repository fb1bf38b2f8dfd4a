"""Where refiners are kept: a directory, and the Hub, reached by its real client over HTTP."""

import json
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import TOKEN, Client, FakeHub, Handler, Repository, client_of
from safetensors.torch import load_file, save_file
from small_models import discs, encoder_config, eventful_model, random_image, random_pyramid, small_config

from transfiner_refine import InvalidInputError, RefineOptions, Refiner, TransfinerConfig, WeightsError
from transfiner_refine.modeling import hub as hub_module
from transfiner_refine.modeling.files import LEAST_PACKED

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner of a detector's features, in a directory. Not to be changed."""
    return Refiner(eventful_model(small_config(depth=2))).save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestDirectory:
    def test_what_is_saved_is_what_comes_back(self, saved: Path, tmp_path: Path):
        """Twice, since the first time rounds to half precision."""
        first = Refiner.from_pretrained(saved)
        second = Refiner.from_pretrained(str(first.save_pretrained(tmp_path / "new" / "folder")))
        assert first.config == second.config == small_config(depth=2)
        masks = discs(90, 120, [(40.0, 45.0, 25.0), (85.0, 50.0, 18.0)])
        given: dict = {"features": random_pyramid(90, 120), "image_size": (90, 120), "masks": masks}
        options = RefineOptions(keep_if_iou_below=0.0)
        outs = [refiner.refine(**given, options=options) for refiner in (first, second)]
        assert outs[0].probs is not None and outs[1].probs is not None
        assert torch.equal(outs[0].probs, outs[1].probs) and torch.equal(outs[0].masks, outs[1].masks)
        assert (outs[0].masks != masks).any()

    def test_storage_rounds_to_half_precision_and_no_further(self, saved: Path):
        original = eventful_model(small_config(depth=2)).state_dict()
        stored, loaded = load_file(saved / WEIGHTS), Refiner.from_pretrained(saved).model.state_dict()
        for name, value in original.items():
            assert stored[name].dtype == torch.float16 and loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], value.half().float()), name

    def test_an_image_encoder_is_saved_too(self, tmp_path: Path):
        refiner = Refiner(eventful_model(encoder_config(depth=1)))
        loaded = Refiner.from_pretrained(refiner.save_pretrained(tmp_path))
        image, masks = random_image(60, 80), discs(60, 80, [(40.0, 30.0, 20.0)])
        out, again = (r.refine(image, masks=masks) for r in (loaded, Refiner.from_pretrained(tmp_path)))
        assert torch.equal(out.masks, again.masks)

    def test_dtype_is_chosen_at_loading_and_weights_can_be_trained(self, saved: Path):
        for dtype in (torch.float32, torch.bfloat16):
            refiner = Refiner.from_pretrained(saved, dtype=dtype)
            assert refiner.dtype == dtype and all(p.requires_grad for p in refiner.model.parameters())

    def test_the_files(self, saved: Path):
        assert set(contents(saved)) == {CONFIG, WEIGHTS, CARD}
        assert TransfinerConfig(**json.loads((saved / CONFIG).read_text())) == small_config(depth=2)
        card = (saved / CARD).read_text()
        assert card.startswith("---\nlibrary_name: transfiner-refine\n") and "depth 2" in card

    def test_saving_replaces_the_old_model_and_keeps_a_card_that_is_there(self, copy: Path):
        (copy / CARD).write_text("written by hand")
        Refiner(eventful_model(small_config(depth=1))).save_pretrained(copy)
        assert Refiner.from_pretrained(copy).config.depth == 1
        assert (copy / CARD).read_text() == "written by hand"

    @pytest.mark.parametrize("failure", ["weights", "card"])
    def test_a_save_that_fails_leaves_the_old_files(self, copy: Path, monkeypatch: pytest.MonkeyPatch, failure: str):
        (copy / CARD).unlink()
        before = contents(copy)
        refiner = Refiner(eventful_model(small_config(depth=1)))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if failure == "weights":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as on a full disk
        else:
            monkeypatch.setattr(hub_module, "model_card", lambda config: Path("/no/such/file").read_text())
        try:
            with pytest.raises(OSError):
                refiner.save_pretrained(copy)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert contents(copy) == before

    def test_the_embedded_model_needs_no_network(self):
        refiner = Refiner.from_pretrained()
        assert refiner.config.feature_source == "image_encoder"
        assert all(value.isfinite().all() for value in refiner.model.state_dict().values())


class TestDamage:
    """Each is one clear error: what was expected, what came, what to do."""

    def load(self, directory: Path, message: str) -> None:
        with pytest.raises(WeightsError, match=message) as caught:
            Refiner.from_pretrained(directory)
        assert str(directory) in str(caught.value)

    def change_weights(self, directory: Path, change: Callable[[dict], object]) -> None:
        weights = load_file(directory / WEIGHTS)
        change(weights)
        save_file(weights, directory / WEIGHTS)

    def test_a_tensor_is_missing(self, copy: Path):
        self.change_weights(copy, lambda w: w.pop("transfiner.node_encoder.fuse.weight"))
        self.load(copy, r"1 of \d+ tensors are missing.*'transfiner.node_encoder.fuse.weight'")

    def test_a_tensor_too_many(self, copy: Path):
        self.change_weights(copy, lambda w: w.update(extra=torch.zeros(1)))
        self.load(copy, r"1 of \d+ tensors are .*unexpected.*'extra'")

    def test_a_tensor_of_another_shape(self, copy: Path):
        self.change_weights(copy, lambda w: w.update({"transfiner.sequence_encoder.norm.bias": torch.zeros(17)}))
        self.load(copy, r"another shape.*'transfiner.sequence_encoder.norm.bias'; use the config")

    def test_weights_of_another_architecture(self, copy: Path):
        edit_config(copy, channels=32)
        self.load(copy, r"does not fit its config.json: \d+ of \d+ tensors")

    @pytest.mark.parametrize("length", [0, 4, 100, -1])
    def test_truncated_weights(self, copy: Path, length: int):
        content = (copy / WEIGHTS).read_bytes()
        (copy / WEIGHTS).write_bytes(content[:length])
        self.load(copy, "is damaged .*download or save the model again")

    def test_a_header_that_was_tampered_with(self, copy: Path):
        content = (copy / WEIGHTS).read_bytes()
        (copy / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
        self.load(copy, "is damaged")

    def test_weights_that_are_a_pickle(self, copy: Path):
        torch.save({"a": torch.zeros(3)}, copy / WEIGHTS)
        self.load(copy, "is damaged")

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_a_missing_file(self, copy: Path, name: str):
        (copy / name).unlink()
        self.load(copy, f"expected config.json and model.safetensors in .*{name} is missing")

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"depth: 3"])
    def test_a_config_that_is_not_json(self, copy: Path, content: bytes):
        (copy / CONFIG).write_bytes(content)
        self.load(copy, "expected JSON")

    @pytest.mark.parametrize("content", ["[]", '"text"', "null"])
    def test_a_config_that_is_no_object(self, copy: Path, content: str):
        (copy / CONFIG).write_text(content)
        self.load(copy, "expected the fields of TransfinerConfig")

    def test_a_config_of_something_else(self, copy: Path):
        edit_config(copy, hidden_size=768)
        self.load(copy, r"got \['hidden_size'\]: is it a refiner's config")

    def test_a_config_of_a_later_release(self, copy: Path):
        edit_config(copy, format_version=2)
        self.load(copy, "format_version 1, got 2: install the release")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("depth", 9),
            ("depth", "3"),
            ("depth", 1.5),
            ("heads", 0),
            ("layers", "3"),
            ("channels", -16),
            ("feature_channels", 0),
            ("strides", 4),
            ("strides", [4, 8, 32]),
            ("strides", [0, 0]),
            ("strides", []),
            ("node_cues", ["colour"]),
            ("node_cues", ["position"]),
            ("decoder", "both"),
            ("box_margin", -1),
            ("box_margin", float("nan")),
            ("box_margin", "0.1"),
            ("tree_keys", "false"),
            ("propagate", 0),
            ("passes", True),
            ("canonical_level", 4.0),
            ("feature_source", None),
            ("backbone", 0),
            ("feature_fingerprint", 7),
        ],
    )
    def test_impossible_values(self, copy: Path, field: str, value: Any):
        edit_config(copy, **{field: value})
        self.load(copy, CONFIG)

    @pytest.mark.parametrize("name", ["no/such/directory", "/no/such", "./no", "name", "~/model", "org/"])
    def test_no_such_directory(self, name: str):
        with pytest.raises(WeightsError, match="expected a directory or a Hub id like 'org/name', got"):
            Refiner.from_pretrained(name)

    def test_a_path_is_never_a_hub_id(self):
        with pytest.raises(WeightsError, match="there is no such directory"):
            Refiner.from_pretrained(Path("org/name"))


@pytest.fixture(scope="module")
def server_and_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, Client]]:
    hub = FakeHub()
    with client_of(hub, tmp_path_factory.mktemp("home")) as client:
        yield hub, client
    hub.stop()


@pytest.fixture
def hub(server_and_client: tuple[FakeHub, Client], saved: Path) -> FakeHub:
    """A Hub that holds one refiner and has no faults."""
    hub = server_and_client[0]
    hub.repositories.clear()
    hub.fault = None
    hub.publish("org/name", contents(saved))
    hub.requests.clear()
    return hub


@pytest.fixture
def client(server_and_client: tuple[FakeHub, Client]) -> Client:
    return server_and_client[1]


def same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a if k != "config")


class TestDownload:
    def test_download_then_cache(self, hub: FakeHub, client: Client, saved: Path, tmp_path: Path):
        expected = client.load(str(saved))
        first = client.load("org/name", cache_dir=tmp_path)
        assert first["config"] == expected["config"] and same_model(first, expected)
        commit = hub.repositories["org/name"].branches["main"]
        files = [f"GET /org/name/resolve/main/{CONFIG}", f"GET /org/name/resolve/{commit}/{WEIGHTS}"]
        assert [request for request in hub.requests if request.startswith("GET")] == files
        hub.requests.clear()
        assert same_model(client.load("org/name", cache_dir=tmp_path), expected)
        assert not any(request.startswith("GET") for request in hub.requests)

    def test_offline_afterwards(self, hub: FakeHub, client: Client, tmp_path: Path):
        expected = client.load("org/name", cache_dir=tmp_path)
        hub.requests.clear()
        assert same_model(client.load("org/name", cache_dir=tmp_path, local_files_only=True), expected)
        assert hub.requests == []
        hub.stop()
        try:
            assert same_model(client.load("org/name", cache_dir=tmp_path), expected)
        finally:
            hub.start()

    def test_a_revision(self, hub: FakeHub, client: Client, tmp_path: Path, saved: Path):
        other = Refiner(eventful_model(small_config(depth=1))).save_pretrained(tmp_path / "other")
        commit = hub.publish("org/name", contents(other), branch="v2")
        for revision in ("v2", commit):
            cache = tmp_path / revision
            assert client.load("org/name", revision=revision, cache_dir=cache)["config"].depth == 1
        assert client.load("org/name", cache_dir=tmp_path / "main")["config"].depth == 2

    def test_config_and_weights_come_from_one_commit(self, hub: FakeHub, client: Client, tmp_path: Path, saved: Path):
        """The branch moves on after the config was read."""
        other = Refiner(eventful_model(small_config(depth=1))).save_pretrained(tmp_path / "other")

        def move(request: Handler) -> bool:
            if WEIGHTS in request.path:
                hub.fault = None
                hub.publish("org/name", contents(other))
            return False

        hub.fault = move
        assert same_model(client.load("org/name", cache_dir=tmp_path), client.load(str(saved)))
        assert client.load("org/name", cache_dir=tmp_path)["config"].depth == 1

    def test_a_gated_repository_opens_with_a_token(self, hub: FakeHub, client: Client, tmp_path: Path):
        hub.repositories["org/name"].gated = True
        with pytest.raises(WeightsError, match="org/name is gated: accept its terms on the Hub, then pass token="):
            client.load("org/name", cache_dir=tmp_path)
        assert client.load("org/name", cache_dir=tmp_path, token=TOKEN)["config"].depth == 2

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("org/other", {}, "'org/other', which does not exist or is private"),
            ("org/name", {"revision": "v9"}, "org/name has no revision 'v9'"),
            ("org/name", {"local_files_only": True}, "org/name is not in the local cache"),
            ("org/na me", {}, "expected a directory or a Hub id like 'org/name', got 'org/na me'"),
        ],
    )
    def test_what_is_not_there(
        self, hub: FakeHub, client: Client, tmp_path: Path, name: str, options: dict, message: str
    ):
        with pytest.raises(WeightsError, match=message):
            client.load(name, cache_dir=tmp_path, **options)

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_a_missing_file(self, hub: FakeHub, client: Client, tmp_path: Path, name: str):
        del hub.files("org/name")[name]
        hub.publish("org/part", hub.files("org/name"))
        with pytest.raises(WeightsError, match=r"config.json and model.safetensors in org/part, one is missing"):
            client.load("org/part", cache_dir=tmp_path)

    def test_a_damaged_file_of_the_repository(self, hub: FakeHub, client: Client, tmp_path: Path):
        hub.files("org/name")[WEIGHTS] = hub.files("org/name")[WEIGHTS][:-100]
        with pytest.raises(WeightsError, match="is damaged"):
            client.load("org/name", cache_dir=tmp_path)

    def test_no_network(self, hub: FakeHub, client: Client, tmp_path: Path):
        hub.stop()
        try:
            with pytest.raises(WeightsError, match="not in the local cache and the Hub cannot be reached"):
                client.load("org/name", cache_dir=tmp_path)
        finally:
            hub.start()

    @pytest.mark.parametrize("fault", ["cut short", "hang up in the middle", "hang up at once", "error", "portal"])
    def test_a_network_that_fails_leaves_nothing_behind(self, hub: FakeHub, client: Client, tmp_path: Path, fault: str):
        def fail(request: Handler) -> bool:
            content = hub.files("org/name")[WEIGHTS]
            if fault == "hang up at once":
                request.hang_up()
            elif fault == "error":
                request.answer(500)
            elif fault == "portal":  # a hotel's login page
                request.answer(200, b"<html>Welcome</html>")
            elif request.command != "GET" or WEIGHTS not in request.path:
                return False
            elif fault == "cut short":  # by a proxy, which corrects the length
                request.answer(200, content[: len(content) // 2])
            else:
                request.answer(200, b"", Content_Length=str(len(content)))
                if len(hub.requests) < 8:  # the client hopes as long as it gets anything
                    request.wfile.write(content[:100])
                request.hang_up()
            return True

        hub.fault = fail
        with pytest.raises(WeightsError, match=r"org/name (could not be downloaded|is not in the local cache)"):
            client.load("org/name", cache_dir=tmp_path)
        hub.fault = None
        assert client.load("org/name", cache_dir=tmp_path)["config"].depth == 2


class TestUpload:
    def test_upload_then_download(self, hub: FakeHub, client: Client, saved: Path, tmp_path: Path):
        url = client.push(saved, "org/new", token=TOKEN)
        repository = hub.repositories["org/new"]
        assert url == f"{hub.endpoint}/org/new/commit/{repository.branches['main']}"
        uploaded = hub.files("org/new")
        assert set(uploaded) == {CONFIG, WEIGHTS, CARD}
        assert json.loads(uploaded[CONFIG]) == json.loads(json.dumps(asdict(small_config(depth=2))))
        assert same_model(client.load("org/new", cache_dir=tmp_path), client.load(str(saved)))

    def test_into_a_repository_that_exists(self, hub: FakeHub, client: Client, saved: Path):
        hub.repositories["org/new"] = Repository()
        client.push(saved, "org/new", token=TOKEN)
        assert set(hub.files("org/new")) == {CONFIG, WEIGHTS, CARD}

    def test_without_the_right_to(self, hub: FakeHub, client: Client, saved: Path):
        with pytest.raises(WeightsError, match=r"org/new could not be uploaded: .*the token's rights"):
            client.push(saved, "org/new", token="hf_reader")
        assert "org/new" not in hub.repositories

    def test_under_an_impossible_name(self, hub: FakeHub, client: Client, saved: Path):
        with pytest.raises(WeightsError, match="org/n ew could not be uploaded"):
            client.push(saved, "org/n ew", token=TOKEN)

    @pytest.mark.parametrize("step", ["create", "preupload", "batch", "large", "commit"])
    @pytest.mark.parametrize("fault", ["refuse", "hang up"])
    def test_an_upload_that_fails_commits_nothing(
        self, hub: FakeHub, client: Client, saved: Path, step: str, fault: str
    ):
        def fail(request: Handler) -> bool:
            if step not in request.path:
                return False
            if fault == "refuse":
                request.refuse(403, "Forbidden")
            else:
                request.hang_up()
            return True

        hub.fault = fail
        with pytest.raises(WeightsError, match="org/new could not be uploaded"):
            client.push(saved, "org/new", token=TOKEN)
        assert "org/new" not in hub.repositories or not hub.repositories["org/new"].commits


def test_weights_stored_as_bytes(tmp_path: Path):
    """A quarter of the size, each row within half a step of its own scale; the same again when saved once more."""
    model = eventful_model(encoder_config())
    Refiner(model).save_pretrained(tmp_path / "bytes", dtype=torch.int8)
    Refiner(model).save_pretrained(tmp_path / "halves")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("bytes", "halves")]
    assert sizes[0] < 0.65 * sizes[1]
    again = Refiner.from_pretrained(tmp_path / "bytes")
    packed = 0
    for name, value in model.state_dict().items():
        found = again.model.state_dict()[name]
        step = value.abs() * 2**-10
        if value.ndim > 1 and value.numel() >= LEAST_PACKED:
            step = (value.flatten(1).abs().amax(1) / 127 * 0.51).view(-1, *[1] * (value.ndim - 1)).expand_as(value)
            packed += 1
        assert ((found - value).abs() <= step + 1e-7).all(), name
    assert packed > 10
    again.save_pretrained(tmp_path / "again", dtype=torch.int8)
    twice = Refiner.from_pretrained(tmp_path / "again").model.state_dict()
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(twice[name], value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["pixel_decoder.layers.0.weight", "pixel_decoder.layers.0.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
def test_bytes_too_hold_finite_weights_alone(tmp_path: Path, name: str, value: float):
    """A bias beyond float16 is refused; a large weight only makes the scale of its row larger."""
    model = eventful_model(encoder_config(channels=64))
    weight = model.transfiner.get_parameter(name)
    assert weight.ndim == 1 or weight.numel() < LEAST_PACKED
    weight.data.view(-1)[0] = value
    with pytest.raises(WeightsError, match="expected finite weights"):
        Refiner(model).save_pretrained(tmp_path / "bytes", dtype=torch.int8)
    assert not (tmp_path / "bytes").exists()


def test_other_dtypes_and_torn_bytes_are_refused(tmp_path: Path):
    refiner = Refiner(eventful_model(encoder_config()))
    with pytest.raises(InvalidInputError, match="expected a dtype among"):
        refiner.save_pretrained(tmp_path / "other", dtype=torch.int16)
    assert not (tmp_path / "other").exists()
    folder = refiner.save_pretrained(tmp_path / "torn", dtype=torch.int8)
    weights = load_file(folder / "model.safetensors")
    scale = next(name for name in weights if name.endswith(".int8_scale"))
    del weights[scale]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="no finite numbers"):
        Refiner.from_pretrained(folder)
