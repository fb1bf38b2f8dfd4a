"""What every test shares: seeds, the development data, and a guard that keeps tests off the network."""

import importlib
import ipaddress
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


class NetworkBlockedError(RuntimeError):
    """A test reached for the network; deliberately no ``OSError``, which a client would catch and retry."""


def _is_loopback(host: object) -> bool:
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:  # a name: resolving it would already be a request
        return False


def _check(host: object) -> None:
    if not _is_loopback(host):
        raise NetworkBlockedError(
            f"expected a test to stay on loopback, got a connection to {host!r}; serve it on 127.0.0.1 or fake it"
        )


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse connections and name look-ups that leave this machine, for the whole run."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def checked_connect(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return connect(self, address)

    def checked_connect_ex(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return connect_ex(self, address)

    def checked_getaddrinfo(host, *args, **kwargs):
        _check(host.decode() if isinstance(host, bytes) else host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked_connect)
        patch.setattr(socket.socket, "connect_ex", checked_connect_ex)
        patch.setattr(socket, "getaddrinfo", checked_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same random weights, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Fail a test that leaves torch with another number of threads: sums of the tests after it round otherwise."""
    before = torch.get_num_threads()
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(before)
    assert left == before, f"expected {before} threads after the test, got {left}: use torch_threads"


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator with a fixed seed, fresh for each test."""
    return np.random.default_rng(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator on the CPU with a fixed seed, fresh for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the development sets, each with ``images``, ``annotations.json`` and ``detections.json``."""
    root = Path(os.environ.get("TRANSFINER_DATA", REPOSITORY.parent / "shared" / "data")).resolve()
    if not root.is_dir():
        pytest.skip(f"no development data in {root}: set TRANSFINER_DATA to the folder that holds the data sets")
    return root


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository to build in, so that nothing is left in the checkout; links stay links."""
    target = tmp_path_factory.mktemp("copy") / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs", "outputs")
    shutil.copytree(REPOSITORY, target, symlinks=True, ignore=ignored)
    return target


@pytest.fixture
def uninstall(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make an import of a package fail, and modules that may have it already, by the start of their names, come anew.

    Afterwards all is as before: packages hold the modules that ``sys.modules`` holds, too.
    """

    def remove(host: str, *starts: str) -> None:
        for name in [name for name in sys.modules if name == host or name.startswith((f"{host}.", *starts))]:
            package, _, child = name.rpartition(".")
            if hasattr(sys.modules.get(package), child):
                monkeypatch.delattr(sys.modules[package], child)
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, host, None)

    return remove


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the benchmarks as ``python benchmarks/NAME.py`` would see it."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module(name)

    return load


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import one of the scripts as ``python scripts/NAME.py`` would see it, the benchmarks beside it."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
        monkeypatch.syspath_prepend(REPOSITORY / "scripts")
        return importlib.import_module(name)

    return load
