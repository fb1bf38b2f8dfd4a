"""The model card that a fine-tuned refiner is saved with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transfiner_refine.config import TransfinerConfig
from transfiner_refine.training.loop import TrainResult
from transfiner_refine.training.schedule import TrainConfig


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the figures.

    Attributes:
        model: The architecture.
        start: Name of the refiner that training started from.
        train: Photos, objects and source of the coarse masks in training, in words.
        validation: The same of the figures.
        schedule: The run's schedule.
        command: What repeats the run.
    """

    model: TransfinerConfig
    start: str
    train: str
    validation: str
    schedule: TrainConfig
    command: str


def write_card(facts: CardFacts, result: TrainResult) -> str:
    """A card in the form of the Hugging Face Hub: data, recipe, figures and limits."""
    start, best, schedule = result.start, result.best, facts.schedule
    return f"""---
library_name: transfiner-refine
pipeline_tag: image-segmentation
tags: [mask-refinement, instance-segmentation]
---

# Mask refiner, fine-tuned

Refines the coarse masks of any detector by the method of *Mask Transfiner for High-Quality Instance Segmentation*
(CVPR 2022). {facts.model.layers} layers of {facts.model.channels} channels, quadtree depth {facts.model.depth}, with
an image encoder of its own.

```python
from transfiner_refine import Refiner

refined = Refiner.from_pretrained("org/name").refine(image, boxes=boxes, masks=masks)
```

## Data

- Training: {facts.train}.
- Validation, which also chose the checkpoint: {facts.validation}.

The licence of these data, and that of the refiner that training started from, decide the licence of these weights:
name both here before you publish them.

## Recipe

Started from {facts.start}; {result.best["step"]} of {schedule.steps} steps of {schedule.batch_size} objects, AdamW with
a learning rate of {schedule.learning_rate:g} for all but the backbone, of which the first {schedule.frozen_stages} of 5
stages were frozen; exponential moving average of the weights ({schedule.ema:g}); precision {schedule.precision}; seed
{schedule.seed}.

```bash
{facts.command}
```

## Figures

By the whole refinement on the validation data. *Worse* is the share of masks that lost more than 0.02 of boundary IoU.

| masks | IoU | boundary IoU | worse |
|---|---|---|---|
| coarse | {best["iou_coarse"]:.3f} | {best["boundary_iou_coarse"]:.3f} | |
| refined, before training | {_figures(start)} |
| refined | {_figures(best)} |

| quadtree level | recall of incoherent cells | accuracy | nodes per object |
|---|---|---|---|
{_levels(best)}

## Limits

The figures are of photos that resemble those of training, and the checkpoint was chosen by them: expect less elsewhere.
"""


def _figures(record: Mapping[str, float]) -> str:
    return f"{record['iou']:.3f} | {record['boundary_iou']:.3f} | {100 * record['worse']:.1f} %"


def _levels(record: Mapping[str, float]) -> str:
    rows = []
    while f"recall_{len(rows)}" in record:
        level = len(rows)
        recall, accuracy, nodes = (record[f"{name}_{level}"] for name in ("recall", "accuracy", "nodes"))
        rows.append(f"| {level} | {recall:.2f} | {accuracy:.2f} | {nodes:.0f} |")
    return "\n".join(rows)
