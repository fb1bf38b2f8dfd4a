"""Train a Mask2Former of transformers on Penn-Fudan with and without a refiner on its features, and compare the masks.

    pip install 'transformers>=5.4' scipy
    python benchmarks/joint_pennfudan_queries.py runs/joint_pennfudan_queries

As ``joint_pennfudan.py``, with its split, measures and files. The Mask2Former is a small one: 20 queries, a pixel
decoder of two layers and a transformer of three, 64 channels. Its backbone is the embedded model's image encoder, all
else of it starts at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from dataset import DATA
from joint_pennfudan import Budget, Host, compare, embedded_encoder
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from transfiner_refine.adapters.protocol import Adapter
from transfiner_refine.adapters.transformers import TransformersAdapter
from transfiner_refine.adapters.transformers_hosts import training_input
from transfiner_refine.adapters.transformers_joint import LIBRARY
from transfiner_refine.data.photos import PhotoSample

WIDTH = 64
"""Channels of the embedded feature pyramid, and of all maps and queries of the Mask2Former."""


class LiteStages(nn.Module):
    """The embedded image encoder from stride 4 on, as transformers calls a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = embedded_encoder()

    def forward(self, pixel_values: Tensor) -> Any:
        maps = self.encoder(pixel_values.contiguous(memory_format=torch.channels_last)).maps[1:]
        return LIBRARY.modeling_outputs.BackboneOutput(feature_maps=maps)


def build_mask2former(budget: Budget) -> TransformersAdapter:
    # It stands for the backbone until that takes its place: of its width.
    stages = LIBRARY.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[WIDTH] * 4,
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = LIBRARY.Mask2FormerConfig(
        backbone_config=stages,
        feature_size=WIDTH,
        mask_feature_size=WIDTH,
        hidden_dim=WIDTH,
        encoder_layers=2,
        encoder_feedforward_dim=4 * WIDTH,
        decoder_layers=4,  # one more than there are
        dim_feedforward=4 * WIDTH,
        num_attention_heads=4,
        num_queries=20,
        num_labels=1,
        train_num_points=4096,
    )
    model = LIBRARY.Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder = LiteStages()
    processor = LIBRARY.Mask2FormerImageProcessor(
        size={"shortest_edge": budget.side, "longest_edge": 2 * budget.side},
        do_normalize=False,  # the backbone does
    )
    adapter = TransformersAdapter(model, processor, channels=WIDTH)
    assert isinstance(adapter.laterals, FeaturePyramidNetwork)
    hand_on(adapter.laterals)
    return adapter


@torch.no_grad()
def hand_on(laterals: FeaturePyramidNetwork) -> None:
    """Let laterals begin by handing on the maps, which are a pyramid already.

    What a level passes down to the next finer one is halved, so that the sum on the way down does not drown it.
    """
    for level, (inner, outer) in enumerate(zip(laterals.inner_blocks, laterals.layer_blocks, strict=True)):
        nn.init.dirac_(inner.get_submodule("0").get_parameter("weight")).mul_(0.5**level)
        nn.init.dirac_(outer.get_submodule("0").get_parameter("weight")).mul_(2.0**level)


def mask2former_losses(adapter: Adapter, samples: Sequence[PhotoSample]) -> dict[str, Tensor]:
    assert isinstance(adapter, TransformersAdapter)
    output = adapter.model(**training_input(adapter.host, adapter.processor, samples))
    return {"loss": output.loss}


def main(
    folder: Annotated[Path, typer.Argument(help="Gets the figures and the models.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 800,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    side: Annotated[int, typer.Option(min=32, help="Shorter side of the detector's input in pixels.")] = 256,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    train_photos: Annotated[int, typer.Option(min=1, help="The others are evaluated.")] = 120,
) -> None:
    """Compare the masks of a Mask2Former, alone and with a refiner that is trained with it."""
    LIBRARY.logging.set_verbosity_error()  # it warns of the backbone that is replaced
    budget = Budget(steps, batch_size, side, learning_rate, train_photos)
    # The refiner comes trained, and the masks of the first hundred steps teach it little; a tenth is too slow.
    compare(Host(build_mask2former, mask2former_losses, refiner_rate=0.5), budget, seeds, folder, data)


if __name__ == "__main__":
    typer.run(main)
