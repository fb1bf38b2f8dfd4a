"""What gets installed, and which part of the package may import which."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

BASE = {"errors", "config", "arrays", "types"}
STACK = BASE | {"functional", "modeling", "inputs"}
ON_THE_STACK = {"data", "evaluation", "training"}
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "arrays": {"errors"},
    "types": {"errors", "config", "arrays"},
    "functional": BASE,
    "inputs": BASE | {"functional"},
    "modeling": BASE | {"functional"},
    "proposals": BASE | {"functional", "modeling"},
    "pipeline": STACK | {"proposals"},
    "refiner": STACK | {"pipeline"},
    "canvas": set(),
    "threads": set(),
    "visualize": STACK | {"canvas"},
    "attention": STACK | {"canvas", "refiner", "visualize"},
    "data": STACK | ON_THE_STACK,
    "evaluation": STACK | ON_THE_STACK,
    # A model in training is validated by the inference that its users will run.
    "training": STACK | ON_THE_STACK | {"refiner"},
    "bulk": STACK | ON_THE_STACK | {"refiner", "threads"},
    "web": STACK | {"data", "refiner", "canvas", "visualize", "attention"},
    # It traces the network's modules, and repeats around the graphs what the pipeline does around the network.
    "export": STACK | {"data", "proposals", "pipeline", "refiner"},
    "commands": STACK | ON_THE_STACK | {"refiner", "threads", "visualize", "bulk", "export", "web"},
    "cli": STACK | ON_THE_STACK | {"refiner", "visualize", "bulk", "export", "commands"},
}
"""Part of the package: the other parts that it may import."""

EXCEPTIONS = {
    # A result turns itself into RLE on request; the import waits inside of that method, so no cycle arises.
    ("transfiner_refine.types", "transfiner_refine.functional.rle"),
    # The released model is a detector and a refiner in one: like `Refiner`, it takes the user's image.
    ("transfiner_refine.modeling.released", "transfiner_refine.inputs"),
    # The command that trains a detector with its refiner; the imports wait until it is called.
    ("transfiner_refine.commands.train_joint", "transfiner_refine.adapters.models"),
    ("transfiner_refine.commands.train_joint", "transfiner_refine.adapters.training"),
    # For type checkers alone: what an adapter makes, which is built on the adapter.
    ("transfiner_refine.adapters.protocol", "transfiner_refine.adapters.joint"),
}
"""(module, what it may import all the same)."""

HOSTS = {
    "detectron2": "detectron2",
    "fvcore": "detectron2",
    "mmcv": "mmdet",
    "mmdet": "mmdet",
    "mmengine": "mmdet",
    "supervision": "supervision",
    "torchvision.models.detection": "torchvision",
    "transformers": "transformers",
    "ultralytics": "ultralytics",
}
"""Import name: host framework. The core uses torchvision too, so that only its detectors count as a host."""

ADAPTERS = "transfiner_refine.adapters"
SHARED = {f"{ADAPTERS}.{name}" for name in ("protocol", "joint", "saving")}
"""The modules that the adapters share."""

LOADED_ON_DEMAND = {
    "accelerate",
    "datasets",
    "faster_coco_eval",
    "gradio",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "ray",
    "rich",
    "typer",
} | {name for name in HOSTS if not name.startswith("torchvision")}

WINDOWS = {"imshow", "namedWindow", "waitKey", "destroyAllWindows", "selectROI", "createTrackbar"}
"""Functions of OpenCV that its headless wheel lacks."""


def package_files() -> Iterator[Path]:
    """Every file below ``transfiner_refine``, relative to the repository; the adapters are found through the link."""
    for folder, subfolders, names in os.walk(REPOSITORY / "transfiner_refine", followlinks=True):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        yield from (Path(folder, name).relative_to(REPOSITORY) for name in names)


def sources() -> dict[str, str]:
    """Dotted module name: source text."""
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): (REPOSITORY / path).read_text(encoding="utf-8")
        for path in package_files()
        if path.suffix == ".py"
    }


def imported_names(module: str, source: str, modules: set[str]) -> Iterator[str]:
    """Absolute name of everything that a module imports, inside of functions too.

    ``from package import name`` counts as ``package.name`` where that is a module, and as ``package`` where it is not.
    """
    is_package = any(name.startswith(f"{module}.") for name in modules)
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if name in modules or host_of(name) else origin


def host_of(name: str) -> str | None:
    """The host framework that an imported name belongs to."""
    return next((host for root, host in HOSTS.items() if name == root or name.startswith(f"{root}.")), None)


def part_of(name: str) -> str:
    """The part of the package that a module belongs to: ``functional``, ``refiner``; empty for the package itself."""
    return [*name.split("."), ""][1]


def forbidden_imports(module: str, source: str, modules: set[str]) -> list[str]:
    """What a module imports against the rules, one line each."""
    names = list(imported_names(module, source, modules))
    hosts = sorted({host for name in names if (host := host_of(name))})
    own = sorted({name for name in names if name.split(".")[0] == "transfiner_refine"})
    part = part_of(module)
    if module == ADAPTERS:
        forbidden = hosts
    elif part == "adapters":
        # An adapter of more than one file names the others after the first.
        family = f"{ADAPTERS}.{module.removeprefix(f'{ADAPTERS}.').split('_')[0]}"
        others = [
            name
            for name in own
            if name.startswith(f"{ADAPTERS}.") and name not in SHARED | {family} and not name.startswith(f"{family}_")
        ]
        forbidden = others + (hosts if len(hosts) > 1 else [])
    elif part == "":
        forbidden = hosts + [name for name in own if part_of(name) == "adapters"]
    else:
        forbidden = hosts + [name for name in own if part_of(name) not in MAY_IMPORT[part] | {part}]
    return [f"{module} imports {name}" for name in forbidden if (module, name) not in EXCEPTIONS]


def test_imports_follow_the_layers():
    found = sources()
    parts = {part_of(module) for module in found}
    assert parts <= {"", "adapters", *MAY_IMPORT}, "a new part of the package needs a place in MAY_IMPORT"
    forbidden = [line for module, source in found.items() for line in forbidden_imports(module, source, set(found))]
    assert not forbidden, "\n".join(forbidden)


def test_no_module_imports_itself_through_others():
    found = sources()
    graph = {
        module: {name for name in imported_names(module, source, set(found)) if (module, name) not in EXCEPTIONS}
        for module, source in found.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


MODULES = {
    "transfiner_refine",
    "transfiner_refine.errors",
    "transfiner_refine.functional",
    "transfiner_refine.functional.boxes",
    "transfiner_refine.modeling",
    "transfiner_refine.modeling.transfiner",
    "transfiner_refine.refiner",
    "transfiner_refine.cli",
    "transfiner_refine.adapters",
    "transfiner_refine.adapters.protocol",
    "transfiner_refine.adapters.mmdet",
    "transfiner_refine.adapters.torchvision",
}


@pytest.mark.parametrize(
    ("module", "source", "is_allowed"),
    [
        ("functional.boxes", "from transfiner_refine.errors import InvalidInputError", True),
        ("functional.boxes", "from ..errors import InvalidInputError", True),
        ("functional.boxes", "from transfiner_refine.modeling.transfiner import Transfiner", False),
        ("functional.boxes", "from ..modeling import transfiner", False),
        ("functional.boxes", "def f():\n    import transfiner_refine.refiner", False),
        ("functional.boxes", "from transfiner_refine import refiner", False),
        ("functional.boxes", "from transfiner_refine import Refiner", False),
        ("errors", "import transfiner_refine.config", False),
        ("modeling.transfiner", "from . import transfiner", True),
        ("refiner", "from transfiner_refine.cli import main", False),
        ("refiner", "from transfiner_refine.adapters import adapt", False),
        ("refiner", "from transfiner_refine import adapters", False),
        ("refiner", "import mmdet.apis", False),
        ("refiner", "from torchvision.models import detection", False),
        ("refiner", "from torchvision.ops import roi_align", True),
        ("adapters.mmdet", "from mmdet.apis import init_detector\nimport mmcv, mmengine", True),
        ("adapters.mmdet", "import mmdet\nimport detectron2", False),
        ("adapters.mmdet", "from transfiner_refine import Refiner\nfrom .protocol import Prediction", True),
        ("adapters.mmdet", "from .torchvision import TorchvisionAdapter", False),
        ("adapters.mmdet", "from .mmdet_heads import Head", True),
        ("adapters.mmdet_heads", "from .mmdet import MMDetAdapter", True),
        ("adapters.mmdet_heads", "from .torchvision import TorchvisionAdapter", False),
        ("adapters.torchvision", "from .mmdet_heads import Head", False),
        ("adapters", "def adapt(model):\n    from .mmdet import MMDetAdapter", True),
        ("adapters", "import mmdet", False),
    ],
)
def test_the_check_of_imports_knows_right_from_wrong(module: str, source: str, is_allowed: bool):
    assert (not forbidden_imports(f"transfiner_refine.{module}", source, MODULES)) == is_allowed


def test_import_loads_no_optional_dependency():
    """The package is imported within other programs: what only a command or an extra needs has to wait."""
    code = """if True:
        import json, sys
        import transfiner_refine
        alone = list(sys.modules)
        import transfiner_refine.adapters
        print(json.dumps([alone, list(sys.modules)]))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, with_adapters = (set(names) for names in json.loads(run.stdout))
    assert "transfiner_refine.refiner" in alone
    assert not alone & {"transfiner_refine.adapters", "transfiner_refine.cli"}
    assert not with_adapters & LOADED_ON_DEMAND


def test_no_window_of_opencv_is_used():
    used = {
        (module, node.attr)
        for module, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in WINDOWS
        if isinstance(node.value, ast.Name) and node.value.id == "cv2"
    }
    assert not used


@pytest.fixture(scope="module")
def wheel(source_copy: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel of this tree."""
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source_copy, capture_output=True, check=True)
    (path,) = (source_copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_every_file_of_the_tree(wheel: zipfile.ZipFile):
    """A subpackage or a data file that pyproject.toml does not list would be missing from the wheel alone."""
    contents = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert contents == {path.as_posix() for path in package_files()}


def test_wheel_installs_one_import_name_one_command_and_the_licence(wheel: zipfile.ZipFile):
    metadata = {name.split("/", 1)[1]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert metadata["top_level.txt"].split() == ["transfiner_refine"]
    assert "transfiner-refine = transfiner_refine.cli:main" in metadata["entry_points.txt"]
    assert "Apache License" in metadata["licenses/LICENSE"]


def test_wheel_is_small_enough_to_carry_the_model(wheel: zipfile.ZipFile):
    assert wheel.filename is not None
    assert os.path.getsize(wheel.filename) < 25e6
