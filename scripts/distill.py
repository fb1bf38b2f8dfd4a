"""Teach a refiner with one key of attention for each tree what others make of the same nodes, on the mean.

    python scripts/distill.py STUDENT_DIR RUN_DIR --teacher DIR [--teacher DIR ...] --cache CACHE_DIR [--stamps DIR]

Every node of the training photos that inference would refine is refined by all of them: the mean of the teachers'
logits is the target. Ground truth plays no part. What precedes the node encoder is the student's own, which the
teachers share (``train_embedded.py --frozen-detector``), so it is computed once; it stays as it is, and so does the
pixel head. A teacher may be a baseline of ``benchmarks/``. RUN_DIR gets a refiner every ``--validate-every`` steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from baselines import load_refiner  # pyright: ignore[reportMissingImports]
from dataset import DATA  # pyright: ignore[reportMissingImports]
from train_embedded import (  # pyright: ignore[reportMissingImports]
    Validation,
    held_out_photos,
    training_mix,
    with_changes,
)

from transfiner_refine import Refiner
from transfiner_refine.data.crops import CropSample
from transfiner_refine.functional.coarse import coarse_levels
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.transfiner import above_threshold
from transfiner_refine.training.schedule import mixed_precision, warming_average

BATCH = 8


class Student(nn.Module):
    """What is trained: the parts behind the quadtree."""

    def __init__(self, model: RefinerModel):
        super().__init__()
        network = model.transfiner
        self.parts = nn.ModuleList([network.node_encoder, network.sequence_encoder, network.pixel_decoder])


def disagreement(teachers: list[RefinerModel], student: RefinerModel, batch: CropSample) -> Tensor:
    """Cross-entropy of the student's labels against the teachers', the mean of the levels, less what is unavoidable."""
    network, depth = student.transfiner, student.config.depth
    with mixed_precision(torch.device("cpu")):
        with torch.no_grad():
            features = student.encode_crops(batch.image)
            pyramid = network.roi_pyramid(features, batch.roi, torch.arange(len(batch.roi)))
            levels = coarse_levels(batch.coarse, depth)
            found = network.incoherence_detector(pyramid, levels, depth, above_threshold(0.5))
            given = (pyramid, levels, found.guidance, found.quadtree)
            answers = [teacher.transfiner.refine_nodes(*given) for teacher in teachers]
            targets = [torch.sigmoid(torch.stack(level).mean(dim=0)) for level in zip(*answers, strict=True)]
        predicted = network.refine_nodes(*given)
    losses = [
        F.binary_cross_entropy_with_logits(logits.float(), target) - F.binary_cross_entropy(target, target)
        for logits, target in zip(predicted, targets, strict=True)
        if len(target)
    ]
    return torch.stack(losses).mean() if losses else predicted[0].sum()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--teacher", type=Path, action="append", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--stamps", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--real-share", type=float, default=0.65)
    parser.add_argument("--validate-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    teachers = [load_refiner(path).model.eval() for path in args.teacher]
    student = with_changes(load_refiner(args.student).model, tree_keys=True).eval()
    student.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[union-attr]
    dataset = training_mix(args.data, args.cache, args.real_share, args.stamps)
    trained = Student(student)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    factor = lambda step: min(1.0, (step + 1) / 50, max(0.02, (args.steps - step) / (0.6 * args.steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    averaged = torch.optim.swa_utils.AveragedModel(trained, avg_fn=warming_average(0.99))
    validation = Validation(held_out_photos(args.data))
    args.run.mkdir(parents=True, exist_ok=True)

    def judge(step: int, loss: float) -> None:
        finished = copy.deepcopy(student).eval()
        Student(finished).load_state_dict(averaged.module.state_dict())
        refiner = Refiner(finished)
        record = {"step": step, "loss": loss} | validation(refiner)
        with (args.run / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        tqdm.write(
            f"{step}: " + "  ".join(f"{name} {value:.4f}" for name, value in record.items() if "nodes" not in name)
        )
        refiner.save_pretrained(args.run / f"step_{step}")

    judge(0, float("nan"))
    sampler = RandomSampler(dataset, num_samples=args.steps * BATCH)
    total = 0.0
    for step, batch in enumerate(tqdm(DataLoader(dataset, BATCH, sampler=sampler)), 1):
        dataset.set_epoch(step)
        loss = disagreement(teachers, student, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(trained)
        total += loss.item()
        if step % args.validate_every == 0:
            judge(step, total / args.validate_every)
            total = 0.0


if __name__ == "__main__":
    main()
