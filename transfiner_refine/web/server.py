"""Serving the page: on this machine alone unless told otherwise, with no traces left behind and no call home."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from transfiner_refine.errors import InvalidInputError, MissingDependencyError
from transfiner_refine.refiner import Refiner
from transfiner_refine.web.examples import write_examples
from transfiner_refine.web.uploads import MAX_BYTES, MAX_PIXELS

HOST, PORT = "127.0.0.1", 7860

VISITORS = 20
"""Visitors whose last refinement is held in memory at once."""


def serve_page(refiner: Refiner, host: str = HOST, port: int = PORT) -> None:
    """Serve the page until the process is told to end.

    Args:
        refiner: The refiner behind it.
        host: Address to listen on; ``"0.0.0.0"`` lets the whole network in.
        port: Port to listen on.

    Raises:
        MissingDependencyError: If Gradio is not installed.
        InvalidInputError: If the address cannot be listened on, or the page cannot be started there.
    """
    with running(refiner, host, port) as page:
        print(f"Serving {page.local_url} until you press Ctrl+C.", flush=True)
        page.block_thread()


@contextmanager
def running(refiner: Refiner, host: str = HOST, port: int = PORT) -> Iterator:
    """The page, served in the background; at the end it is closed, and all files of its visitors are removed.

    Args:
        refiner: The refiner behind it.
        host: Address to listen on.
        port: Port to listen on.

    Yields:
        The running ``gradio.Blocks``; ``local_url`` is its address.

    Raises:
        MissingDependencyError: If Gradio is not installed.
        InvalidInputError: If the address cannot be listened on, or the page cannot be started there.
    """
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="transfiner-refine-") as name:
        # Gradio deletes old files of its folder once a handler has returned them; of those elsewhere it returns copies.
        visitors, examples = Path(name, "visitors"), Path(name, "examples")
        visitors.mkdir()
        examples.mkdir()
        with _environment(str(visitors), host), _pixel_limit():
            page = _build(refiner, examples, visitors)
            try:
                _launch(page, host, port, examples)
                yield page
            finally:
                page.close(verbose=False)


def _build(refiner: Refiner, examples: Path, visitors: Path) -> Any:
    try:
        from transfiner_refine.web.handlers import Handlers
        from transfiner_refine.web.page import build
    except ImportError as error:
        raise MissingDependencyError(
            f"expected the package gradio, which makes the page, got: {error}; "
            "install it with: pip install 'transfiner-refine[demo]'"
        ) from error
    return build(Handlers(refiner, write_examples(examples), visitors))


def _launch(page: Any, host: str, port: int, examples: Path) -> None:
    from transfiner_refine.web.page import CSS, THEME

    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            allowed_paths=[str(examples)],
            max_file_size=MAX_BYTES,
            state_session_capacity=VISITORS,
            run_history=False,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            num_workers=0,
            theme=THEME,
            css=CSS,
        )
    except Exception as error:  # Gradio documents none, and raises those of its server and of its HTTP client, too
        raise InvalidInputError(
            f"expected a page that starts at {host}:{port} and that this machine can reach, got "
            f"{type(error).__name__}: {' '.join(str(error).split())}; choose another address with --host and --port, "
            "or check the proxy settings of the environment"
        ) from error


def _check_address(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise InvalidInputError(
            f"expected an address to listen on, got {host}:{port}: {error}; choose another with --host and --port"
        ) from error


@contextmanager
def _environment(folder: str, host: str) -> Iterator[None]:
    """What Gradio reads from the environment: uploads go to ``folder``, nothing is reported, nothing else is served.

    When it starts, Gradio calls its own address, as "localhost" if it listens on all: no proxy could pass that on.
    """
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = ",".join([*([others] if others else []), host, "localhost"])
    values = {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ALLOWED_PATHS": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,  # where both are set, this one counts
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _pixel_limit() -> Iterator[None]:
    """Let no decoder of this process go beyond the page's limit, those inside of Gradio among them."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow refuses twice as much
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
