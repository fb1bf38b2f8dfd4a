"""Choose the thresholds of a trained refiner's incoherence detector on held-out photos, and write it calibrated.

    python scripts/calibrate.py RUN_DIR/best OUTPUT_DIR [--data DIR]

Chosen on the held-out ECSSD photos and on Penn-Fudan; the DAVIS scenes play no part here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from dataset import DATA, MatchedSet  # pyright: ignore[reportMissingImports]
from train_embedded import VALIDATION_LIST, Validation  # pyright: ignore[reportMissingImports]

from transfiner_refine import Refiner
from transfiner_refine.training.calibration import calibrate_thresholds

ROOT = (0.5, 0.6, 0.7, 0.8)
FINER = (0.5, 0.4, 0.3)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    held_out = set(VALIDATION_LIST.read_text().split())
    photos = [m for m in MatchedSet(args.data / "ecssd") if m.file_name in held_out]
    validation = Validation({"ecssd": photos, "pennfudan": list(MatchedSet(args.data / "pennfudan", limit=40))})

    def calibrated(root: float, finer: float) -> Refiner:
        refiner = Refiner.from_pretrained(args.model)
        calibrate_thresholds(refiner.model, (root, *[finer] * (refiner.config.depth - 1)))
        return refiner

    scores: dict[tuple[float, float], float] = {}
    for thresholds in itertools.product(ROOT, FINER):
        record = validation(calibrated(*thresholds))
        scores[thresholds] = record["score"]
        print(thresholds, {name: round(value, 4) for name, value in record.items()}, flush=True)
    best = max(scores, key=lambda thresholds: scores[thresholds])
    print(f"{best} of {scores}: {calibrated(*best).save_pretrained(args.output)}")


if __name__ == "__main__":
    main()
