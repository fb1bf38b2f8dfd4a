"""How the released checkpoints are laid out: what their keys tell, and what this package calls the same tensors.

A released checkpoint is a Detectron2 Mask R-CNN with the authors' mask branch. The detector keeps Detectron2's names
inside of its parts; the mask branch's are translated to this package's vocabulary. Each tensor of a checkpoint is one
of three kinds: used, needed in training alone, or a constant of the model. Anything else is an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfiner_refine.errors import InvalidInputError, WeightsError

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Bottleneck blocks of res2 to res5, by the depth of the ResNet."""

MODEL_TYPE = "released_mask_transfiner"
"""Tells the ``config.json`` of such a model from a refiner's."""

MASK_HEAD = "roi_heads.mask_head."
MASK_POOLER = "roi_heads.mask_pooler."

BRANCH_NAMES = {
    "semantic_tower.": f"{MASK_POOLER}conv_norm_relus_semantic.",
    **{f"coarse_tower.{2 * i}.": f"{MASK_HEAD}mask_fcn{i + 1}." for i in range(4)},
    "coarse_upsample.": f"{MASK_HEAD}deconv.",
    "coarse_classifier.": f"{MASK_HEAD}predictor.",
    **{f"incoherence_tower.{2 * i}.": f"{MASK_HEAD}mask_fcn_uncertain{i + 1}." for i in range(4)},
    "incoherence_upsample.": f"{MASK_HEAD}deconv_uncertain.",
    "incoherence_classifier.": f"{MASK_HEAD}predictor_uncertain.",
    "node_encoder.": f"{MASK_HEAD}encoder.conv_fuse.",
    **{
        f"sequence_encoder.{i}.{ours}": f"{MASK_HEAD}encoder.layers.{i}.{theirs}"
        for i in range(3)
        for ours, theirs in (
            ("qkv.", "self_attn.in_proj_"),
            ("project.", "self_attn.out_proj."),
            ("norm_attention.", "norm1."),
            ("ffn.0.", "linear1."),
            ("ffn.2.", "linear2."),
            ("norm_ffn.", "norm2."),
        )
    },
    "pixel_decoder.": f"{MASK_HEAD}encoder.conv_r1.",
}
"""Prefix of our names in the mask branch: prefix of the original ones."""

MODEL_NAMES = {
    "backbone.": "backbone.",
    "rpn_head.": "proposal_generator.rpn_head.",
    "box_head.": "roi_heads.box_head.",
    "box_predictor.": "roi_heads.box_predictor.",
    **{f"mask_branch.{ours}": theirs for ours, theirs in BRANCH_NAMES.items()},
}
"""Prefix of our names in the whole model: prefix of the original ones."""

TRAINING_ONLY = tuple(f"{MASK_HEAD}{name}." for name in ("deconv_bo", "predictor_bo", "predictor_semantic_s"))
"""Prefixes of the tensors that only the losses of the released code need."""

COUNTER = ".num_batches_tracked"
"""Suffix of the step counters that batch norms leave behind."""


@dataclass(frozen=True)
class ReleasedConfig:
    """Architecture and settings of one released model.

    Attributes:
        depth: Of the ResNet, 50 or 101.
        deformable: Whether res3 to res5 have deformable convolutions.
        modulated: Whether these weight their positions too.
        score_threshold: Detections have a score above it.
        detections_per_image: Most detections of an image.
        min_size: Pixels that the image's shorter side is resized to.
        model_type: Tells this ``config.json`` from a refiner's.
        format_version: Version of this layout, raised when old files can no longer be read.
    """

    depth: int = 50
    deformable: bool = False
    modulated: bool = False
    score_threshold: float = 0.05
    detections_per_image: int = 100
    min_size: int = 800
    model_type: str = MODEL_TYPE
    format_version: int = 1

    def __post_init__(self) -> None:
        if self.model_type != MODEL_TYPE or self.format_version != 1:
            raise InvalidInputError(
                f"expected model_type {MODEL_TYPE!r} of format_version 1, got {self.model_type!r} of "
                f"{self.format_version}: convert the checkpoint with this release"
            )
        if self.depth not in BLOCKS:
            raise InvalidInputError(f"expected depth {' or '.join(map(str, BLOCKS))}, got {self.depth}")
        if self.modulated and not self.deformable:
            raise InvalidInputError("expected modulated only with deformable, got modulated alone")
        if not 0 <= self.score_threshold <= 1:
            raise InvalidInputError(f"expected score_threshold from 0 to 1, got {self.score_threshold}")
        if self.detections_per_image < 1 or self.min_size < 1:
            raise InvalidInputError(
                f"expected detections_per_image and min_size of at least 1, got {self.detections_per_image} "
                f"and {self.min_size}"
            )

    @staticmethod
    def from_keys(original: Mapping[str, Tensor]) -> "ReleasedConfig":
        """Tell the architecture from a checkpoint's keys and shapes.

        Raises:
            WeightsError: If it is no ResNet-50 or 101 of Detectron2's.
        """
        prefix, suffix = "backbone.bottom_up.res4.", ".conv3.weight"
        blocks = sum(key.startswith(prefix) and key.endswith(suffix) for key in original)
        depth = {counts[2]: depth for depth, counts in BLOCKS.items()}.get(blocks)
        if depth is None:
            raise WeightsError(
                f"expected a released Mask Transfiner on a ResNet of {' or '.join(map(str, BLOCKS))} layers, "
                f"got {len(original)} tensors with {blocks} bottleneck blocks in res4: "
                "this is a checkpoint of another model (Swin backbones are not supported)"
            )
        offsets = original.get("backbone.bottom_up.res3.0.conv2_offset.weight")
        return ReleasedConfig(depth, offsets is not None, offsets is not None and offsets.shape[0] == 27)


@dataclass(frozen=True)
class KeyReport:
    """What became of every key of a checkpoint.

    Attributes:
        used: Original key: our name.
        training_only: Keys of tensors that inference does not need.
        constants: Keys of constants that were compared with the model's own, and of step counters.
    """

    used: Mapping[str, str]
    training_only: tuple[str, ...]
    constants: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.used) + len(self.training_only) + len(self.constants)
        return (
            f"{total} keys: {len(self.used)} used, {len(self.training_only)} needed in training alone, "
            f"{len(self.constants)} constants"
        )


def original_name(name: str, names: Mapping[str, str]) -> str:
    """Translate one of our names to the original one.

    Args:
        name: Name in our state dict.
        names: ``BRANCH_NAMES`` or ``MODEL_NAMES``.
    """
    ours = next(prefix for prefix in names if name.startswith(prefix))
    return names[ours] + name[len(ours) :]


def translate(
    original: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    names: Mapping[str, str],
    constants: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], KeyReport]:
    """Translate a checkpoint's tensors to a state dict of ours, strictly.

    Args:
        original: The checkpoint's tensors. Not modified, and no memory is shared with it.
        expected: Our state dict, of which only names and shapes count (tensors may be on the meta device).
        names: ``BRANCH_NAMES`` or ``MODEL_NAMES``.
        constants: Tensors that a checkpoint may hold, with the values that they must have.

    Returns:
        Float32 tensors for a strict ``load_state_dict``, and what became of every key.

    Raises:
        WeightsError: If a key is missing or unknown, or a tensor has another shape, dtype or constant value.
    """
    used = {original_name(name, names): name for name in expected}
    constants = constants or {}
    training_only = tuple(key for key in original if key.startswith(TRAINING_ONLY))
    constant = tuple(key for key in original if key in constants or key.endswith(COUNTER))
    missing = [key for key in used if key not in original]
    unknown = [key for key in original if key not in used and key not in training_only and key not in constant]
    if missing or unknown:
        raise WeightsError(
            f"expected the {len(used)} tensors of a released Mask Transfiner, got {len(original)}: "
            f"{_named('missing', missing)}, {_named('unknown', unknown)}; this is a checkpoint of another model"
        )
    for key in constant:
        if key in constants and not _same(original[key], constants[key]):
            raise WeightsError(
                f"expected {key} to be {constants[key].flatten().tolist()}, got {_values(original[key])}: "
                "this checkpoint was trained with other settings, which are not supported"
            )
    weights = {name: _fitted(key, original[key], expected[name].shape) for key, name in used.items()}
    return weights, KeyReport(used, training_only, constant)


def _fitted(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A copy in float32; a 1×1 convolution may become a linear layer."""
    fits = value.shape == shape or (value.ndim == 4 and value.shape == (*shape, 1, 1))
    if not fits or not value.is_floating_point():
        raise WeightsError(
            f"expected {key} of shape {tuple(shape)}, float, got {tuple(value.shape)} {value.dtype}: "
            "this is a checkpoint of another model"
        )
    return value.detach().to(torch.float32, copy=True).reshape(shape).contiguous()


def _same(value: Tensor, constant: Tensor) -> bool:
    return value.numel() == constant.numel() and torch.allclose(value.float().flatten(), constant.flatten(), atol=1e-3)


def _values(value: Tensor) -> list[float] | str:
    return value.flatten().tolist() if value.numel() <= 12 else f"shape {tuple(value.shape)}"


def _named(what: str, keys: Sequence[str]) -> str:
    """Count keys, and name the first."""
    return f"{len(keys)} {what}" + (f" (the first is {keys[0]!r})" if keys else "")
