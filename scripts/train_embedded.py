"""Train the embedded model on the sets named in its model card.

    python scripts/train_embedded.py RUN_DIR --cache CACHE_DIR [--data DIR] [--steps N]

RUN_DIR gets the checkpoint, the metrics and the best refiner; the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from baselines import NETWORKS, load_refiner, with_network  # pyright: ignore[reportMissingImports]
from dataset import DATA, ECSSD_VALIDATION, MatchedImage, MatchedSet, open_set  # pyright: ignore[reportMissingImports]
from fetch_backbone import imagenet_weights  # pyright: ignore[reportMissingImports]

from transfiner_refine import RefineOptions, Refiner, TransfinerConfig
from transfiner_refine.data.composite import CompositeShares, load_stamps
from transfiner_refine.data.crops import CropDataset
from transfiner_refine.data.object_cache import CropSource
from transfiner_refine.evaluation.boundary import boundary_iou, mask_iou
from transfiner_refine.evaluation.report import figures_from_scores
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.loop import train
from transfiner_refine.training.losses import LossConfig
from transfiner_refine.training.schedule import TrainConfig

EMBEDDED = TransfinerConfig(
    feature_source="image_encoder",
    feature_channels=64,
    strides=(2, 4, 8, 16, 32),
    box_margin=0.125,
    depth=3,
    channels=128,
    ffn_channels=256,
    node_cues=("fine", "coarse", "context", "position", "guidance"),
    level_embedding=True,
    decoder="residual",
)


class Validation:
    """Mean IoU, Boundary IoU and share of masks made worse, by the refiner's public path, on held-out photos."""

    def __init__(self, sets: dict[str, list[MatchedImage]]):
        self.sets = sets
        self.before = {
            name: (
                np.concatenate([mask_iou(m.coarse, m.truth) for m in images]),
                np.concatenate([boundary_iou(m.coarse, m.truth) for m in images]),
            )
            for name, images in sets.items()
        }

    def __call__(self, refiner: Refiner) -> dict[str, float]:
        record: dict[str, float] = {}
        scores = []
        for name, images in self.sets.items():
            iou, boundary, nodes = [], [], np.zeros(refiner.config.depth)
            for m in images:
                out = refiner.refine(
                    m.image,
                    boxes=m.boxes,
                    masks=m.coarse,
                    options=RefineOptions(return_quadtree=True, encode="crops"),
                )
                masks = out.masks.numpy()
                iou.append(mask_iou(masks, m.truth))
                boundary.append(boundary_iou(masks, m.truth))
                assert out.details is not None
                nodes += [len(level.roi) for level in out.details.quadtree]
            figures = figures_from_scores(
                self.before[name][0], np.concatenate(iou), self.before[name][1], np.concatenate(boundary)
            )
            record |= {
                f"{name}_iou_gain": figures.iou_gain,
                f"{name}_boundary_gain": figures.boundary_iou_gain,
                f"{name}_worse": figures.share_worse,
            }
            record |= {f"{name}_nodes_{level}": n / figures.count for level, n in enumerate(nodes.tolist())}
            scores.append(figures.iou_gain + figures.boundary_iou_gain - 0.2 * figures.share_worse)
        record["score"] = float(np.mean(scores))
        return record


def training_sources(data: Path) -> tuple[CropSource, CropSource, CropSource]:
    """The training photos of ECSSD, CCP and COCO; those of ``ECSSD_VALIDATION`` are left out."""
    ecssd = CropSource(data / "ecssd", exclude=ECSSD_VALIDATION)
    return ecssd, CropSource(data / "ccp"), CropSource(data / "coco_train", weight=0.3, min_area=1000)


def training_mix(
    data: Path,
    cache: Path,
    real_share: float,
    stamps: Path | None,
    *,
    more: Sequence[CropSource] = (),
    shares: CompositeShares | None = None,
    make: Callable[..., CropDataset] = CropDataset,
    seed: int = 0,
) -> CropDataset:
    """The training photos with their composites, and ``more`` sources; ``make`` makes the data set of them.

    ``shares`` says how often what is composed, where it is not as usual.
    """
    ecssd, ccp, coco = training_sources(data)
    return make(
        [ecssd, ecssd, ccp, coco, *more],
        cache,
        side=112,
        box_margin=EMBEDDED.box_margin,
        real_share=real_share,
        shares=shares or CompositeShares(),
        stamps=load_stamps(stamps) if stamps else (),
        seed=seed,
    )


def held_out_photos(data: Path) -> dict[str, list[MatchedImage]]:
    """The photos that are watched while a model is trained."""
    photos = list(open_set(data, "ecssd_validation"))
    return {"ecssd": photos[:60], "davis": list(MatchedSet(data / "davis_dev", limit=60))}


def with_context(model: RefinerModel, scales: int) -> RefinerModel:
    """The same model with a wide context, which starts without effect."""
    wider = RefinerModel(replace(model.config, context_scales=scales))
    missing, unexpected = wider.load_state_dict(model.state_dict(), strict=False)
    prefix = "transfiner.incoherence_detector."
    assert not unexpected and all(name.startswith((f"{prefix}context.", f"{prefix}estimate.")) for name in missing)
    return wider


def with_changes(model: RefinerModel, **changes: Any) -> RefinerModel:
    """The same weights under another configuration, such as ``tree_keys=True``; gains have to be calibrated anew."""
    changed = RefinerModel(replace(model.config, predicts_gain=False, **changes))
    weights = model.state_dict()
    changed.load_state_dict({name: weights[name] for name in changed.state_dict()})
    return changed


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--frozen-stages", type=int, default=5)
    parser.add_argument("--frozen-detector", action="store_true", help="keep the nodes of the model of --init")
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--cross-entropy", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stamps", type=Path, help="folder of cut-outs with alpha for the composites")
    parser.add_argument("--real-share", type=float, default=0.45)
    parser.add_argument("--backbone-scale", type=float, default=0.1)
    parser.add_argument("--init", type=Path, help="start from this refiner instead of ImageNet weights")
    parser.add_argument("--context-scales", type=int, help="wide context to add to the model of --init")
    parser.add_argument("--nodes-per-level", type=int, nargs=2, default=(50, 150), help="range drawn from in each step")
    parser.add_argument("--tree-keys", action="store_true", help="one key of attention for each tree")
    parser.add_argument("--network", choices=sorted(NETWORKS), help="train a baseline with this network instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    dataset = training_mix(args.data, args.cache, args.real_share, args.stamps)
    validation = Validation(held_out_photos(args.data))

    if args.init:
        model = load_refiner(args.init).model
        if args.context_scales is not None:
            model = with_context(model, args.context_scales)
    else:
        model = RefinerModel(EMBEDDED)
        assert model.image_encoder is not None
        model.image_encoder.backbone.load_state_dict(imagenet_weights())
    if args.tree_keys:
        model = with_changes(model, tree_keys=True)
    if args.network:
        model = with_network(model, args.network)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        decay=args.decay,
        backbone_scale=args.backbone_scale,
        frozen_stages=args.frozen_stages,
        frozen_detector=args.frozen_detector,
        validate_every=args.validate_every,
        workers=args.workers,
    )
    loss_config = LossConfig(cross_entropy_weight=args.cross_entropy, nodes_per_level=tuple(args.nodes_per_level))
    held_out = ", ".join(f"{len(photos)} of {name}" for name, photos in validation.sets.items())
    print(f"{len(dataset)} objects; photos held out: {held_out}", flush=True)
    train(model, dataset, args.run, config, loss_config, validation)


if __name__ == "__main__":
    main()
