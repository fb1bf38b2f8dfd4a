"""What every adapter offers: a detector's coarse predictions with its features, and the detector with refined masks.

B images, N instances of an image, S side of a mask, H W image pixels.

A module of a host framework subclasses :class:`Adapter` (here) and ``RefinedDetector`` (``joint.py``), and imports that
one framework. What both need besides, running a host model without leaving a trace, is at the end of this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from transfiner_refine.adapters.saving import DETECTOR, LATERALS, load_part, weights_fingerprint
from transfiner_refine.config import RefineOptions, TransfinerConfig
from transfiner_refine.errors import InvalidInputError, MissingDependencyError, WeightsError
from transfiner_refine.inputs import as_image
from transfiner_refine.modeling.hub import find_model
from transfiner_refine.modeling.model import IMAGE_ENCODER, RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.training.losses import LossConfig
from transfiner_refine.types import FeaturePyramid, Instances

if TYPE_CHECKING:
    from transfiner_refine.adapters.joint import RefinedDetector

TrainScope = Literal["refiner", "heads", "all"]
"""What joint training changes: the refiner alone, all but the detector's backbone, or everything."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a detector found in one image, before refinement. All tensors are on the detector's device.

    Attributes:
        instances: Coarse instances in pixels of the original image, in the host's own order: boxes, masks
            ``(N, H, W)`` as the host pastes them (bool, or float32 probabilities), scores and labels.
        indices: ``(N,)`` int64, the query or instance of the host's own output that each comes from.
        features: The detector's feature pyramid, a batch of one; None where the detector has none that serves.
        box_probs: ``(N, S, S)`` float32 mask probabilities in the frame of each box, where the host has them (28×28);
            what refinement starts from then, rather than from the pasted masks.
        mask_logits: ``(N, h, w)`` float32, raw mask logits of a query model, over the network's input without padding;
            None elsewhere.
        host: The host's own output for this image.

    Raises:
        InvalidInputError: If the parts differ in length.
    """

    instances: Instances
    indices: Tensor
    features: FeaturePyramid | None = None
    box_probs: Tensor | None = None
    mask_logits: Tensor | None = None
    host: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("indices", "box_probs", "mask_logits"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.instances):
                raise InvalidInputError(f"expected {name} of {len(self.instances)} instances, got {len(value)}")

    def __len__(self) -> int:
        return len(self.instances)


@dataclass(frozen=True)
class JointOptions:
    """How a detector and its refiner work together; the arguments of :meth:`Adapter.with_refiner`.

    Attributes:
        refine: Choices of each refinement.
        train: What training changes: ``"refiner"`` alone, ``"heads"`` (all but the detector's backbone), or ``"all"``
            (whatever of the detector was trainable before).
        detach_coarse: Whether the refinement losses stop at the coarse masks, so that they reach the detector through
            its features alone.
        max_rois: RoIs of each image that the refinement losses see, drawn at random among those that the host trains
            its mask head on.
        loss: Weights of the refinement losses and sampling of the nodes; the default is the paper's.
    """

    refine: RefineOptions = field(default_factory=RefineOptions)
    train: TrainScope = "all"
    detach_coarse: bool = True
    max_rois: int = 64
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if self.train not in ("refiner", "heads", "all"):
            raise InvalidInputError(f'expected train "refiner", "heads" or "all", got {self.train!r}')
        if self.max_rois < 1:
            raise InvalidInputError(f"expected max_rois of at least 1, got {self.max_rois}")


class Adapter(ABC):
    """A detector of a host framework, as the refiner sees it.

    A subclass gives ``name``, :attr:`channels`, :attr:`strides`, :attr:`backbone`, :meth:`detect` and :meth:`_wrap`,
    and checks in ``__init__`` that it can serve the model at all.

    Args:
        model: The detector; its weights and hooks are left as they are.

    Attributes:
        name: The host framework: ``"torchvision"``, ``"detectron2"``, ``"mmdet"``, ``"transformers"``.
        trainer: What trains a model of this host, where :func:`~transfiner_refine.adapters.training.train_detector`
            does not; None where it does.
        first_label: Label of the first class.
        model: The detector.
        categories: COCO records of the classes in the order of their labels, where a data set gave them; saved with the
            model.
        recipe: What builds the detector again, JSON values, where the package built it; saved with the model, and the
            detector's weights with it.
        laterals: What turns a backbone's stages into maps of one width, where the host has no FPN
            (``torchvision.ops.FeaturePyramidNetwork`` does); trained and saved with the refiner. None elsewhere.
    """

    name: ClassVar[str]
    trainer: ClassVar[str | None] = None
    first_label: ClassVar[int] = 0
    model: nn.Module
    categories: tuple[dict[str, Any], ...] | None = None
    recipe: dict[str, Any] | None = None
    laterals: nn.Module | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._trainable: list[tuple[nn.Parameter, bool]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of every map of the feature pyramid."""

    @property
    @abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Strides of the pyramid's maps in network pixels, finest first."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The part of the detector that makes its features; frozen with ``train="heads"``."""

    @property
    def class_count(self) -> int | None:
        """Classes that the detector tells apart, without the background; None if it does not say."""
        return None

    @property
    def source(self) -> str:
        """Name of these features in a refiner's config, such as ``"torchvision:MaskRCNN"``."""
        return f"{self.name}:{type(self.model).__name__}"

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the names, shapes and bytes of all weights and buffers of the detector."""
        return weights_fingerprint(self.model)

    def config(self, **overrides: Any) -> TransfinerConfig:
        """Configuration of a new refiner on this detector's features.

        Args:
            **overrides: Fields of :class:`~transfiner_refine.TransfinerConfig` that differ from the paper's model.
        """
        values = {"feature_source": self.source, "feature_channels": self.channels, "strides": self.strides}
        return TransfinerConfig(**(values | overrides))

    @abstractmethod
    def detect(self, images: Any) -> list[Prediction]:
        """Run the detector in evaluation mode, without gradients; it is left in the mode in which it was.

        Args:
            images: A list of images as the host takes them, or as :func:`as_images` does.

        Returns:
            One prediction per image, empty ones included.
        """

    @abstractmethod
    def _wrap(self, refiner: RefinerModel, options: JointOptions) -> RefinedDetector:
        """Make the host's ``RefinedDetector``; everything is checked already."""

    def with_refiner(
        self,
        refiner: Refiner | str | Path,
        *,
        options: RefineOptions | None = None,
        train: TrainScope = "all",
        detach_coarse: bool = True,
        max_rois: int = 64,
        loss: LossConfig | None = None,
        check_source: bool = True,
    ) -> RefinedDetector:
        """Join the detector and a refiner in one module that is called as the detector is.

        In evaluation mode its output is the detector's own, with refined masks. In training mode it returns the
        detector's losses, and ``loss_refine`` and ``loss_incoherence`` with them.

        Args:
            refiner: A refiner on this detector's features (:meth:`config`) or with an image encoder of its own; or a
                directory that the module's ``save_pretrained`` wrote, from which a detector that was trained with the
                refiner, and the laterals, are loaded too; or a Hub id ``"org/name"``, of a refiner alone.
            options: Choices of each refinement.
            train: See :class:`JointOptions`; also ``detach_coarse``, ``max_rois`` and ``loss``.
            detach_coarse: See there.
            max_rois: See there.
            loss: See there.
            check_source: Whether a refiner for another detector, or for other weights of this one, is refused.

        Returns:
            A module that holds the same detector as ``detector`` and the same refiner as ``refiner_model``, in the
            detector's mode.

        Raises:
            InvalidInputError: If it is no refiner, or for features of another detector, or an option is out of range.
            WeightsError: If a file in the directory is missing, damaged, or of another architecture.
        """
        joint = JointOptions(options or RefineOptions(), train, detach_coarse, max_rois, loss or LossConfig())
        if not isinstance(refiner, (Refiner, str, Path)):
            remedy = "pass Refiner.from_pretrained(), or Refiner(RefinerModel(adapter.config())) for a new one"
            if isinstance(refiner, RefinerModel):
                remedy = "wrap it in Refiner(...)"
            raise InvalidInputError(
                f"expected a Refiner, a directory or a Hub id, got {type(refiner).__name__}: {remedy}"
            )
        self.detach()
        if isinstance(refiner, Refiner):
            self._check_refiner(refiner.config, check_source)
            self._check_weights(refiner.config, check_source)
        else:
            refiner = self._load(refiner, check_source)
        self._trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._modes = [(module, module.training) for module in self.model.modules()]
        return self._wrap(refiner.model, joint)

    def detach(self) -> None:
        """Give the detector back: which weights are trainable, and each module's mode, are as before the refiner came.

        Its hooks were never changed beyond a call. Weights that training or loading changed stay as they are.
        """
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
        for module, mode in self._modes:
            module.training = mode
        self._trainable, self._modes = [], []

    def _load(self, name_or_path: str | Path, check_source: bool) -> Refiner:
        """Load a refiner with what was saved beside it: first all checks that need no weights of the detector."""
        directory = find_model(name_or_path)
        refiner = Refiner.from_pretrained(directory)
        self._check_refiner(refiner.config, check_source)
        needs_laterals = self.laterals is not None and refiner.config.feature_source != IMAGE_ENCODER
        if needs_laterals and not (directory / LATERALS).exists() and not Path(name_or_path).is_dir():
            raise WeightsError(
                f"expected {LATERALS} beside this refiner, got {str(name_or_path)!r}, a Hub id, of which the refiner "
                "alone is loaded: pass the directory that huggingface_hub.snapshot_download gives for it"
            )
        if (directory / DETECTOR).exists():
            load_part(self.model, directory / DETECTOR)  # the refiner's own, in whatever dtype the detector keeps it
        else:
            self._check_weights(refiner.config, check_source)
        if self.laterals is not None and needs_laterals:
            load_part(self.laterals, directory / LATERALS)
        return refiner

    def _check_refiner(self, config: TransfinerConfig, check_source: bool) -> None:
        """Refuse a refiner that cannot read these features, or that was made for others."""
        if config.feature_source == IMAGE_ENCODER:
            return
        if (config.feature_channels, config.strides) != (self.channels, self.strides):
            raise InvalidInputError(
                f"expected a refiner for {self.channels} channels at strides {self.strides}, those of {self.source!r}, "
                f"got one for {config.feature_channels} channels at strides {config.strides}: load the refiner of this "
                "detector, or make one with RefinerModel(adapter.config())"
            )
        if check_source and config.feature_source != self.source:
            raise InvalidInputError(
                f"expected a refiner for features of {self.source!r}, got one for {config.feature_source!r}: load the "
                "refiner of this detector, or pass check_source=False if the features are the same"
            )

    def _check_weights(self, config: TransfinerConfig, check_source: bool) -> None:
        """Refuse a refiner that was saved with other weights of this kind of detector."""
        expected = config.feature_fingerprint
        if not check_source or expected is None or config.feature_source == IMAGE_ENCODER:
            return
        if (found := self.fingerprint) != expected:
            raise InvalidInputError(
                f"expected the weights of {self.source!r} that the refiner was trained with, SHA-256 {expected}, got a "
                f"detector of {found}: load those weights, or pass check_source=False if the features are the same"
            )


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


_HOOKS = Lock()
"""Held while hooks come and go: torch numbers them without one, and of two with the same number one is lost."""


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Let a hook follow each call of a module, for the length of a block; other threads may do the same meanwhile.

    Args:
        module: The module.
        hook: Called with the module, its positional arguments, its keyword arguments and its output. While another
            thread leaves such a block, that thread's hook may be called without the keyword arguments.
    """
    with _HOOKS:
        handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        with _HOOKS:
            handle.remove()


@contextmanager
def recording(**modules: nn.Module) -> Iterator[dict[str, Call]]:
    """Record what modules of a host model are given and return, for the length of a block.

    The hooks are gone after the block, whatever happens in it. Calls from other threads are not recorded, so that a
    model can serve several at once.

    Args:
        **modules: Modules by the name under which their calls are wanted.

    Yields:
        The last call of each module that was called; objects, not copies.
    """
    calls: dict[str, Call] = {}
    thread = get_ident()

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
            if get_ident() == thread:
                kwargs, output = kwargs_and_output
                calls[name] = Call(args, kwargs, output)

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(hooked(module, hook_for(name)))
        yield calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in evaluation mode; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def as_images(images: Any) -> list[Tensor]:
    """Take a list of images in any form that :meth:`Refiner.refine <transfiner_refine.Refiner.refine>` takes.

    Args:
        images: Paths, PIL images, ``(H, W, 3)`` uint8 RGB arrays, or ``(3, H, W)`` tensors, uint8 or float in [0, 1];
            sizes may differ. A batched ``(B, 3, H, W)`` tensor counts as a list.

    Returns:
        ``(3, H, W)`` RGB tensors, uint8 or float32 in [0, 1], on the device on which they came.

    Raises:
        InvalidInputError: If it is no list, or one of them is no image.
    """
    if isinstance(images, Tensor) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise InvalidInputError(
            f"expected a list of images, got {type(images).__name__}: put a single image into a list"
        )
    return [as_image(image) for image in images]


def missing_dependency(framework: str, install: str) -> MissingDependencyError:
    """The error of an adapter's module whose host framework cannot be imported.

    Args:
        framework: Its name, as people call it.
        install: The command that installs it.
    """
    return MissingDependencyError(f"expected {framework} for this adapter, which is not installed: {install}")
