"""The image encoder: maps of the right place and size, alike from a whole image and from crops of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import random_image
from torch import Tensor

from transfiner_refine.config import TransfinerConfig
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.boxes import crop_windows
from transfiner_refine.functional.crops import crop_image
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.image_encoder import ImageEncoder
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.types import FeaturePyramid

CHANNELS = 6
STRIDES = (2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(CHANNELS).eval()


def photo(height: int, width: int) -> Tensor:
    """``(3, H, W)`` float: smooth blotches, so that resampling changes little."""
    noise = torch.from_numpy(random_image(height // 8, width // 8)).permute(2, 0, 1)[None] / 255
    return F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)[0]


def encode(encoder: ImageEncoder, images: Tensor) -> FeaturePyramid:
    with torch.no_grad():
        return encoder(images)


def test_a_model_with_other_strides_is_refused():
    with pytest.raises(InvalidInputError, match=r"expected strides \(2, 4, 8, 16, 32\).*got \(4, 8, 16, 32\)"):
        RefinerModel(TransfinerConfig(feature_source="image_encoder", strides=(4, 8, 16, 32)))


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 1), (1, 1), (50, 127)])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_map_per_stride_of_any_image(encoder: ImageEncoder, size: tuple[int, int], batch: int):
    pyramid = encode(encoder, torch.rand(batch, 3, *size))
    assert pyramid.strides == STRIDES and pyramid.source == "image_encoder"
    assert pyramid.scale is None and pyramid.origin is None
    for stride, level in zip(STRIDES, pyramid.maps, strict=True):
        assert level.shape == (batch, CHANNELS, *(-(-side // stride) for side in size))
        assert level.isfinite().all()


def test_images_of_a_batch_do_not_mix(encoder: ImageEncoder):
    images = torch.rand(2, 3, 64, 80)
    both = encode(encoder, images)
    for index in (0, 1):
        for level, alone in zip(both.maps, encode(encoder, images[index : index + 1]).maps, strict=True):
            torch.testing.assert_close(level[index], alone[0], rtol=1e-3, atol=1e-4)


def test_every_map_sees_all_the_coarser_ones(encoder: ImageEncoder):
    """A feature pyramid hands context down: a change of the coarsest lateral shows at every stride."""
    images = torch.rand(1, 3, 64, 64)
    before = encode(encoder, images)
    lateral = encoder.lateral[-1]
    assert isinstance(lateral.bias, Tensor)
    with torch.no_grad():
        lateral.bias.add_(5.0)
        after = encode(encoder, images)
        lateral.bias.sub_(5.0)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before.maps, after.maps, strict=True))


def test_a_coarse_cell_is_handed_to_the_cells_that_it_covers(encoder: ImageEncoder):
    """An odd size must not stretch the coarser map over the finer one: cell i covers 2i and 2i + 1."""
    images = torch.zeros(1, 3, 75, 75)  # stride 4: 19 cells, stride 8: 10 cells
    changed: list[Tensor] = []

    def mark(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, :, 7, 8] += 100.0
        return output

    smooth, finer = encoder.smooth[1], encoder.smooth[0]  # the maps of strides 8 and 4
    handle = finer.register_forward_pre_hook(lambda module, args: changed.append(args[0]))
    encode(encoder, images)
    marker = smooth.register_forward_hook(mark)
    encode(encoder, images)
    handle.remove()
    marker.remove()
    rows, cols = (changed[1] - changed[0]).abs().amax(dim=(0, 1)).gt(1.0).nonzero().unbind(1)
    assert set(zip(rows.tolist(), cols.tolist(), strict=True)) == {(14, 16), (14, 17), (15, 16), (15, 17)}


@pytest.mark.parametrize("scale", [1, 2])
def test_whole_image_and_crop_agree_on_what_lies_where(scale: int):
    """At the same point of the image both give nearly the same feature; a cell beside it, they do not.

    The crop begins where the cells of the whole image begin, and only the two finest maps are let through: what random
    weights make of a cell's wider surroundings says nothing.
    """
    torch.manual_seed(0)
    encoder = ImageEncoder(CHANNELS).eval()
    for lateral in encoder.lateral[2:]:
        lateral.requires_grad_(False).weight.zero_()  # type: ignore[operator, union-attr]
    image = photo(448 // scale, 512 // scale)
    boxes = torch.tensor([[180.0, 148.0, 396.0, 364.0]]) / scale  # 216 pixels once encoded
    window = crop_windows(boxes, 216, 256)
    assert window.mul(scale).remainder(32).eq(0).all()
    network_scale = torch.full((1, 2), float(scale))
    of_crop = encode(encoder, crop_image(image, window, 256))
    of_crop = replace(of_crop, scale=network_scale, origin=window[:, :2])
    of_image = encode(encoder, F.interpolate(image[None], scale_factor=float(scale), mode="bilinear"))
    of_image = replace(of_image, scale=network_scale)

    first, grid = torch.zeros(1, dtype=torch.long), torch.linspace(0, 1, 12)
    points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).flatten(0, 1)  # (144, 2)

    def features(pyramid: FeaturePyramid, level: int, shift: float = 0.0) -> Tensor:
        inner = torch.tensor([[240.0, 208.0, 336.0, 304.0]]) / scale + shift  # far from the border of the crop
        roi_pyramid = RoIPyramid.of(pyramid, pyramid.to_network(inner, first), first)
        return roi_pyramid.sample(torch.zeros(144, dtype=torch.long), points, level)

    for level, stride in ((0, 4), (1, 2)):
        here = features(of_crop, level)
        apart = (here - features(of_image, level)).abs().mean() / here.std()
        shifted = (here - features(of_image, level, stride / scale)).abs().mean() / here.std()
        assert apart < 0.1 and apart < 0.3 * shifted, (level, float(apart), float(shifted))


def test_frozen_stages_get_no_gradient_and_the_pyramid_does():
    torch.manual_seed(0)
    encoder = ImageEncoder(CHANNELS).train()
    encoder.backbone.freeze(3)
    sum(level.square().mean() for level in encoder(torch.rand(1, 3, 64, 64)).maps).backward()  # type: ignore
    for name, parameter in encoder.named_parameters():
        frozen = any(f"backbone.stages.{stage}." in name for stage in (0, 1, 2))
        assert (parameter.grad is None) == frozen, name
        if not frozen:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_bfloat16_is_close():
    torch.manual_seed(0)
    image = photo(64, 96)[None]
    expected = encode(ImageEncoder(CHANNELS), image)
    torch.manual_seed(0)
    half = encode(ImageEncoder(CHANNELS).to(torch.bfloat16), image)
    for level, reference in zip(half.maps, expected.maps, strict=True):
        assert level.dtype == torch.bfloat16
        assert (level.float() - reference).abs().mean() < 0.05 * reference.abs().mean()
