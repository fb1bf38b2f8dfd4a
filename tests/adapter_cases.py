"""What every host's adapter has to do, checked on the real framework with small random weights.

A host's tests describe it by a :class:`Host`, and call the checks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import discs, encoder_config
from torch import Tensor, nn

from transfiner_refine import FeaturePyramid, InvalidInputError, RefineOptions, Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.adapters.joint import RefinedDetector
from transfiner_refine.adapters.protocol import Adapter, Prediction
from transfiner_refine.functional.incoherence import dilate
from transfiner_refine.functional.sampling import FeatureTable
from transfiner_refine.modeling.model import RefinerModel

SIZES = ((97, 131), (120, 101), (64, 151))
"""``(H, W)`` of a batch of odd sizes."""

LEFT_ALONE = RefineOptions(keep_if_iou_below=0.0)
"""Accepts whatever a refiner with random weights makes of a mask."""

FEW_ROIS = 6
"""RoIs of each image in training."""


@dataclass(frozen=True)
class Host:
    """A host framework's detector, as its user calls it.

    Attributes:
        make: Makes the detector in evaluation mode, with the weights of a seed; it finds something in every image.
        call: The host's call on ``(3, H, W)`` float images in [0, 1], by the detector or by the module that wraps it.
        results: The call's output as one dict of tensors for each image: ``masks`` ``(N, H, W)``, bool or float, and
            all else that there is.
        losses: The host's training call on one fixed batch that has instances.
        sizes: ``(H, W)`` of the images that are used.
        tolerance: Largest difference of float results between a batch and one by one.
    """

    make: Callable[[int], nn.Module]
    call: Callable[[nn.Module, Sequence[Tensor]], Any]
    results: Callable[[Any], list[dict[str, Tensor]]]
    losses: Callable[[nn.Module], dict[str, Tensor]]
    sizes: tuple[tuple[int, int], ...] = SIZES
    tolerance: float = 1e-4

    def images(self) -> list[Tensor]:
        """One image of random discs for each size."""
        return [random_scene(height, width, seed) for seed, (height, width) in enumerate(self.sizes)]

    def run(self, model: nn.Module, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Results of a call without gradients."""
        with torch.no_grad():
            return self.results(self.call(model, images))


def random_scene(height: int, width: int, seed: int = 0) -> Tensor:
    """``(3, H, W)`` float32 image of bright discs on noise."""
    rng = np.random.default_rng(seed)
    circles = [(rng.uniform(0, width), rng.uniform(0, height), rng.uniform(8, height / 3)) for _ in range(3)]
    noise = torch.from_numpy(rng.uniform(0, 0.3, (3, height, width)).astype(np.float32))
    return noise + 0.6 * discs(height, width, circles).any(dim=0)


def refiner_for(adapter: Adapter, **changes: Any) -> Refiner:
    """An untrained refiner on the adapter's features; with its residual decoder it changes nothing."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"depth": 1, "channels": 16, "layers": 1, "heads": 2, "ffn_channels": 16}
    return Refiner(RefinerModel(adapter.config(**({"decoder": "residual"} | small | changes))))


def find_everywhere(refiner: Refiner) -> Refiner:
    """Make every cell a node, in place."""
    detector = refiner.model.transfiner.incoherence_detector
    with torch.no_grad():
        for classifier in (detector.classifier, *detector.finer_classifier):
            classifier.weight.zero_()  # type: ignore[union-attr, operator]
            classifier.bias.fill_(50.0)  # type: ignore[union-attr, operator]
    return refiner


def eventful_refiner(adapter: Adapter, **changes: Any) -> Refiner:
    """A refiner with random weights that makes every cell a node and changes labels everywhere."""
    refiner = find_everywhere(refiner_for(adapter, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        last = refiner.model.transfiner.pixel_decoder.layers[2]
        last.weight.copy_(8 * torch.randn(last.weight.shape, generator=generator))  # type: ignore[union-attr, operator, arg-type]
    return refiner


def wrapped(adapter: Adapter, refiner: Refiner | Path, **options: Any) -> RefinedDetector:
    """The adapter's detector with a refiner whose every change is accepted."""
    arguments: dict[str, Any] = {"options": LEFT_ALONE, "max_rois": FEW_ROIS} | options
    return adapter.with_refiner(refiner, **arguments)


def check_identity(host: Host) -> None:
    """A refiner that changes nothing: first one that finds no node at all, then one that refines every cell."""
    detector, images = host.make(0), host.images()
    plain = host.run(detector, images)
    adapter = adapt(detector)
    untouched = host.run(wrapped(adapter, refiner_for(adapter)), images)
    same_labels = host.run(wrapped(adapter, find_everywhere(refiner_for(adapter))), images)
    assert sum(len(result["masks"]) for result in plain) > 0
    for before, first, second in zip(plain, untouched, same_labels, strict=True):
        assert before.keys() == first.keys() == second.keys()
        for name, value in before.items():
            assert value.dtype == first[name].dtype == second[name].dtype
            torch.testing.assert_close(first[name], value, rtol=0, atol=0)
            if name != "masks":
                torch.testing.assert_close(second[name], value, rtol=0, atol=0)
        was, now = before["masks"] >= 0.5, second["masks"] >= 0.5
        outline = dilate(was) & dilate(~was)
        assert not ((was ^ now) & ~outline).any(), "a label changed more than a pixel from the outline"


def check_every_instance_is_refined(host: Host) -> None:
    """Of every image of a batch of mixed sizes, in the order of the host, and nothing but the masks is changed."""
    detector, images = host.make(0), host.images()
    plain = host.run(detector, images)
    adapter = adapt(detector)
    refined = host.run(wrapped(adapter, eventful_refiner(adapter)), images)
    assert min(len(result["masks"]) for result in plain) > 0
    for before, after in zip(plain, refined, strict=True):
        changed = ((before["masks"] >= 0.5) != (after["masks"] >= 0.5)).flatten(1).any(dim=1)
        assert changed.all(), changed.tolist()
        for name in before.keys() - {"masks"}:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def check_batch_equals_loop(host: Host, alike: Sequence[tuple[int, int]] = ()) -> None:
    """What was found in a batch is refined as it is alone.

    Args:
        host: The host.
        alike: Sizes that the host pads to one and the same, so that its own features do not depend on the batch: there
            the whole call has to give the same too.
    """
    adapter = adapt(host.make(0))
    model = wrapped(adapter, eventful_refiner(adapter)).eval()
    predictions = adapter.detect(host.images())
    for together, prediction in zip(model.refine(predictions), predictions, strict=True):
        (alone,) = model.refine([prediction])
        torch.testing.assert_close(together.probs, alone.probs, rtol=0, atol=host.tolerance)
        assert share_different(together.masks, alone.masks) < 1e-3
    images = [random_scene(height, width, seed) for seed, (height, width) in enumerate(alike)]
    for together, image in zip(host.run(model, images) if images else [], images, strict=True):
        (alone,) = host.run(model, [image])
        for name in together.keys() - {"masks"}:
            torch.testing.assert_close(together[name], alone[name], rtol=0, atol=host.tolerance)
        assert len(alone["masks"]) > 0 and share_different(together["masks"], alone["masks"]) < 1e-3


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Let threads take turns as often as they can, for the length of a block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def check_threads(host: Host, calls: int = 12) -> None:
    """Threads that share a model get what each gets alone, and leave the detector as it was."""
    detector, images = host.make(0).eval(), host.images()
    host.run(detector, images)  # some hosts keep things from their first call
    marks = state_of(detector)[1]
    adapter = adapt(detector)
    model = wrapped(adapter, eventful_refiner(adapter, depth=1))
    expected = [host.run(model, [image])[0] for image in images]

    def same(number: int) -> bool:
        index = number % len(images)
        (found,) = host.run(model, [images[index]])
        return all(torch.equal(found[name], value) for name, value in expected[index].items())

    with frequent_switches(), ThreadPoolExecutor(3) as pool:
        assert all(pool.map(same, range(calls)))
    assert state_of(detector)[1] == marks


def check_training_on_the_image_is_refused(host: Host) -> None:
    """A refiner with an image encoder is refused before the detector does its work."""
    adapter = adapt(host.make(0))
    model = wrapped(adapter, Refiner(RefinerModel(encoder_config(depth=1)))).train()
    called: list[Any] = []
    adapter.backbone.register_forward_hook(lambda *call: called.append(call))
    with pytest.raises(InvalidInputError, match="a refiner on the detector's features for joint training"):
        host.losses(model)
    assert not called


def share_different(a: Tensor, b: Tensor) -> float:
    """Share of the pixels whose labels differ."""
    assert a.shape == b.shape
    return float(((a >= 0.5) != (b >= 0.5)).float().mean()) if a.numel() else 0.0


def position_image(height: int, width: int) -> Tensor:
    """``(3, H, W)`` float32 image whose pixels say where they are: x / W, y / H, and one half."""
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.full((height, width), 0.5)])


def pooled(pixels: Tensor, strides: Sequence[int], channels: int) -> list[Tensor]:
    """What a backbone would give that does nothing but average: maps ``(B, C, H / s, W / s)`` of ``(B, 3, H, W)``."""
    maps = [torch.nn.functional.avg_pool2d(pixels, stride) for stride in strides]
    return [nn.functional.pad(level, (0, 0, 0, 0, 0, channels - 3)) for level in maps]


def check_pattern(predictions: Sequence[Prediction], tolerance: float = 0.05) -> None:
    """Every map has what was painted where it was painted.

    Args:
        predictions: What ``detect`` gave for :func:`position_image`, by a detector whose backbone is replaced by
            :func:`pooled` of the network's input, with the host's normalisation undone.
        tolerance: Largest error in image pixels; images that become uint8 on the way need about 0.5.
    """
    for prediction in predictions:
        pyramid = prediction.features
        assert isinstance(pyramid, FeaturePyramid) and pyramid.batch_size == 1
        height, width = prediction.instances.image_size
        table = FeatureTable.of(pyramid)
        rows, columns = torch.meshgrid(torch.linspace(0, height, 40), torch.linspace(0, width, 50), indexing="ij")
        points = torch.stack([columns, rows], dim=2).reshape(-1, 2)  # (x, y), image pixels
        image = torch.zeros(len(points), dtype=torch.long)
        network = pyramid.to_network(points.repeat(1, 2), image)[:, :2]
        size = pyramid.to_network(torch.tensor([[0.0, 0.0, width, height]]), image[:1])[0, 2:]
        for index, stride in enumerate(pyramid.strides):
            # Beyond the centres of the outermost cells that are wholly of the image, padding has its part.
            inner = ((network >= stride) & (network <= size.floor() - 1.5 * stride)).all(dim=1)
            assert inner.any() or stride > 8, f"the images are too small for stride {stride}"
            found = table.sample(network, image, torch.full_like(image, index))[:, :2] * torch.tensor([width, height])
            error = (found - points)[inner].abs()
            assert not inner.any() or float(error.max()) < tolerance, (stride, float(error.max()))


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[Any]]:
    """Weights of a module, and what else of it an adapter could leave behind."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    marks: list[Any] = [(name, p.requires_grad) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        marks.append((name, type(module), module.training, [len(h) for h in hooks], sorted(vars(module))))
    return weights, marks


def check_detach(host: Host) -> None:
    """After refinement, and after training of the refiner alone, the detector is as it was."""
    detector, images = host.make(0), host.images()
    next(detector.parameters()).requires_grad_(False)
    host.run(detector, images)  # some hosts keep things from their first call
    weights, marks = state_of(detector)
    adapter = adapt(detector)
    refiner = refiner_for(adapter)
    model = wrapped(adapter, refiner, train="refiner")
    host.run(model, images)
    adapter.detect(images)
    model.train()
    total(host.losses(model)).backward()
    adapter.detach()
    found, found_marks = state_of(detector)
    assert found_marks == marks
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert any(parameter.grad is not None for parameter in refiner.model.parameters())


def total(losses: dict[str, Tensor]) -> Tensor:
    """Sum of a dict of losses."""
    return sum((value.sum() for value in losses.values()), start=torch.zeros(()))


def check_joint_training(host: Host, steps: int = 8, learning_rate: float = 1e-3) -> None:
    """The host's losses and the refiner's: finite, felt by the backbone, and lower after a few steps."""
    detector = host.make(0)
    adapter = adapt(detector)
    torch.manual_seed(0)
    plain = set(host.losses(detector.train()))
    model = wrapped(adapter, refiner_for(adapter, depth=2)).train()
    losses = host.losses(model)
    assert set(losses) == plain | {"loss_refine", "loss_incoherence"}
    assert all(bool(torch.isfinite(value).all()) for value in losses.values()), losses
    model.zero_grad()
    (losses["loss_refine"] + losses["loss_incoherence"]).backward()
    for part in (adapter.backbone, *([] if model.laterals is None else [model.laterals])):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert gradients and sum(float(gradient.abs().sum()) for gradient in gradients) > 0

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    history = []
    for _ in range(steps):
        loss = total(host.losses(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert np.mean(history[-2:]) < np.mean(history[:2]), history


def check_scopes(host: Host) -> None:
    """What is not to be trained gets no gradient, and keeps its running statistics."""
    for scope in ("refiner", "heads"):
        detector = host.make(0)
        adapter = adapt(detector)
        model = wrapped(adapter, refiner_for(adapter), train=scope).train()
        frozen = detector if scope == "refiner" else adapter.backbone
        before = {name: value.clone() for name, value in frozen.state_dict().items()}
        total(host.losses(model)).backward()
        assert all(parameter.grad is None for parameter in frozen.parameters())
        after = frozen.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        trained = {id(p) for p in detector.parameters() if p.grad is not None}
        assert bool(trained) == (scope == "heads")
        assert any(p.grad is not None for p in model.refiner_model.parameters())


def check_saved_model(host: Host, directory: Path) -> None:
    """A jointly trained model comes back from its directory on a new detector, and not on another one."""
    adapter = adapt(host.make(0))
    model = wrapped(adapter, eventful_refiner(adapter)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    total(host.losses(model)).backward()
    optimizer.step()
    model.eval()
    expected = host.run(model, host.images())
    assert model.save_pretrained(directory) == directory
    names = {"config.json", "model.safetensors", "adapter.json", "detector.safetensors", "README.md"}
    if model.laterals is not None:
        names.add("laterals.safetensors")
    assert {path.name for path in directory.iterdir()} == names

    again = host.run(wrapped(adapt(host.make(1)), directory), host.images())
    for before, after in zip(expected, again, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0)

    other = adapt(host.make(1))
    with pytest.raises(InvalidInputError, match=r"SHA-256 [0-9a-f]{64}, got a detector of [0-9a-f]{64}"):
        other.with_refiner(Refiner.from_pretrained(directory))
    other.with_refiner(Refiner.from_pretrained(directory), check_source=False)
