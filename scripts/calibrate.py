"""Calibrate a trained refiner on held-out photos: the incoherence detector's thresholds, and the expected gain.

    python scripts/calibrate.py RUN_DIR/best OUTPUT_DIR [--data DIR]

Chosen on the held-out ECSSD photos and on Penn-Fudan; the DAVIS scenes play no part here. Thresholds of 0.5 and 0.5
leave the incoherence detector as it is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from baselines import load_refiner  # pyright: ignore[reportMissingImports]
from dataset import DATA, MatchedImage, MatchedSet, open_set  # pyright: ignore[reportMissingImports]
from methods import Coarse, refined, start_from  # pyright: ignore[reportMissingImports]
from train_embedded import Validation, with_changes  # pyright: ignore[reportMissingImports]

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.evaluation import boundary_iou
from transfiner_refine.modeling.gain import PROPOSAL_STATISTICS
from transfiner_refine.proposals import LEAST_AGREEMENT
from transfiner_refine.training.calibration import (
    EXACT_WEIGHT,
    asked_statistics,
    calibrate_thresholds,
    fit_gain,
    with_gain_predictor,
)

EXACT_BEHIND_SEGMENTER = 1.0, 0.7
"""In place of ``EXACT_WEIGHT`` behind a segmenter, for ECSSD and for Penn-Fudan, whose outlines are two pixels off."""

ROOT = (0.6, 0.7, 0.8)
FINER = (0.4, 0.3, 0.2)


def predicting(refiner: Refiner, sets: list[list[MatchedImage]]) -> Refiner:
    """The same refiner with a gain predictor fitted to real detections in both frames, and to ground truth.

    With a segmenter, what it predicts where that is not asked stays as it was.

    Args:
        refiner: A predictor that knows proposals is fitted in place.
        sets: Photos of ECSSD and of Penn-Fudan.
    """
    model = refiner.model
    if model.segmenter is None or model.gain_predictor is None:
        model = with_gain_predictor(model)
    exact = [EXACT_WEIGHT] * len(sets) if model.segmenter is None else EXACT_BEHIND_SEGMENTER
    samples = [(sample, weight) for photos, weight in zip(sets, exact, strict=True) for sample in photos]
    refiner, accept = Refiner(model), RefineOptions(keep_if_iou_below=0.0, keep_if_gain_below=-1.0)
    statistics, gains, weights = refinements(refiner, samples, accept)
    fit_gain(model, statistics, gains, weights)
    assert model.gain_predictor is not None
    if model.gain_predictor.again_weight is not None:
        agreement = statistics[:, -len(PROPOSAL_STATISTICS)]
        refused = model.gain_predictor(statistics) < RefineOptions().keep_if_gain_below
        again = refused & (agreement >= LEAST_AGREEMENT)
        without = refinements(refiner, samples, replace(accept, segment=False))
        fit_gain(model, *(values[again] for values in without), again=True)
    return refiner


@torch.no_grad()
def refinements(
    refiner: Refiner, samples: list[tuple[MatchedImage, float]], options: RefineOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Refine photos from every kind of coarse masks.

    Args:
        refiner: With a gain predictor.
        samples: Photos, and what an exact mask of each counts.
        options: Those of the calls, which must accept every refinement.

    Returns:
        Of N refinements ``(N, K)`` float32 statistics, ``(N,)`` float64 gains of Boundary IoU, and ``(N,)`` float64
        weights.
    """
    gains, weights = [], []
    with asked_statistics(refiner.model) as statistics:
        for kind in Coarse:
            for sample, weight in ((start_from(sample, kind), weight) for sample, weight in samples):
                out = refined(refiner, kind, options)(sample)
                before = boundary_iou(sample.coarse, sample.truth)
                gains.append(boundary_iou(out, sample.truth) - before)
                weights.append(np.full(len(before), weight if kind is Coarse.truth else 1.0))
    return torch.cat(statistics), torch.from_numpy(np.concatenate(gains)), torch.from_numpy(np.concatenate(weights))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--passes", type=int, help="of the calibrated model, instead of what it has")
    parser.add_argument("--tree-keys", action="store_true", help="give it one key of attention for each tree")
    parser.add_argument("--thresholds", type=float, nargs=2, metavar=("ROOT", "FINER"), help="do not search for them")
    parser.add_argument("--bytes", action="store_true", help="store the weights as int8, instead of float16")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    photos = list(open_set(args.data, "ecssd_validation"))
    validation = Validation({"ecssd": photos, "pennfudan": list(MatchedSet(args.data / "pennfudan", limit=40))})

    def calibrated(root: float, finer: float) -> Refiner:
        model = load_refiner(args.model).model
        config = model.config
        tree_keys, passes = args.tree_keys or config.tree_keys, args.passes or config.passes
        refiner = Refiner(with_changes(model, tree_keys=tree_keys, passes=passes))
        calibrate_thresholds(refiner.model, (root, *[finer] * (refiner.config.depth - 1)))
        return refiner

    scores: dict[tuple[float, float], float] = {}
    wanted = [tuple(args.thresholds)] if args.thresholds else list(itertools.product(ROOT, FINER))
    for thresholds in wanted if len(wanted) > 1 else []:
        record = validation(calibrated(*thresholds))
        scores[thresholds] = record["score"]
        print(thresholds, {name: round(value, 4) for name, value in record.items()}, flush=True)
    best = max(wanted, key=lambda thresholds: scores.get(thresholds, 0.0))
    refiner = predicting(calibrated(*best), [photos, list(MatchedSet(args.data / "pennfudan"))])
    stored = torch.int8 if args.bytes else torch.float16
    print(f"{best} of {scores}: {refiner.save_pretrained(args.output, dtype=stored)}")


if __name__ == "__main__":
    main()
