"""The model card of a detector that was trained with its refiner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transfiner_refine.adapters.protocol import JointOptions
from transfiner_refine.config import TransfinerConfig
from transfiner_refine.training.loop import TrainResult
from transfiner_refine.training.schedule import TrainConfig

TRAINED = {
    "all": "detector and refiner",
    "heads": "the refiner and all of the detector but its backbone",
    "refiner": "the refiner; the detector stayed as it was",
}
"""In words, by scope."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the figures.

    Attributes:
        source: The detector, as the refiner's config names it.
        model: The refiner's architecture.
        joint: What was trained, and the weights of the losses.
        categories: Names of the classes in the order of their labels.
        can_be_loaded_alone: Whether the directory says how the detector is built.
        train: Photos and objects in training, in words.
        validation: The same of the figures.
        schedule: The run's schedule.
        command: What repeats the run.
    """

    source: str
    model: TransfinerConfig
    joint: JointOptions
    categories: Sequence[str]
    can_be_loaded_alone: bool
    train: str
    validation: str
    schedule: TrainConfig
    command: str


LOADED_ALONE = """from huggingface_hub import snapshot_download

from transfiner_refine.adapters.models import load_refined

model = load_refined(snapshot_download("org/name"))  # or a directory"""

LOADED_WITH_DETECTOR = """from huggingface_hub import snapshot_download

from transfiner_refine.adapters import adapt

model = adapt(detector).with_refiner(snapshot_download("org/name"))  # a detector built as in training"""


def write_card(facts: CardFacts, result: TrainResult) -> str:
    """A card in the form of the Hugging Face Hub: use, data, recipe, figures and limits."""
    start, best, schedule, loss = result.start, result.best, facts.schedule, facts.joint.loss
    return f"""---
library_name: transfiner-refine
pipeline_tag: image-segmentation
tags: [instance-segmentation, mask-refinement]
---

# Detector with refined masks

{facts.source}, and a refiner on its features, trained together by the method of *Mask Transfiner for High-Quality
Instance Segmentation* (CVPR 2022). The refiner has {facts.model.layers} layers of {facts.model.channels} channels and
quadtree depth {facts.model.depth}.

```python
{LOADED_ALONE if facts.can_be_loaded_alone else LOADED_WITH_DETECTOR}
```

The model is called as the detector is, and returns what it returns, with refined masks.

Classes, in the order of their labels: {", ".join(facts.categories)}.

## Data

- Training: {facts.train}.
- Validation, which also chose the checkpoint: {facts.validation}.

The licence of these data, and those of the weights that training started from, decide the licence of these weights:
name both here before you publish them.

## Recipe

Trained: {TRAINED[facts.joint.train]}. Losses: the detector's own (1), refinement ({loss.refine_weight:g}), incoherence
({loss.incoherence_weight:g}), on at most {facts.joint.max_rois} RoIs of a photo. {best["step"]} of {schedule.steps}
steps of {schedule.batch_size} photos, half of them mirrored, AdamW with a learning rate of {schedule.learning_rate:g},
of the backbone {schedule.backbone_scale * schedule.learning_rate:g}; exponential moving average of the weights
({schedule.ema:g}); precision {schedule.precision}; seed {schedule.seed}.

```bash
{facts.command}
```

## Figures

Average precision by COCO's rules on the validation photos, of 100.

| masks | mask AP | boundary AP |
|---|---|---|
| before training | {100 * start["mask_ap"]:.1f} | {100 * start["boundary_ap"]:.1f} |
| of the detector alone | {100 * best["mask_ap_coarse"]:.1f} | {100 * best["boundary_ap_coarse"]:.1f} |
| refined | {100 * best["mask_ap"]:.1f} | {100 * best["boundary_ap"]:.1f} |

## Limits

The figures are of photos that resemble those of training, and the checkpoint was chosen by them: expect less elsewhere.
"""
