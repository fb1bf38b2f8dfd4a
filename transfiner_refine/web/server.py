"""Serving the page: on this machine alone unless told otherwise, with no traces left behind and no call home."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        InvalidInputError: If the address cannot be listened on.
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
        InvalidInputError: If the address cannot be listened on.
    """
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="transfiner-refine-") as name, _environment(name), _pixel_limit():
        try:
            from transfiner_refine.web.handlers import Handlers
            from transfiner_refine.web.page import CSS, THEME, build
        except ImportError as error:
            raise MissingDependencyError(
                f"expected the package gradio, which makes the page, got: {error}; "
                "install it with: pip install 'transfiner-refine[demo]'"
            ) from error
        folder = Path(name)
        page = build(Handlers(refiner, write_examples(folder), folder))
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            allowed_paths=[],
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
        try:
            yield page
        finally:
            page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise InvalidInputError(
            f"expected an address to listen on, got {host}:{port}: {error}; choose another with --host and --port"
        ) from error


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """What Gradio reads from the environment: uploads go to ``folder``, nothing is reported, nothing else is served."""
    values = {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ALLOWED_PATHS": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
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
