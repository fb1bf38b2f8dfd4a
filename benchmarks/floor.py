"""Where the time of a call goes, and how near each stage is to what the machine can do.

    python benchmarks/floor.py davis_dev --instances 100

The floor of a stage is its multiplications over the machine's rate of large matrix products, plus the bytes that it
cannot but move over the machine's rate of copying; both rates are measured in the same run, on one thread. The masks
are a detector's, repeated until there are enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from baselines import load_refiner
from dataset import DATA, MatchedImage, open_set
from measure import counting
from rich.console import Console
from rich.table import Table
from torch import Tensor

from transfiner_refine import RefineOptions, Refiner, pipeline
from transfiner_refine.errors import InvalidInputError, TransfinerError
from transfiner_refine.functional.sampling import FeatureTable
from transfiner_refine.modeling import transfiner

ROWS = 4
"""Rows that a bilinear sample reads."""


@dataclass
class Clock:
    """Processor seconds by stage, without those of a stage within a stage.

    Attributes:
        seconds: By stage.
        moved: Bytes that a stage cannot but move.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    def timed(self, stage: str, call: Callable, size: Callable[..., float] | None = None) -> Callable:
        """The same call, timed; ``size`` tells the bytes moved from result and arguments."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.process_time()
            result = call(*args, **kwargs)
            spent = time.process_time() - start
            own = spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent
            self.seconds[stage] = self.seconds.get(stage, 0.0) + own
            if size is not None:
                self.moved[stage] = self.moved.get(stage, 0.0) + size(result, *args)
            return result

        return wrapper


@contextmanager
def watched(refiner: Refiner, clock: Clock):
    """Within it, calls of the refiner are timed by stage."""
    model = refiner.model
    network = model.transfiner

    def read(result: Tensor, *_: Any) -> float:
        return (ROWS + 1) * result.numel() * result.element_size()

    def pasted(_: Any, probs: Tensor, boxes: Tensor, masks: Tensor, *__: Any) -> float:
        size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
        return float(size.prod(dim=1).sum()) * 5  # a value of 4 bytes and a label for each pixel of a box

    parts: list[tuple[Any, str, str, Callable[..., float] | None]] = [
        (type(model.image_encoder), "forward", "image encoder", None),
        (type(network.incoherence_detector), "forward", "incoherence", None),
        (FeatureTable, "sample", "sampling", read),
        (type(network.node_encoder), "forward", "node encoder", None),
        (type(network.sequence_encoder), "forward", "sequence encoder", None),
        (type(network.pixel_decoder), "forward", "pixel decoder", None),
        (transfiner, "propagate_corrections", "propagation", None),
        (pipeline, "align", "pixel head", None),
        (pipeline, "crop_image", "cropping", lambda result, *_: 2 * result.numel() * result.element_size()),
        (pipeline, "crop_masks", "cropping", lambda result, *_: 2 * result.numel() * result.element_size()),
        (pipeline, "paste", "pasting", pasted),
    ]
    if model.segmenter is not None:
        parts += [
            (type(model.segmenter.tiny_vit), "forward", "segmenter's encoder", None),
            (type(model.segmenter), "decode", "segmenter's decoder", None),
        ]
    patches = [
        patch.object(owner, name, clock.timed(stage, getattr(owner, name), size)) for owner, name, stage, size in parts
    ]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def multiplications(refiner: Refiner, call: Callable[[], object]) -> dict[str, float]:
    """Floating-point operations by stage."""
    names = {
        "image encoder": "ImageEncoder",
        "incoherence": "MaskTransfiner.incoherence_detector",
        "node encoder": "MaskTransfiner.node_encoder",
        "sequence encoder": "MaskTransfiner.sequence_encoder",
        "pixel decoder": "MaskTransfiner.pixel_decoder",
    }
    if refiner.model.pixel_head is not None:
        names["pixel head"] = "PixelHead"
    if refiner.model.segmenter is not None:
        names["segmenter's encoder"] = "TinyViT"
    with counting() as counter:
        call()
    found = counter.get_flop_counts()
    return {stage: sum(found[name].values()) for stage, name in names.items()}


def matmul_rate(side: int = 1024, repeats: int = 20) -> float:
    """Floating-point operations a second of a large product in float32."""
    a = torch.randn(side, side)
    torch.mm(a, a)
    start = time.process_time()
    for _ in range(repeats):
        torch.mm(a, a)
    return repeats * 2 * side**3 / (time.process_time() - start)


def copy_rate(megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes a second, read or written, of a copy that no cache holds."""
    source = torch.zeros(megabytes * 250_000)
    target = source.clone()
    start = time.process_time()
    for _ in range(repeats):
        target.copy_(source)
    return repeats * 2 * source.numel() * 4 / (time.process_time() - start)


def report(clock: Clock, total: float, flops: dict[str, float], matmul: float, copy: float, title: str) -> Table:
    """The table that is printed."""
    caption = f"matrix products: {matmul / 1e9:.0f} GFLOP/s, copying: {copy / 1e9:.1f} GB/s, one thread"
    table = Table(title=title, caption=caption)
    table.add_column("stage")
    for heading in ("seconds", "of all", "GFLOP", "GB", "floor, s", "floor / seconds"):
        table.add_column(heading, justify="right")

    def row(stage: str, seconds: float, operations: float, moved: float) -> float:
        floor = operations / matmul + moved / copy
        cells = [f"{seconds:.3f}", f"{seconds / total:.0%}", f"{operations / 1e9:.1f}" if operations else ""]
        cells += [f"{moved / 1e9:.2f}" if moved else "", f"{floor:.3f}", f"{floor / seconds:.0%}" if floor else ""]
        table.add_row(stage, *cells)
        return floor

    floors = 0.0
    for stage, seconds in sorted(clock.seconds.items(), key=lambda entry: -entry[1]):
        floors += row(stage, seconds, flops.get(stage, 0.0), clock.moved.get(stage, 0.0))
    other = total - sum(clock.seconds.values())
    table.add_row("all else", f"{other:.3f}", f"{other / total:.0%}")
    table.add_section()
    table.add_row("together", f"{total:.3f}", "100%", "", "", f"{floors:.3f}", f"{floors / total:.0%}", style="bold")
    return table


def main(
    name: Annotated[str, typer.Argument(help="Set to run on, such as davis_dev.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Instances to refine in one call.")] = 100,
) -> None:
    """Measure the stages of one call."""
    console = Console()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        samples: list[MatchedImage] = list(open_set(data, name, 40))
        if not samples:
            raise InvalidInputError(f"expected detections that match an object in {name}, got none")
        refiner = load_refiner(model)
        photo = max(samples, key=len)
        chosen = [index % len(photo) for index in range(instances)]
        boxes, coarse = photo.boxes[chosen], photo.coarse[chosen]
        options = RefineOptions(encode="crops")

        def call() -> object:
            return refiner.refine(photo.image, boxes=boxes, masks=coarse, options=options)

        call()
        clock = Clock()
        with watched(refiner, clock):
            start = time.process_time()
            call()
            total = time.process_time() - start
        flops = multiplications(refiner, call)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    height, width = photo.image.shape[:2]
    title = f"{instances} instances on {width}×{height} pixels"
    console.print(report(clock, total, flops, matmul_rate(), copy_rate(), title))


if __name__ == "__main__":
    typer.run(main)
