"""How time and memory of refinement grow with the number of instances.

    python benchmarks/scaling.py

The scene is a sheet of 1200×800 pixels, 25 copies of the bundled photo of a cup, with a real detector's mask of each;
where more instances are wanted than there are cups, each cup comes again, shifted by a few pixels. For the times, the
image is encoded once beforehand and its features are passed in, so that the encoder is in no figure but its own; for
the memory, the whole call counts.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from transfiner_refine import FeaturePyramid, Instances, RefineOptions, Refiner
from transfiner_refine.errors import TransfinerError
from transfiner_refine.functional.rle import decode
from transfiner_refine.pipeline import working_memory

WIDTH, HEIGHT = 1200, 800
TILES = 5
"""Copies of the photo along each side of the sheet."""

JITTER = 4
"""Most pixels by which a repeated instance is shifted along each axis."""

BUDGETS = (4096, 16384, 65536)
"""Token budgets whose memory is measured."""

COUNTS = (100, 300)
"""Instances whose memory is measured, for each budget."""

MEGABYTE = 1e6


@dataclass(frozen=True)
class Scene:
    """An image and the coarse instances on it.

    Attributes:
        image: ``(3, H, W)`` float32 RGB in [0, 1].
        boxes: ``(N, 4)`` float32 xyxy pixels.
        masks: ``(N, H, W)`` bool.
    """

    image: Tensor
    boxes: Tensor
    masks: Tensor


def make_scene(count: int) -> Scene:
    """Lay out the sheet and ``count`` instances, the first of them always the same."""
    folder = resources.files("transfiner_refine") / "assets" / "demo"
    with resources.as_file(folder / "coffee.jpg") as path:
        photo = np.asarray(Image.open(path).convert("RGB"))
    detections = json.loads((folder / "detections.json").read_text())
    (cup,) = (x for x in detections if x["segmentation"]["size"] == list(photo.shape[:2]))
    width, height = WIDTH // TILES, HEIGHT // TILES
    tile = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
    mask = decode(cup["segmentation"], photo.shape[:2]).astype(np.float32)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA) >= 0.5
    left, top, box_width, box_height = np.array(cup["bbox"]) * (width / photo.shape[1])

    rng = np.random.default_rng(0)
    masks = torch.zeros((count, HEIGHT, WIDTH), dtype=torch.bool)
    boxes = torch.empty((count, 4))
    for i in range(count):
        row, column = divmod(i % TILES**2, TILES)
        dx, dy = rng.integers(-JITTER, JITTER + 1, size=2) if i >= TILES**2 else (0, 0)
        x, y = column * width, row * height
        masks[i, y : y + height, x : x + width] = torch.from_numpy(np.roll(mask, (dy, dx), axis=(0, 1)))
        x, y = x + left + dx, y + top + dy
        boxes[i] = torch.tensor([x, y, x + box_width, y + box_height])
    sheet = np.tile(tile, (TILES, TILES, 1))
    return Scene(torch.from_numpy(sheet).permute(2, 0, 1).float() / 255, boxes, masks)


@torch.no_grad()
def encode(refiner: Refiner, image: Tensor) -> FeaturePyramid:
    """The image encoder alone, on the whole image at its own size."""
    encoder = refiner.model.image_encoder
    if encoder is None:
        raise typer.BadParameter("expected a model with an image encoder, got one that needs a detector's features")
    pixels = image[None].to(refiner.device, refiner.dtype).contiguous(memory_format=torch.channels_last)
    return encoder(pixels)


def refine(refiner: Refiner, scene: Scene, features: FeaturePyramid, count: int, options: RefineOptions) -> Instances:
    """Refine the first ``count`` instances."""
    return refiner.refine(
        features=features,
        boxes=scene.boxes[:count],
        masks=scene.masks[:count],
        image_size=(HEIGHT, WIDTH),
        options=options,
    )


def median_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each call; the calls take turns, so that a slow spell of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # the first call of a library is not its speed
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one ``refine`` call, in bytes.

    Attributes:
        tokens: Most tokens, padding included, that the sequence encoder held at once.
        instances: Most instances refined in one group.
        inputs: Masks, boxes and image passed in.
        outputs: All tensors of the result.
        working: Peak of the process over what it held before the call, less ``outputs``.
    """

    tokens: int
    instances: int
    inputs: int
    outputs: int
    working: int


def measure_memory(model: str | None, count: int, token_budget: int, threads: int) -> MemoryUse:
    """Refine once and watch the process's peak; run it in a process of its own, or earlier peaks are seen instead."""
    torch.set_num_threads(threads)
    refiner = Refiner.from_pretrained(model)
    scene = make_scene(count)
    # Crops of each instance are what needs most memory; their number is bounded by the same budget.
    options = RefineOptions(token_budget=token_budget, encode="crops")

    def call(instances: int) -> Instances:
        boxes, masks = scene.boxes[:instances], scene.masks[:instances]
        return refiner.refine(scene.image, boxes=boxes, masks=masks, options=options)

    held = {"tokens": 0, "instances": 0}

    def watch(module: nn.Module, args: tuple[Tensor, Tensor, int, Tensor | None], output: Tensor) -> None:
        _, sequence, sequences = args[:3]
        longest = int(torch.bincount(sequence, minlength=sequences).max()) if len(sequence) else 0
        held["tokens"] = max(held["tokens"], sequences * longest)
        held["instances"] = max(held["instances"], sequences)

    call(2)  # libraries load on first use
    hook = refiner.model.transfiner.sequence_encoder.register_forward_hook(watch)
    before = reset_peak()
    out = call(count)
    peak = process_memory("VmHWM")
    hook.remove()
    tensors = [x for x in (out.boxes, out.masks, out.probs, out.rois, out.kept_coarse) if x is not None]
    outputs = size_of(*tensors)
    return MemoryUse(
        **held,
        inputs=size_of(scene.boxes, scene.masks, scene.image),
        outputs=outputs,
        working=peak - before - outputs,
    )


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def process_memory(field: str) -> int:
    """Bytes that ``/proc/self/status`` states: ``VmRSS`` is held now, ``VmHWM`` was held at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"expected {field} in /proc/self/status, got no such line: measuring memory needs Linux")


def reset_peak() -> int:
    """Forget the peak so far; returns the bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def time_table(refiner: Refiner, repeats: int) -> Table:
    """Time of 10 and of 100 instances, and of the encoder."""
    scene = make_scene(100)
    options = RefineOptions()
    features = encode(refiner, scene.image)
    seconds = median_seconds(
        {
            "encoder": lambda: encode(refiner, scene.image),
            "10": lambda: refine(refiner, scene, features, 10, options),
            "100": lambda: refine(refiner, scene, features, 100, options),
        },
        repeats,
    )
    table = Table(title=f"Time on {WIDTH}×{HEIGHT} pixels, {torch.get_num_threads()} threads, median of {repeats}")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("of 10 instances", justify="right")
    rows = {"refine 10 instances": "10", "refine 100 instances": "100", "encode the whole image": "encoder"}
    for label, key in rows.items():
        table.add_row(label, f"{seconds[key]:.3f}", f"{seconds[key] / seconds['10']:.2f}×")
    return table


def memory_table(model: str | None) -> Table:
    """Peak memory for each budget and number of instances."""
    table = Table(
        title=f"Memory of one call on {WIDTH}×{HEIGHT} pixels, MB",
        caption="working: the peak, less what was held before and the outputs; allowed: what the budget stands for",
    )
    for heading in ("token budget", "instances", "most tokens", "at once", "inputs", "outputs", "working", "allowed"):
        table.add_column(heading, justify="right")
    spawn = multiprocessing.get_context("spawn")
    for budget in BUDGETS:
        for count in COUNTS:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                use = pool.submit(measure_memory, model, count, budget, torch.get_num_threads()).result()
            sizes = (use.inputs, use.outputs, use.working, working_memory(budget))
            megabytes = [f"{x / MEGABYTE:.0f}" for x in sizes]
            table.add_row(f"{budget:,}", str(count), f"{use.tokens:,}", str(use.instances), *megabytes)
    return table


def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each call.")] = 5,
    with_time: Annotated[bool, typer.Option("--time/--no-time")] = True,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Linux only.")] = True,
) -> None:
    """Print time against the number of instances, and peak memory against the token budget."""
    console = Console()
    try:
        if with_time:
            console.print(time_table(Refiner.from_pretrained(model), repeats))
        if with_memory:
            console.print(memory_table(model))
    except (TransfinerError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
