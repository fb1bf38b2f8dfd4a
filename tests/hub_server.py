"""A small Hugging Face Hub on 127.0.0.1, and the real client in a process of its own that is pointed at it.

The client reads ``HF_ENDPOINT`` when it is imported, so it cannot be redirected in the process that runs the tests.
"""

import base64
import hashlib
import json
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_writer"


@dataclass
class Repository:
    """Files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class FakeHub:
    """The state of the Hub, and its faults.

    Attributes:
        repositories: By ``"org/name"``.
        requests: ``"METHOD path"`` of each request.
        fault: Called with the request's handler; returns true if it has answered instead of the Hub.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fault: Callable[[Handler], bool] | None = None
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Go down: connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def publish(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit ``files`` to a branch, creating the repository if needed; returns the commit."""
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(repr((name, len(repository.commits), sorted(files))).encode()).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches.get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    """The requests that ``hf_hub_download``, ``create_repo`` and ``upload_folder`` make."""

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the output of the tests clean."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def hang_up(self) -> None:
        """Close the connection without a word."""
        self.close_connection = True

    def handle_request(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.fault is not None and self.hub.fault(self):
            return
        for method, pattern, act in ROUTES:
            match = re.fullmatch(pattern, self.path.partition("?")[0])
            if match and self.command in method.split("|"):
                act(self, *match.groups())
                return
        self.refuse(501, "NotPartOfTheFakeHub")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse(401, "RepoNotFound")  # the Hub does not tell strangers what exists
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403, "GatedRepo")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        content = repository.commits[commit].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)

    def create(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.answer(409, json.dumps({"url": f"{self.hub.endpoint}/{name}"}).encode())
        self.hub.repositories[name] = Repository()
        self.answer_json({"url": f"{self.hub.endpoint}/{name}", "id": name})

    def check_card(self) -> None:
        self.answer_json({"errors": [], "warnings": []})

    def choose_upload(self, name: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer_json({"files": files})

    def offer_upload(self, name: str) -> None:
        objects = [
            wanted | {"actions": {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.answer_json({"transfer": "basic", "objects": objects})

    def store_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "WrongDigest")
        self.hub.large_files[oid] = self.body
        self.answer(200)

    def commit(self, name: str, revision: str) -> None:
        files: dict[str, bytes] = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
        commit = self.hub.publish(name, files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": url})


ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.check_card),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", Handler.choose_upload),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.offer_upload),
    ("PUT", r"/large/([0-9a-f]+)", Handler.store_large),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", Handler.commit),
]


class Client:
    """``Refiner`` in another process, whose Hub is the fake one."""

    def __init__(self, pool: ProcessPoolExecutor):
        self._pool = pool

    def load(self, name: str, **options: Any) -> dict[str, Any]:
        """The config and the weights (as numpy) of ``Refiner.from_pretrained(name, **options)``."""
        return self._pool.submit(_load, name, options).result(timeout=300)

    def push(self, directory: Path, name: str, **options: Any) -> str:
        """``Refiner.from_pretrained(directory).push_to_hub(name, **options)``."""
        return self._pool.submit(_push, directory, name, options).result(timeout=300)


@contextmanager
def client_of(hub: FakeHub, home: Path) -> Iterator[Client]:
    """A client of ``hub`` with its cache and its (absent) login in ``home``."""
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",  # the fake Hub speaks the protocol before it
        "HF_HUB_VERBOSITY": "error",
        "NO_PROXY": "127.0.0.1",
    }
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, context, initializer=_do_not_wait) as pool:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        pool.submit(_do_not_wait).result(timeout=300)  # the process starts here, with this environment
        yield Client(pool)


def _do_not_wait() -> None:
    """The client pauses between its attempts."""
    time.sleep = lambda seconds: None


def _load(name: str, options: dict[str, Any]) -> dict[str, Any]:
    from transfiner_refine import Refiner

    refiner = Refiner.from_pretrained(name, **options)
    return {"config": refiner.config} | {key: value.numpy() for key, value in refiner.model.state_dict().items()}


def _push(directory: Path, name: str, options: dict[str, Any]) -> str:
    from transfiner_refine import Refiner

    return Refiner.from_pretrained(directory).push_to_hub(name, **options)
