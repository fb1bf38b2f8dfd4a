"""Distillation: a refiner learns from others what they make of its own nodes, and only behind the quadtree."""

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from small_models import encoder_config, eventful_model
from torch.utils.data import default_collate
from training_runs import DEPTH, disc_sample

from transfiner_refine.data.crops import CropSample
from transfiner_refine.modeling.model import RefinerModel


@pytest.fixture
def distill(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("distill")


@pytest.fixture
def batch() -> CropSample:
    generator = torch.Generator().manual_seed(0)
    return default_collate([disc_sample(generator) for _ in range(3)])


def model(tree_keys: bool) -> RefinerModel:
    """The same weights, whatever the keys of attention."""
    return eventful_model(encoder_config(depth=DEPTH, tree_keys=tree_keys)).eval()


def test_nothing_is_to_learn_from_itself(distill: ModuleType, batch: CropSample):
    student = model(tree_keys=True)
    assert distill.disagreement([model(tree_keys=True)] * 2, student, batch).item() == pytest.approx(0, abs=1e-6)
    assert distill.disagreement([model(tree_keys=False)], student, batch).item() > 1e-5


def test_a_student_comes_nearer_and_keeps_its_nodes(distill: ModuleType, batch: CropSample):
    teachers, student = [model(tree_keys=False)], model(tree_keys=True)
    before, trained = copy.deepcopy(student.state_dict()), distill.Student(student)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    losses = []
    for _ in range(20):
        loss = distill.disagreement(teachers, student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    changed = {
        name.split(".")[1] for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"node_encoder", "sequence_encoder", "pixel_decoder"}
    for parameter in student.parameters():
        trains = any(parameter is one for one in trained.parameters())
        assert trains or parameter.grad is None


def test_the_target_is_the_mean_of_the_teachers(distill: ModuleType, batch: CropSample):
    """Two teachers that err in opposite ways are of one mind with a student between them."""
    student = model(tree_keys=True)
    teachers = [copy.deepcopy(student) for _ in range(2)]
    for teacher, shift in zip(teachers, (1.0, -1.0), strict=True):
        with torch.no_grad():
            teacher.transfiner.pixel_decoder.layers[2].bias += shift  # type: ignore[operator]
    assert distill.disagreement(teachers, student, batch).item() == pytest.approx(0, abs=1e-6)
    assert distill.disagreement(teachers[:1], student, batch).item() > 1e-3
