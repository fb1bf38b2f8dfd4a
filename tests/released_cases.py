"""Checkpoints in the released layout, and the recorded outputs of the released code, for the tests of that variant."""

import importlib.util
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from transfiner_refine.modeling.released import ReleasedMaskBranch
from transfiner_refine.modeling.released_detector import PIXEL_MEANS, ReleasedNetwork, cell_anchors
from transfiner_refine.modeling.released_layout import MODEL_NAMES, ReleasedConfig, original_name

REPOSITORY = Path(__file__).resolve().parent.parent
MASK_HEAD = "roi_heads.mask_head."

TRAINING_ONLY = {
    f"{MASK_HEAD}deconv_bo.weight": (256, 256, 2, 2),
    f"{MASK_HEAD}deconv_bo.bias": (256,),
    f"{MASK_HEAD}predictor_bo.weight": (1, 256, 1, 1),
    f"{MASK_HEAD}predictor_bo.bias": (1,),
    f"{MASK_HEAD}predictor_semantic_s.weight": (1, 256, 1, 1),
    f"{MASK_HEAD}predictor_semantic_s.bias": (1,),
}

AS_CONVOLUTION = ("encoder.conv_fuse.weight", "encoder.conv_r1.0.weight", "encoder.conv_r1.2.weight")
"""Linear layers of ours that a checkpoint holds as 1×1 convolutions."""


def original_shapes(config: ReleasedConfig) -> dict[str, tuple[int, ...]]:
    """Key and shape of every weight of a checkpoint."""
    with torch.device("meta"):
        ours = ReleasedNetwork(config).state_dict()
    shapes = {original_name(name, MODEL_NAMES): tuple(value.shape) for name, value in ours.items()}
    shapes |= {key: (*shape, 1, 1) for key, shape in shapes.items() if key.endswith(AS_CONVOLUTION)}
    return shapes | TRAINING_ONLY


def flat_checkpoint(config: ReleasedConfig = ReleasedConfig()) -> dict[str, Tensor]:  # noqa: B008
    """A whole checkpoint whose tensors are views of one number each: some kilobytes as a file."""
    return {key: torch.full((1,), 0.01).expand(shape) for key, shape in original_shapes(config).items()}


def constants() -> dict[str, Tensor]:
    """What Detectron2 stores besides the weights."""
    anchors = {f"proposal_generator.anchor_generator.cell_anchors.{i}": a for i, a in enumerate(cell_anchors())}
    means = torch.tensor(PIXEL_MEANS)[:, None, None]
    return {"pixel_mean": means, "pixel_std": torch.ones(3, 1, 1), **anchors}


@cache
def random_branch() -> ReleasedMaskBranch:
    """A branch with random weights whose nodes are few, so that it is fast. Not to be changed."""
    torch.manual_seed(0)
    branch = ReleasedMaskBranch().eval().requires_grad_(False)
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    features, boxes, classes = scene([3], seed=7)
    incoherence = branch(features, boxes, classes, max_instances=0).incoherence
    found = torch.quantile(torch.logit(incoherence.flatten().double(), 1e-9), torch.tensor([0.8, 0.95]).double())
    # A fifth of the cells are nodes at 28×28 (from 1e-6), a twentieth at 56×56 (from 0.125).
    scale = float((-1.95 + 13.82) / (found[1] - found[0]))
    classifier = branch.incoherence_classifier
    assert classifier.bias is not None
    with torch.no_grad():
        classifier.weight.mul_(scale)
        classifier.bias.mul_(scale).add_(-13.82 - scale * float(found[0]))
    return branch


def scene(counts: list[int], seed: int = 0, size: tuple[int, int] = (128, 192)) -> tuple[Any, Any, Any]:
    """Random features of a batch, and boxes and classes of each image."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    features = [torch.randn(len(counts), 256, height // s, width // s, generator=generator) for s in (4, 8, 16, 32)]
    limit = torch.tensor([width, height, width, height])
    boxes, classes = [], []
    for count in counts:
        centre = torch.rand(count, 2, generator=generator) * limit[:2]
        half = torch.exp(2 + 2.5 * torch.rand(count, 2, generator=generator))
        boxes.append(torch.cat([centre - half, centre + half], dim=1).clamp(min=0).minimum(limit))
        classes.append(torch.randint(0, 80, (count,), generator=generator))
    return features, boxes, classes


@dataclass(frozen=True)
class RecordedCase:
    """Inputs' seeds and outputs of the released code."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    recipe: Any
    folder: Path

    def weights(self, keys: str) -> dict[str, Tensor]:
        """The case's random weights, for the keys and shapes in a file."""
        shapes = json.loads((self.folder / keys).read_text())
        seed = self.settings["seed"]
        return {key: torch.from_numpy(self.recipe.draw(key, tuple(shape), seed)) for key, shape in shapes.items()}


def released_folder() -> Path:
    """The folder of recorded cases; skips the test without it."""
    folder = Path(os.environ.get("TRANSFINER_RELEASED", REPOSITORY.parent / "shared" / "released")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no recorded cases in {folder}: set TRANSFINER_RELEASED to the folder that holds them")
    return folder


@cache
def recorded_case(name: str) -> RecordedCase:
    """Load a recorded case; skips the test without it."""
    folder = released_folder()
    spec = importlib.util.spec_from_file_location("recipe", folder / "recipe.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a file is no dict
        metadata = file.metadata()
    settings = {key: json.loads(value) if value[0] in "[0123456789" else value for key, value in metadata.items()}
    return RecordedCase(settings, tensors, recipe, folder)
