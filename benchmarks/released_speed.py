"""Speed and memory of the released mask branch: all instances at once against one at a time.

    python benchmarks/released_speed.py

One at a time is measured in two ways: as calls with one instance each, which is what a caller's loop would be, and as
one call that refines instance after instance on features computed once, which is what the released code's loop is.

The features are random, of an image of 1216×800 pixels. So are the weights, unless ``--model`` names some; the
incoherence classifier is then scaled so that as many cells are nodes as the paper counts incoherent: 14 % of a box at
56×56, and half as many at 112×112.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from transfiner_refine.errors import TransfinerError
from transfiner_refine.modeling.released import ReleasedMaskBranch, ReleasedMasks, ReleasedMaskTransfiner

WIDTH, HEIGHT = 1216, 800
SHARES = (0.14, 0.07)
"""Share of the cells that are nodes at 56×56 and at 112×112."""

THRESHOLDS = (0.125, 0.8)
BUDGETS = (4096, 16384, 65536)
COUNTS = (50, 200)
MEGABYTE = 1e6


class Scene:
    """Random features, boxes and classes of one image, and the branch that refines them."""

    def __init__(self, model: str | None, count: int):
        torch.manual_seed(0)
        self.features = [torch.randn(1, 256, HEIGHT // stride, WIDTH // stride) for stride in (4, 8, 16, 32)]
        centre = torch.rand(count, 2) * torch.tensor([WIDTH, HEIGHT])
        half = torch.exp(torch.empty(count, 2).uniform_(2.0, 5.5))  # sides of 15 to 490 pixels
        limit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
        self.boxes = torch.cat([centre - half, centre + half], dim=1).clamp(min=0).minimum(limit)
        self.classes = torch.randint(0, 80, (count,))
        self.branch = random_branch() if model is None else ReleasedMaskTransfiner.from_pretrained(model).mask_branch
        if model is None:
            self.calibrate()

    def run(self, start: int, stop: int, token_budget: int = 16384, max_instances: int | None = None) -> ReleasedMasks:
        """Refine some of the instances in one call."""
        boxes, classes = self.boxes[start:stop], self.classes[start:stop]
        return self.branch(self.features, [boxes], [classes], max_instances, token_budget=token_budget)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Scale and shift the incoherence logits to the wanted shares of nodes."""
        incoherence = self.run(0, min(20, len(self.boxes)), max_instances=0).incoherence
        logits = torch.logit(incoherence.flatten().double(), 1e-9)
        found = torch.quantile(logits, 1 - torch.tensor(SHARES, dtype=torch.float64))
        wanted = torch.logit(torch.tensor(THRESHOLDS, dtype=torch.float64))
        scale = float((wanted[1] - wanted[0]) / (found[1] - found[0]))
        classifier = self.branch.incoherence_classifier
        assert classifier.bias is not None
        classifier.weight.mul_(scale)
        classifier.bias.mul_(scale).add_(float(wanted[0]) - scale * float(found[0]))


def random_branch() -> ReleasedMaskBranch:
    """A branch whose random weights keep activations of the order of one."""
    branch = ReleasedMaskBranch().eval().requires_grad_(False)
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return branch


def measure(call: Callable[[], ReleasedMasks]) -> tuple[Tensor, ReleasedMasks]:
    """Seconds of one call, on the clock and of the processor, which other programs disturb less; and its result."""
    wall, processor = time.perf_counter(), time.process_time()
    out = call()
    seconds = [time.perf_counter() - wall, time.process_time() - processor]
    return torch.tensor(seconds, dtype=torch.float64), out


def time_table(model: str | None, count: int, singles: int) -> Table:
    """All at once, and one at a time."""
    scene = Scene(model, count)
    scene.run(0, 1)  # the first call of a library is not its speed
    chosen = torch.linspace(0, count - 1, singles).long().tolist()
    batched, out = measure(lambda: scene.run(0, count))
    calls = torch.stack([measure(lambda i=i: scene.run(i, i + 1))[0] for i in chosen]).mean(dim=0) * count
    loop, _ = measure(lambda: scene.run(0, count, token_budget=1))
    table = Table(
        title=f"{count} instances of {out.tokens.double().mean():.0f} tokens on average, {WIDTH}×{HEIGHT} pixels, "
        f"{torch.get_num_threads()} threads",
        caption=f"one call each: {singles} of the {count} calls were timed",
    )
    for heading in ("way", "seconds", "processor seconds", "times all at once"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    rows = {"all at once": batched, "one call each": calls, "one at a time on shared features": loop}
    for label, (wall, processor) in rows.items():
        table.add_row(label, f"{wall:.1f}", f"{processor:.1f}", f"{processor / batched[1]:.2f}×")
    return table


def measure_memory(model: str | None, count: int, token_budget: int, threads: int) -> float:
    """Bytes that one call adds to the process at its peak, less its result; to be run in a process of its own."""
    torch.set_num_threads(threads)
    scene = Scene(model, count)
    scene.run(0, 2, token_budget)  # libraries load on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("VmRSS")
    out = scene.run(0, count, token_budget)
    result = sum(x.numel() * x.element_size() for x in (out.coarse_logits, out.incoherence, out.probs, out.tokens))
    return process_memory("VmHWM") - before - result


def process_memory(field: str) -> int:
    """Bytes that ``/proc/self/status`` states."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def memory_table(model: str | None) -> Table:
    """Peak memory for each budget and number of instances."""
    table = Table(title="Working memory of one call, MB", caption="the peak, less features, weights and the result")
    for heading in ("token budget", *(f"{count} instances" for count in COUNTS)):
        table.add_column(heading, justify="right")
    spawn = multiprocessing.get_context("spawn")
    for budget in BUDGETS:
        used = []
        for count in COUNTS:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                job = pool.submit(measure_memory, model, count, budget, torch.get_num_threads())
                used.append(f"{job.result() / MEGABYTE:.0f}")
        table.add_row(f"{budget:,}", *used)
    return table


def main(
    model: Annotated[str | None, typer.Option(help="Name or folder of a released model; random if left out.")] = None,
    instances: Annotated[int, typer.Option(min=1)] = 100,
    singles: Annotated[int, typer.Option(min=1, help="Calls with one instance that are timed.")] = 5,
    with_time: Annotated[bool, typer.Option("--time/--no-time")] = True,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Linux only.")] = True,
) -> None:
    """Print the time of 100 instances, and peak memory against the token budget."""
    console = Console()
    try:
        if with_time:
            console.print(time_table(model, instances, singles))
        if with_memory:
            console.print(memory_table(model))
    except (TransfinerError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
