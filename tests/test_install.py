"""The whole way to a user: sdist, wheel from the sdist, an empty environment, and a refinement without a network."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OFFLINE_REFINE = """
import socket

def refuse(*args, **kwargs):
    raise RuntimeError(f"reached for the network: {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

import numpy as np
import transfiner_refine

assert "site-packages" in transfiner_refine.__file__, transfiner_refine.__file__
rows, columns = np.mgrid[:120, :160]
disc = (rows - 60) ** 2 + (columns - 80) ** 2 < 40**2
image = np.where(disc[..., None], 200, 40).astype(np.uint8).repeat(3, axis=2)
coarse = np.roll(disc, 3, axis=1)[None]
out = transfiner_refine.Refiner.from_pretrained().refine(image, masks=coarse)
masks = np.asarray(out.masks)
assert masks.shape == (1, 120, 160) and masks.dtype == bool, (masks.shape, masks.dtype)
iou = (masks[0] & disc).sum() / (masks[0] | disc).sum()
print(f"IoU with the disc: {iou:.3f}")
assert iou > 0.8, iou
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command in an environment of its own; on failure show all that it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(source_copy: Path) -> Path:
    """A folder with the sdist and with the wheel that was built from it."""
    run(sys.executable, "-m", "build", cwd=source_copy)
    return source_copy / "dist"


def test_sdist_holds_the_adapters_once_and_the_tests(distributions: Path):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert "adapters/__init__.py" in names
    assert not any(name.startswith("transfiner_refine/adapters/") for name in names)
    assert {"tests/conftest.py", "LICENSE", "CHANGELOG.md", "transfiner_refine/py.typed"} <= names


def test_wheel_refines_offline_in_an_empty_environment(distributions: Path, tmp_path: Path):
    (wheel,) = distributions.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    install = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    run(*install, wheel, cwd=tmp_path)

    home = tmp_path / "home"
    home.mkdir()
    print(run(python, "-I", "-c", OFFLINE_REFINE, cwd=tmp_path, HOME=str(home), XDG_CACHE_HOME=str(home / "cache")))
    print(run(python.with_name("transfiner-refine"), "demo", "--output", "demo", cwd=tmp_path, HOME=str(home)))
    assert (tmp_path / "demo" / "refined.json").is_file()
