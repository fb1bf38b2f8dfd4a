"""The page of ``transfiner-refine serve``: what visitors give is checked, what they get is right, nothing leaks."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from transfiner_refine import Refiner
from transfiner_refine.data.coco import load_results
from transfiner_refine.errors import InvalidInputError, MissingDependencyError
from transfiner_refine.functional.rle import decode, encode
from transfiner_refine.web import examples, refinement, server, uploads

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SIZE = (400, 600)
"""Of the bundled photo of a cup."""

PATIENCE = 120_000
"""Milliseconds that a step may take on a busy machine."""


@pytest.fixture(scope="module")
def refiner() -> Refiner:
    return Refiner.from_pretrained()


@pytest.fixture(scope="module")
def cup(tmp_path_factory: pytest.TempPathFactory) -> examples.Example:
    return examples.write_examples(tmp_path_factory.mktemp("examples"))[0]


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray]:
    """A bright disc on dark ground, and where it is."""
    rows, columns = np.mgrid[:120, :160]
    disc = (rows - 60) ** 2 + (columns - 80) ** 2 < 30**2
    return np.where(disc[..., None], (220, 200, 60), (30, 60, 90)).astype(np.uint8), disc


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


class TestPhotos:
    def test_orientation_is_applied(self, tmp_path: Path):
        stored = Image.new("RGB", (30, 20), "red")
        exif = Image.Exif()
        exif[0x0112] = 6  # a phone held upright
        stored.save(tmp_path / "phone.jpg", exif=exif)
        assert uploads.read_photo(tmp_path / "phone.jpg").shape == (30, 20, 3)

    @pytest.mark.parametrize(("name", "content"), [("a.jpg", b"no image"), ("a.png", b""), ("a.svg", b"<svg/>")])
    def test_what_is_no_image_is_refused(self, tmp_path: Path, name: str, content: bytes):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidInputError, match=rf"^{name} is not an image"):
            uploads.read_photo(tmp_path / name)

    def test_other_decoders_are_not_asked(self, tmp_path: Path):
        Image.new("P", (8, 8)).save(tmp_path / "a.gif")
        with pytest.raises(InvalidInputError, match="is not an image"):
            uploads.read_photo(tmp_path / "a.gif")

    def test_damaged_photo_is_refused(self, tmp_path: Path, cup: examples.Example):
        content = cup.photo.read_bytes()
        (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
        with pytest.raises(InvalidInputError, match=r"half\.jpg is damaged"):
            uploads.read_photo(tmp_path / "half.jpg")

    @pytest.mark.parametrize(("width", "height"), [(4001, 4000), (60_000, 60_000)])
    def test_too_many_pixels_are_refused_by_the_header(self, tmp_path: Path, width: int, height: int):
        def chunk(kind: bytes, data: bytes) -> bytes:
            return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
        with pytest.raises(InvalidInputError, match="16 million"):
            uploads.read_photo(tmp_path / "bomb.png")

    def test_too_many_bytes_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cup: examples.Example):
        monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
        with pytest.raises(InvalidInputError, match=r"coffee\.jpg has 0 MB"):
            uploads.read_photo(cup.photo)


class TestStrokes:
    def layer(self, painted: np.ndarray) -> np.ndarray:
        layer = np.zeros((*painted.shape, 4), np.uint8)
        layer[painted] = (86, 180, 233, 140)
        return layer

    def test_painted_disc_at_the_size_of_the_photo(self, scene: tuple[np.ndarray, np.ndarray]):
        disc = scene[1]
        mask = uploads.mask_of_strokes([self.layer(disc)], (240, 320))
        assert mask.shape == (240, 320) and iou(mask[::2, ::2], disc) > 0.95

    def test_closed_line_is_filled(self, scene: tuple[np.ndarray, np.ndarray]):
        disc = scene[1]
        line = disc & ~np.roll(disc, 3, axis=0) | disc & ~np.roll(disc, -3, axis=0)
        line |= disc & ~np.roll(disc, 3, axis=1) | disc & ~np.roll(disc, -3, axis=1)
        assert not line[60, 80]
        assert iou(uploads.mask_of_strokes([self.layer(line)], (120, 160)), disc) > 0.99

    def test_nothing_drawn(self):
        for layers in ([], [np.zeros((40, 60, 4), np.uint8)]):
            with pytest.raises(InvalidInputError, match="Nothing is drawn yet"):
                uploads.mask_of_strokes(layers, (80, 120))

    def test_board_of_another_photo(self):
        with pytest.raises(InvalidInputError, match="60 × 60 pixels and does not fit the photo of 120 × 80"):
            uploads.mask_of_strokes([np.full((60, 60, 4), 255, np.uint8)], (80, 120))


class TestBoxes:
    def test_box_is_cut_to_the_photo(self):
        assert uploads.check_box((-5, 2.4, 700, 30), (40, 60)) == (0, 2, 60, 30)

    @pytest.mark.parametrize("box", [(None, 0, 20, 20), (0, 0, float("nan"), 20)])
    def test_missing_number(self, box: tuple):
        with pytest.raises(InvalidInputError, match="incomplete"):
            uploads.check_box(box, (40, 60))

    @pytest.mark.parametrize("box", [(20, 0, 10, 30), (0, 0, 5, 30), (70, 0, 90, 30)])
    def test_box_without_area_in_the_photo(self, box: tuple):
        with pytest.raises(InvalidInputError, match="at least 8 × 8 pixels within the photo of 60 × 40"):
            uploads.check_box(box, (40, 60))

    def test_object_is_found_in_its_box(self, scene: tuple[np.ndarray, np.ndarray]):
        photo, disc = scene
        assert iou(uploads.mask_of_box(photo, (45, 25, 115, 95)), disc) > 0.9

    def test_box_around_everything(self, scene: tuple[np.ndarray, np.ndarray]):
        with pytest.raises(InvalidInputError, match="no background is left"):
            uploads.mask_of_box(scene[0], (0, 0, 160, 120))


class TestMaskFiles:
    def save(self, path: Path, mask: np.ndarray) -> Path:
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
        return path

    def test_images_and_results_are_read(self, tmp_path: Path, scene: tuple[np.ndarray, np.ndarray]):
        disc = scene[1]
        (mask,), entries = uploads.masks_of_files([self.save(tmp_path / "a.png", disc)], disc.shape)
        assert (mask == disc).all() and not entries
        (tmp_path / "a.json").write_text(json.dumps([{"image_id": 7, "segmentation": encode(disc[None])[0]}]))
        (mask,), (entry,) = uploads.masks_of_files([tmp_path / "a.json"], disc.shape)
        assert (mask == disc).all() and entry["image_id"] == 7

    def test_what_does_not_fit_is_refused(self, tmp_path: Path, scene: tuple[np.ndarray, np.ndarray]):
        disc = scene[1]
        small, empty = self.save(tmp_path / "small.png", disc[:90]), self.save(tmp_path / "empty.png", disc & False)
        entry = {"image_id": 1, "segmentation": encode(disc[None])[0]}
        several, foreign, broken = (tmp_path / f"{name}.json" for name in ("several", "foreign", "broken"))
        several.write_text(json.dumps([entry, {**entry, "image_id": 2}]))
        foreign.write_text(json.dumps([{**entry, "segmentation": encode(disc[None, :90])[0]}]))
        broken.write_text("{")
        for paths, message in (
            ([], "no mask yet"),
            ([small], r"small\.png has 160 × 90 pixels, and the photo 160 × 120"),
            ([empty], r"empty\.png is empty"),
            ([small, broken], "not 2 files"),
            ([several], "results of 2 photos"),
            ([foreign], "entry 0"),
            ([broken], r"got broken\.json, which is not JSON"),
        ):
            with pytest.raises(InvalidInputError, match=message) as error:
                uploads.masks_of_files(paths, disc.shape)
            assert str(tmp_path) not in str(error.value), "a visitor is not shown where files lie"

    def test_memory_of_all_masks_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(uploads, "MAX_MASK_PIXELS", 100)
        with pytest.raises(InvalidInputError, match="at most 2 masks"):
            uploads.masks_of_files([tmp_path / f"{number}.png" for number in range(3)], (10, 5))

    def test_number_of_masks_is_bounded_however_small_the_photo(self, tmp_path: Path):
        entry = {"image_id": 1, "segmentation": encode(np.ones((1, 20, 30), bool))[0]}
        path = tmp_path / "many.json"
        path.write_text(json.dumps([entry] * 100))
        masks, _ = uploads.masks_of_files([path], (20, 30))
        assert len(masks) == 100
        path.write_text(json.dumps([entry] * 101))
        for paths in ([path], [tmp_path / f"{number}.png" for number in range(101)]):
            with pytest.raises(InvalidInputError, match="at most 100 masks of a photo, and these are 101: use the"):
                uploads.masks_of_files(paths, (20, 30))


@pytest.fixture(scope="module")
def done(refiner: Refiner, cup: examples.Example) -> refinement.Refinement:
    """The cup, refined."""
    photo = uploads.read_photo(cup.photo)
    masks, entries = uploads.masks_of_files([cup.results], SIZE)
    options = refinement.options_of(3, 0.5, False)
    return refinement.refine(refiner, photo, masks, name="coffee", entries=entries, options=options)


class TestRefinement:
    def test_files_hold_the_refined_mask(self, done: refinement.Refinement, tmp_path: Path, cup: examples.Example):
        picture, results = refinement.write_files(done, tmp_path)
        refined = done.refined.masks[0].numpy()
        assert (np.array(Image.open(picture)) == refined * 255).all()
        (entry,), (given,) = load_results(results), load_results(cup.results)
        assert (decode(entry["segmentation"], SIZE) == refined).all() and (
            refined != done.coarse.masks[0].numpy()
        ).any()
        assert {**entry, "segmentation": 0} == {**given, "segmentation": 0}

    def test_look_draws_over_the_same_picture(self, done: refinement.Refinement, refiner: Refiner):
        before, after = refinement.before_and_after(done)
        picture, line = refinement.look(refiner, done, (790, 300), 2)
        assert picture.shape == before.shape == after.shape
        assert "Node of level" in line and "coarse reference grid" in line

    def test_summary_says_what_was_kept(self, refiner: Refiner, scene: tuple[np.ndarray, np.ndarray]):
        photo, disc = scene
        # No refinement promises to win everything.
        options = replace(refinement.options_of(3, 0.5, False), keep_if_gain_below=1.0)
        done = refinement.refine(refiner, photo, [disc], name="disc", options=options)
        assert done.refined.kept_coarse is not None and bool(done.refined.kept_coarse[0])
        assert "The coarse mask was kept" in refinement.summary(done)


class Served(NamedTuple):
    """The page, served by its command."""

    url: str
    port: int
    folder: Path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The running page, in a process of its own: Gradio leaves sockets and event loops open, which pytest reports."""
    pytest.importorskip("gradio", reason='the page needs the extra "demo"')
    folder = tmp_path_factory.mktemp("served")
    with socket.create_server((server.HOST, 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", "from transfiner_refine.cli import main; main()", "serve"]
    # A proxy that does not answer: Gradio calls its own address when it starts, which must not go through one.
    proxy = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")
    environment = os.environ | proxy | {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, "--port", str(port)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert match is not None, line
        yield Served(match[0], port, folder)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert not any(folder.iterdir()), "the files of visitors are removed at the end"


def take_example(page: Served) -> list[Any]:
    """Click on the first example, as the page's script does; returns what the page is told."""
    session = "tests"
    click = {"data": [], "fn_index": 0, "session_hash": session, "event_data": {"index": 0, "value": None}}
    request = urllib.request.Request(
        f"{page.url}gradio_api/queue/join", json.dumps(click).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{page.url}gradio_api/queue/data?session_hash={session}") as lines:
        messages = (json.loads(line[5:]) for line in lines if line.startswith(b"data:"))
        done = next(message for message in messages if message["msg"] == "process_completed")
    assert done["success"], done
    return done["output"]["data"]


class FakePage:
    """Stands for the page that Gradio makes; starting it fails with ``error``."""

    error: Exception | None = None
    closed = False

    def launch(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error

    def close(self, verbose: bool) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePage:
    """The page that is served in this process, without Gradio."""
    page = FakePage()
    stub = SimpleNamespace(Handlers=lambda *_: None, build=lambda _: page, CSS="", THEME=None)
    for name in ("handlers", "page"):
        monkeypatch.setitem(sys.modules, f"transfiner_refine.web.{name}", stub)
    return page


class TestServer:
    def test_gradio_is_an_extra(self, refiner: Refiner, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "mine")
        limit = Image.MAX_IMAGE_PIXELS
        for name in ("gradio", "transfiner_refine.web.handlers", "transfiner_refine.web.page"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingDependencyError, match=r"transfiner-refine\[demo\]"), server.running(refiner):
            pass
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "mine" and "GRADIO_TEMP_DIR" not in os.environ
        assert limit == Image.MAX_IMAGE_PIXELS

    def test_address_that_cannot_be_had(self, refiner: Refiner):
        with socket.create_server((server.HOST, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(InvalidInputError, match="choose another"), server.running(refiner, port=port):
                pass

    @pytest.mark.parametrize(("name", "given"), [("NO_PROXY", "a.org"), ("no_proxy", "a.org"), ("no_proxy", None)])
    def test_no_proxy_is_asked_for_the_page(
        self, refiner: Refiner, fake: FakePage, monkeypatch: pytest.MonkeyPatch, name: str, given: str | None
    ):
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
        before = dict(os.environ)
        with server.running(refiner, "127.0.0.1", port=0):
            for variable in ("NO_PROXY", "no_proxy"):
                assert os.environ[variable].split(",") == [*filter(None, [given]), "127.0.0.1", "localhost"]
        assert dict(os.environ) == before and fake.closed

    def test_a_page_that_does_not_start_is_one_line(self, refiner: Refiner, fake: FakePage):
        fake.error = RuntimeError("no\nway")
        with (
            pytest.raises(InvalidInputError, match="got RuntimeError: no way; choose another") as error,
            server.running(refiner, port=0),
        ):
            pass
        assert fake.closed and "\n" not in str(error.value)

    def test_an_error_while_the_page_is_served_stays_what_it_is(self, refiner: Refiner, fake: FakePage):
        with pytest.raises(RuntimeError, match="later"), server.running(refiner, port=0):
            raise RuntimeError("later")
        assert fake.closed

    def test_an_example_can_be_taken_again_after_its_files_were_deleted(self, page: Served):
        for _ in range(2):
            photo, _, (results,) = take_example(page)
            taken = [Path(file["path"]) for file in (photo, results)]
            assert [path.name for path in taken] == ["coffee.jpg", "coffee.json"]
            for path in taken:
                path.unlink()  # as Gradio does with old files that a handler returned

    @pytest.mark.skipif(sys.platform != "linux", reason="only there is all of 127.0.0.0/8 this machine")
    def test_listens_on_one_address(self, page: Served):
        socket.create_connection(("127.0.0.1", page.port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", page.port))

    @pytest.mark.parametrize("path", ["/etc/hostname", str(Path(server.__file__)), "pyproject.toml"])
    def test_other_files_are_not_served(self, page: Served, path: str):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{page.url}gradio_api/file={path}")
        assert error.value.code in (403, 404)
        error.value.close()

    def test_large_uploads_are_refused(self, page: Served):
        head = b'--part\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + bytes(uploads.MAX_BYTES + 1000) + b"\r\n--part--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=part"}
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(f"{page.url}gradio_api/upload", body, kind))
        assert error.value.code == 413
        error.value.close()
        assert all(path.stat().st_size < uploads.MAX_BYTES for path in page.folder.rglob("*"))


class Visitor:
    """A browser with the page open."""

    def __init__(self, tab: Any):
        self.tab = tab
        self.foreign: list[str] = []
        tab.set_default_timeout(PATIENCE)
        tab.on("request", lambda request: self._note(request.url))

    def _note(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.foreign.append(url)

    def message(self) -> str:
        """The message that is shown, which is then closed: it fades, and must be gone before the next one is read."""
        text = self.tab.locator(".toast-body").first.inner_text()
        self.tab.locator(".toast-close").first.click()
        self.tab.wait_for_selector(".toast-body", state="detached")
        return text

    def wait_for_new(self, selector: str, old: str | None) -> str:
        """The source of a picture, once it is another than ``old`` and has its place, below which all has moved."""
        code = """([selector, old]) => {
            const picture = document.querySelector(selector)
            return picture && picture.src != old && picture.complete && picture.naturalHeight > 0
        }"""
        self.tab.wait_for_function(code, arg=[selector, old or ""])
        return self.tab.locator(selector).first.get_attribute("src")


@pytest.fixture(scope="module")
def open_page(page: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Visitor]]:
    reason = "the page is tried out in a browser by playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    if not CHROMIUM.exists():
        pytest.skip(f"no browser in {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        profile = tmp_path_factory.mktemp("profile")
        browser = driver.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS, viewport={"width": 1360, "height": 1000}
        )

        def visit() -> Visitor:
            visitor = Visitor(browser.new_page())
            visitor.tab.goto(page.url)
            visitor.tab.wait_for_selector("#refine")
            return visitor

        yield visit
        browser.close()


def test_example_is_refined_compared_looked_into_and_downloaded(open_page: Callable[[], Visitor], tmp_path: Path):
    visitor = open_page()
    tab = visitor.tab
    tab.click("#refine")
    assert "There is no photo yet" in visitor.message()
    tab.locator("#examples button").first.click()
    tab.wait_for_selector("#masks")  # its place is above the button, which a click would miss while it moves
    visitor.wait_for_new("#preview img", None)
    tab.click("#refine")
    tab.wait_for_selector("#status >> text=1 mask refined")

    slider = tab.locator("#slider")
    tab.wait_for_function("document.querySelectorAll('#slider img').length >= 2")
    before, box = slider.screenshot(), slider.bounding_box()
    assert box is not None
    handle = slider.locator(".inner, .handle").first.bounding_box() or box
    tab.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.2 * box["width"], handle["y"] + handle["height"] / 2, steps=4)
    tab.mouse.up()
    assert slider.screenshot() != before

    tab.get_by_role("tab", name="Attention").click()
    look = tab.locator("#look img").first
    old = look.get_attribute("src")
    shown = look.bounding_box()
    assert shown is not None
    look.click(position={"x": 0.66 * shown["width"], "y": 0.37 * shown["height"]})
    visitor.wait_for_new("#look img", old)
    tab.wait_for_selector("#look-line >> text=Node of level")

    files = {}
    for kind in ("png", "json"):
        with tab.expect_download() as download:
            tab.click(f"#download-{kind}")
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    (entry,) = load_results(files["json"])
    assert entry["category_id"] == 47 and files["json"].name == "coffee_refined.json"
    with Image.open(files["png"]) as mask:
        assert (np.array(mask) == decode(entry["segmentation"], SIZE) * 255).all()
    assert not visitor.foreign, "the page has to work without the internet"


def test_wrong_files_are_explained(open_page: Callable[[], Visitor], tmp_path: Path, cup: examples.Example):
    visitor = open_page()
    tab = visitor.tab
    wrong = tmp_path / "notes.jpg"
    wrong.write_text("no photo")
    tab.set_input_files("#photo input[type=file]", wrong)
    assert "notes.jpg is not an image" in visitor.message()
    tab.get_by_label("Upload it").click()
    tab.set_input_files("#photo input[type=file]", cup.photo)
    tab.wait_for_selector("#photo >> text=coffee.jpg")
    other = tmp_path / "other.png"
    Image.new("L", (300, 200), 255).save(other)
    tab.set_input_files("#masks input[type=file]", other)
    assert "other.png has 300 × 200 pixels, and the photo 600 × 400" in visitor.message()


def test_box_is_tapped(open_page: Callable[[], Visitor], cup: examples.Example):
    visitor = open_page()
    tab = visitor.tab
    tab.get_by_label("Give a box").click()
    tab.set_input_files("#photo input[type=file]", cup.photo)
    picture = visitor.wait_for_new("#preview img", None)
    for x, y in ((160, 20), (420, 330)):
        shown = tab.locator("#preview img").first.bounding_box()
        assert shown is not None
        scale = shown["width"] / SIZE[1]
        tab.locator("#preview img").first.click(position={"x": x * scale, "y": y * scale})
        picture = visitor.wait_for_new("#preview img", picture)
    # The picture may be drawn once more for the first tap; the numbers tell when the second one has arrived.
    corners = "[...document.querySelectorAll('#box input')].map(field => Number(field.value))"
    tab.wait_for_function(f"(([left, top, right, bottom]) => right > left && bottom > top)({corners})")
    values = [float(field.input_value()) for field in tab.locator("#box input").all()]
    assert values == pytest.approx([160, 20, 420, 330], abs=3)
    tab.click("#refine")
    tab.wait_for_selector("#status >> text=1 mask refined")
