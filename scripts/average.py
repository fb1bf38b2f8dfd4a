"""Average the weights of refiners from one run, for photos of other kinds than those it was trained on.

python scripts/average.py OUTPUT_DIR MODEL_DIR MODEL_DIR [MODEL_DIR ...] [--shares 0.7 0.3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from transfiner_refine import Refiner


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--shares", type=float, nargs="+", help="of each, instead of equal ones; their sum is 1")
    args = parser.parse_args()
    shares = args.shares or [1 / len(args.models)] * len(args.models)
    if len(shares) != len(args.models) or abs(sum(shares) - 1) > 1e-6:
        parser.error(f"expected a share for each of {len(args.models)} models and a sum of 1, got {shares}")
    refiners = [Refiner.from_pretrained(path) for path in args.models]
    states = [refiner.model.state_dict() for refiner in refiners]
    mean = {
        name: torch.stack([share * state[name] for share, state in zip(shares, states, strict=True)]).sum(dim=0)
        for name in states[0]
    }
    refiners[0].model.load_state_dict(mean, strict=True)
    print(refiners[0].save_pretrained(args.output))


if __name__ == "__main__":
    main()
