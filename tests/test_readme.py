"""README.md and docs/ tell the truth: every snippet and command runs, every file and name that they mention exists.

A block is left out only by a comment right before it, ``<!-- not run: the reason -->``.
"""

import ast
import glob
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import transfiner_refine
from transfiner_refine import RefineOptions, cli
from transfiner_refine.data.coco import load_results, write_json_atomic
from transfiner_refine.functional.rle import decode

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "transfiner_refine" / "assets" / "demo"
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
CARD = REPOSITORY / "transfiner_refine" / "pretrained" / "README.md"

NOT_RUN = ("make ", "pip ")
"""Commands that make an environment or run these very tests; test_install.py covers the installation."""

NEED_THE_NETWORK = ("released.md",)
"""Documents about weights that have to be downloaded: their blocks are checked, not run."""

SHORTENED = {
    "python benchmarks/quality.py": "--limit 2 --no-grabcut --no-oracle",
    "python benchmarks/scaling.py": "--repeats 1 --no-memory",
    "python benchmarks/detector.py": "--limit 2",
}
"""Benchmarks, and what makes a run of minutes a short one."""

HOSTS = {"detectron2", "mmdet", "transformers"}
"""Frameworks that pages import, and that not every environment has."""

IN_SHELL = ("transfiner-refine demo",)
"""Commands that go the whole way, through the installed script."""

PARTS = {path.stem for path in (REPOSITORY / "transfiner_refine").iterdir() if path.suffix in ("", ".py")}


class Block(NamedTuple):
    """A fenced block of a document."""

    name: str
    language: str
    text: str
    is_run: bool


def blocks(document: Path, language: str) -> list[Block]:
    """The blocks of a language, in order; a block is named by its document and line."""
    text = document.read_text(encoding="utf-8")
    fences = re.finditer(r"(<!-- not run: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = []
    for fence in fences:
        name = f"{document.name}:{text[: fence.start(3)].count(chr(10)) + 1}"
        is_run = fence[1] is None and document.name not in NEED_THE_NETWORK
        found.append(Block(name, fence[2], fence[3], is_run))
    return [block for block in found if block.language == language]


def commands(document: Path) -> list[str]:
    """The lines of the bash blocks that are to be run; a backslash at the end continues a line."""
    texts = [block.text.replace("\\\n", " ") for block in blocks(document, "bash") if block.is_run]
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith(("#", *NOT_RUN))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: a photo, its masks as images, and a detector's results."""
    folder = tmp_path_factory.mktemp("reader")
    (entry,) = (x for x in load_results(DEMO / "detections.json") if x["category_id"] == 17)
    size = tuple(entry["segmentation"]["size"])
    shutil.copy(DEMO / "chelsea.jpg", folder / "photo.jpg")
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    shutil.copy(DEMO / "chelsea.jpg", folder / "photos" / "000000000001.jpg")
    Image.fromarray(decode(entry["segmentation"], size).astype(np.uint8) * 255).save(folder / "masks" / "cat.png")
    for name in ("dets.json", "coarse.json", "refined.json"):
        write_json_atomic(folder / name, [entry])
    image = {"id": entry["image_id"], "file_name": "000000000001.jpg", "height": size[0], "width": size[1]}
    truth = {"images": [image], "annotations": [{"id": 1, **entry}], "categories": [{"id": 17, "name": "cat"}]}
    write_json_atomic(folder / "annotations.json", truth)
    for name in ("benchmarks", "examples"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def run_in_shell(command: str, folder: Path) -> None:
    """Run one line as a reader would who has this environment; it must not fail."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def run_here(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one ``transfiner-refine`` line by its entry point: a new Python takes seconds to import torch."""
    words = shlex.split(command)
    monkeypatch.setattr("sys.argv", [file for word in words for file in sorted(glob.glob(word)) or [word]])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_python_blocks_run_in_order(document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(document, "python"):
        if block.is_run:
            exec(compile(block.text, block.name, "exec", flags=0, dont_inherit=True), namespace)


COMMANDS = [command for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize("command", [x for x in COMMANDS if not x.startswith(tuple(SHORTENED))])
def test_commands_run_and_write_their_output(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    if command.startswith("transfiner-refine ") and command not in IN_SHELL:
        run_here(command, monkeypatch)
    else:
        run_in_shell(command, folder)
    outputs = [value for option, value in pairwise(shlex.split(command)) if option in ("--output", "--json")]
    for output in outputs or ["outputs/demo"]:
        assert Path(output).exists(), f"{command}: wrote no {output}"


@pytest.mark.parametrize("benchmark", ["python benchmarks/quality.py", "python benchmarks/detector.py"])
def test_benchmarks_on_photos_run(benchmark: str, folder: Path, data_root: Path):
    (command,) = (x for x in COMMANDS if x.startswith(benchmark))
    run_in_shell(f"{command} {SHORTENED[benchmark]}", folder)


@pytest.mark.slow
def test_scaling_command_runs(folder: Path):
    (command,) = (x for x in COMMANDS if x.startswith("python benchmarks/scaling.py"))
    run_in_shell(f"{command} {SHORTENED['python benchmarks/scaling.py']}", folder)


def test_the_readme_has_what_is_run():
    readme = DOCUMENTS[0]
    assert sum(block.is_run for block in blocks(readme, "python")) >= 3
    assert {command.split()[1] for command in commands(readme) if command.startswith("transfiner-refine ")} == {
        "benchmark",
        "demo",
        "image",
        "coco",
        "evaluate",
    }


@pytest.mark.parametrize("document", [*DOCUMENTS, CARD], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_blocks_that_are_not_run_are_valid_and_import_what_exists(document: Path):
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block.text, block.name)):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not is_missing_host(node):
                exec(compile(ast.Module([node], []), block.name, "exec"), {})


def is_missing_host(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether a framework is imported that not every environment has."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    roots = {part for name in names for part in name.split(".")} & HOSTS
    return any(importlib.util.find_spec(root) is None for root in roots)


def test_options_table_is_the_dataclass():
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    table = re.search(r"^\| option \| default .*?\n\n", readme, re.MULTILINE | re.DOTALL)
    assert table is not None
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table[0], re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, default in rows} == {
        field.name: field.default for field in fields(RefineOptions)
    }


@pytest.mark.parametrize("document", [*DOCUMENTS, CARD], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_and_pictures_exist(document: Path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [x for x in targets if "://" not in x and not (document.parent / x).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_names_of_the_code_exist(document: Path):
    """Every dotted name in backticks that begins with a part of the package, such as ``functional.boxes``."""
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", document.read_text(encoding="utf-8"))
    for name in names:
        if name.split(".")[0] in PARTS and not name.endswith((".json", ".onnx", ".py")):
            assert resolves(name), f"{document.name} mentions {name}, which does not exist"


def resolves(name: str) -> bool:
    """Whether a dotted name leads from the package to a module, a function, a class or a field of one."""
    value: object = transfiner_refine
    path = "transfiner_refine"
    for part in name.split("."):
        path += f".{part}"
        if hasattr(value, part):
            value = getattr(value, part)
        elif part in getattr(value, "__annotations__", {}):
            value = None
        else:
            try:
                value = importlib.import_module(path)
            except ModuleNotFoundError:
                return False
    return True


def test_a_name_that_is_gone_is_noticed():
    assert resolves("functional.incoherence.incoherence_map")
    assert resolves("config.TransfinerConfig.decoder")
    assert not resolves("functional.incoherence.gone")
    assert not resolves("gone.module")


def test_pictures_are_small():
    for picture in (REPOSITORY / "docs" / "images").glob("*.png"):
        assert picture.stat().st_size <= 300_000, picture.name
