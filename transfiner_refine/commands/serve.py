"""The command that serves the page, for :mod:`transfiner_refine.cli`."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from transfiner_refine.bulk.work import load_refiner
from transfiner_refine.commands.options import Device, Model
from transfiner_refine.web.server import HOST, PORT, serve_page


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets the whole network in.")] = HOST,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = PORT,
    model: Model = None,
    device: Device = None,
) -> None:
    """Serve a page where masks are drawn, refined and looked into; needs the extra "demo"."""
    # As at Ctrl+C, so that the files of the page's visitors are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve_page(load_refiner(model, device), host, port)
