"""The command that converts an original Mask Transfiner checkpoint, for :mod:`transfiner_refine.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfiner_refine.modeling.files import CONFIG, WEIGHTS
from transfiner_refine.modeling.released_files import DETECTRON2, RECORD, convert_checkpoint


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Original .pth file of the authors.")],
    output: Annotated[Path, typer.Option(help="New folder to write to.")],
) -> None:
    """Convert a released Mask Transfiner checkpoint to safetensors, and its detector to plain Detectron2."""
    conversion = convert_checkpoint(checkpoint, output)
    config = conversion.config
    kind = "modulated deformable" if config.modulated else "deformable" if config.deformable else "plain"
    print(f"ResNet-{config.depth}, {kind} convolutions. {conversion.report}, none unknown, none missing.")
    print(f"{output}: {CONFIG}, {WEIGHTS}, {RECORD} (every key), {DETECTRON2} (detector and coarse masks)")
