"""The paper's training schedules, against values worked out by hand from its implementation details."""

from dataclasses import replace

import pytest
import torch

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.training.recipes import RECIPES

COCO_TRAIN_2017 = 118_287


@pytest.mark.parametrize(
    ("name", "batch_size", "ends", "rates"),
    [
        ("coco", 16, (60_000, 80_000, 90_000), (0.02, 0.002, 0.0002)),
        # 8 epochs of 118,287 images, 8 at a time, are as many updates; 11 are 162,644.6; 12 are 177,430.5.
        ("coco-ablation", 8, (118_287, 162_645, 177_431), (0.01, 0.001, 0.0001)),
        ("cityscapes", 8, (18_000, 24_000), (0.01, 0.001)),
        ("bdd100k", 16, (22_000, 26_000, 30_000), (0.02, 0.002, 0.0002)),
    ],
)
def test_learning_rate_of_every_phase(name: str, batch_size: int, ends: tuple[int, ...], rates: tuple[float, ...]):
    recipe = RECIPES[name]
    assert recipe.batch_size == batch_size
    assert recipe.phase_ends(COCO_TRAIN_2017) == ends
    starts = (1000, *ends[:-1])
    for start, end, rate in zip(starts, ends, rates, strict=True):
        assert recipe.learning_rate_at(start, COCO_TRAIN_2017) == pytest.approx(rate)
        assert recipe.learning_rate_at(end - 1, COCO_TRAIN_2017) == pytest.approx(rate)
    assert recipe.learning_rate_at(ends[-1], COCO_TRAIN_2017) == pytest.approx(rates[-1])


def test_warm_up_is_constant():
    recipe = RECIPES["coco"]
    assert recipe.learning_rate_at(0) == recipe.learning_rate_at(999) == pytest.approx(0.02 / 1000)
    assert recipe.learning_rate_at(1000) == 0.02
    assert replace(recipe, warmup_updates=0).learning_rate_at(0) == 0.02


def test_image_sizes():
    cityscapes, bdd100k = RECIPES["cityscapes"], RECIPES["bdd100k"]
    assert cityscapes.short_sides == (800, 832, 864, 896, 928, 960, 992, 1024)
    assert bdd100k.short_sides == (600, 624, 648, 672, 696, 720)
    assert (cityscapes.test_short_side, bdd100k.test_short_side) == (1024, 720)
    assert all(recipe.flip == 0.5 for recipe in RECIPES.values())


def test_optimizer_and_schedule_follow_the_recipe():
    recipe = replace(RECIPES["bdd100k"], phases=(3, 2, 1), warmup_updates=1)
    slow, fast = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = recipe.optimizer([{"params": [fast]}, {"params": [slow], "lr": 0.002}])
    assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.9, 1e-4)}
    schedule = recipe.schedule(optimizer)
    rates = []
    for _ in range(recipe.phase_ends()[-1]):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [0.00002, 0.02, 0.02, 0.002, 0.002, 0.0002]
    assert [fast for fast, _ in rates] == pytest.approx(expected)
    assert [slow for _, slow in rates] == pytest.approx([rate / 10 for rate in expected])


def test_epochs_need_the_number_of_images():
    with pytest.raises(InvalidInputError, match="expected the number of training images"):
        RECIPES["coco-ablation"].learning_rate_at(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "expected batch_size above 0, got 0"),
        ({"learning_rate": float("nan")}, "expected learning_rate above 0, got nan"),
        ({"phases": ()}, "expected phases as one or more integers"),
        ({"short_sides": (800, 0)}, "expected short_sides"),
        ({"unit": "steps"}, 'expected unit "updates" or "epochs"'),
        ({"flip": 1.5}, "expected flip from 0 to 1"),
    ],
)
def test_values_out_of_range_are_refused(change: dict, message: str):
    with pytest.raises(InvalidInputError, match=message):
        replace(RECIPES["coco"], **change)
