"""TinyViT: equal to an independent implementation at any size, and the image encoder that has it as its backbone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import encoder_config
from torch import Tensor, nn

from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.errors import WeightsError
from transfiner_refine.export import export_onnx
from transfiner_refine.functional.crops import OUTSIDE
from transfiner_refine.modeling.image_encoder import TINY_VIT_DEVIATION, ImageEncoder, TinyViTBackbone
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.tiny_vit import TinyViT, tiny_vit_from_mobile_sam

RENAMED = (
    (r"^patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^patch_embed\.conv2\.", "patch_embed.seq.2."),
    (r"^stages\.", "layers."),
    (r"\.conv\.", ".c."),
)
"""Names of timm's TinyViT to MobileSAM's, where downsampling ends a stage; in timm's it begins the next."""


def mobile_sam_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        name = re.sub(r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found.group(1)) - 1}.downsample", name)
        renamed[f"image_encoder.{name}"] = value
    return renamed


@pytest.fixture
def reference() -> nn.Module:
    """Timm's implementation at MobileSAM's shape: the last stage has the stride of the one before."""
    tiny_vit = pytest.importorskip(
        "timm.models.tiny_vit", reason="needs the reference implementation: pip install timm"
    )
    model = tiny_vit.TinyVit(
        num_classes=0,
        embed_dims=(64, 128, 160, 320),
        depths=(2, 2, 6, 2),
        num_heads=(2, 4, 5, 10),
        window_sizes=(7, 7, 14, 7),
    )
    model.stages[3].downsample.conv2.conv.stride = (1, 1)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bias", "biases", "running_mean")):
            value.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (101, 77), (7, 450)])
@torch.no_grad()
def test_agrees_with_the_reference_implementation(reference: nn.Module, size: tuple[int, int]):
    model = TinyViT()
    model.load_state_dict(tiny_vit_from_mobile_sam(mobile_sam_names(reference.state_dict())))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = reference.patch_embed((images - mean) / deviation)  # pyright: ignore[reportCallIssue]
    found = model(images)
    for index, stage in enumerate(reference.stages):  # pyright: ignore[reportArgumentType]
        expected = stage(expected)
        if index:
            ours = found[index - 1]
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() < 1e-4 * expected.std()


def test_other_weights_are_refused():
    with pytest.raises(WeightsError, match=r"expected the weights of MobileSAM, got none named 'patch_embed"):
        tiny_vit_from_mobile_sam({"image_encoder.conv.weight": torch.zeros(3)})


class Means(TinyViT):
    """Means of the first channel's pixels, in place of what a network makes of them."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [
            F.avg_pool2d(images[:, :1], stride).expand(-1, channels, -1, -1)
            for stride, channels in zip((8, 16, 16), self.channels, strict=True)
        ]


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(8, "tiny_vit").eval()


class TestBackbone:
    @pytest.mark.parametrize("size", [(64, 96), (65, 31), (1, 1)])
    @torch.no_grad()
    def test_maps_are_those_of_the_strides(self, encoder: ImageEncoder, size: tuple[int, int]):
        maps = encoder(torch.rand(2, 3, *size)).maps
        expected = [tuple(-(-side // stride) for side in size) for stride in (2, 4, 8, 16, 32)]
        assert [tuple(x.shape) for x in maps] == [(2, 8, *sides) for sides in expected]
        assert all(x.isfinite().all() for x in maps)

    @pytest.mark.parametrize("width", [256, 192, 184, 240, 100])
    @torch.no_grad()
    def test_maps_lie_where_the_image_does(self, width: int):
        """What TinyViT sees of a ramp comes out as a ramp of cell centres at each stride."""
        backbone = TinyViTBackbone()
        backbone.tiny_vit = Means()
        ramp = torch.arange(width).add(0.5).expand(1, 3, 256, width)
        for number, (found, stride) in enumerate(zip(backbone(ramp)[1:], (4, 8, 16, 32), strict=True)):
            if width % stride:
                continue
            centres = (torch.arange(width // stride) + 0.5) * stride
            deviation = TINY_VIT_DEVIATION[2 if number else 0]
            inner = (centres > 10) & (centres < width - 10)  # what is beyond TinyViT's last centre stays as there
            row = found[0, -1, 128 // stride] * deviation
            assert torch.allclose(row[inner], centres[inner], atol=2)

    @pytest.mark.parametrize(
        ("size", "seen"), [((256, 256), (224, 224)), ((185, 247), (160, 224)), ((5, 40), (16, 32))]
    )
    def test_tiny_vit_sees_whole_cells(self, size: tuple[int, int], seen: tuple[int, int]):
        """Of a part of its coarsest cells, the map would reach beyond the image, and be squeezed into it."""
        backbone = TinyViTBackbone()
        backbone.tiny_vit = Means()
        shapes = []
        backbone.tiny_vit.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[2:]))
        backbone(torch.rand(1, 3, *size))
        assert shapes == [seen]

    @pytest.mark.parametrize(("backbone", "seen"), [("tiny_vit", (128, 256)), ("efficientnet_lite0", (108, 216))])
    def test_a_whole_image_is_padded_to_whole_windows(self, backbone: str, seen: tuple[int, int]):
        model = RefinerModel(encoder_config(backbone=backbone)).eval()
        given = []
        assert model.image_encoder is not None
        model.image_encoder.register_forward_pre_hook(lambda _, images: given.append(images[0]))
        image = np.full((100, 200, 3), 255, np.uint8)
        mask = np.zeros((1, 100, 200), bool)
        mask[:, 20:80, 20:180] = True
        Refiner(model).refine(image, masks=mask, options=RefineOptions(encode="image", passes=1, box_margin=0.125))
        assert [tuple(x.shape[2:]) for x in given] == [seen]
        inside = torch.zeros(seen, dtype=torch.bool)
        inside[:108, :216] = True
        assert given[0][0, 0][inside].numpy() == pytest.approx(1)
        assert given[0][0, 0][~inside].numpy() == pytest.approx(OUTSIDE)

    def test_frozen_it_learns_nothing_and_the_laterals_do(self, encoder: ImageEncoder):
        backbone = encoder.backbone
        for stages in (5, 0):
            backbone.freeze(stages)
            encoder.zero_grad()
            sum(x.square().mean() for x in encoder(torch.rand(1, 3, 64, 64)).maps).backward()  # type: ignore[union-attr]
            assert all((p.grad is None) == (stages == 5) for p in backbone.parameters()), stages
            assert all(p.grad is not None for p in encoder.lateral.parameters())

    def test_it_is_saved_and_loaded(self, tmp_path: Path):
        model = RefinerModel(encoder_config(backbone="tiny_vit"))
        Refiner(model).save_pretrained(tmp_path)
        loaded = Refiner.from_pretrained(tmp_path).model
        assert loaded.config.backbone == "tiny_vit"
        images = torch.rand(1, 3, 64, 64)
        assert model.image_encoder is not None and loaded.image_encoder is not None
        with torch.no_grad():
            for ours, theirs in zip(model.image_encoder(images).maps, loaded.image_encoder(images).maps, strict=True):
                assert torch.allclose(ours, theirs, atol=2e-2 * float(ours.std()) + 1e-3)  # half precision on disk


def test_a_refiner_with_another_backbone_starts_from_what_it_knows(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
):
    """Laterals of fine strides take nothing from TinyViT yet; those of coarse ones are as near to the old as can be."""
    torch.manual_seed(0)
    old = RefinerModel(encoder_config())
    reference = TinyViT().state_dict()
    module = script("change_backbone")
    monkeypatch.setattr(module, "tiny_vit_from_mobile_sam", lambda weights: weights)
    crops = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    new = module.with_tiny_vit(old, reference, crops)
    assert old.image_encoder is not None and new.image_encoder is not None
    images = crops.float() / 255
    with torch.no_grad():
        before, after = old.image_encoder.backbone(images), new.image_encoder.backbone(images)
        for index in range(5):
            wanted, found = old.image_encoder._lateral(before, index), new.image_encoder._lateral(after, index)
            if index < 3:
                assert torch.allclose(wanted, found, atol=1e-5)
            else:
                spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
                assert (wanted - found).square().sum() < 0.9 * spread
    for name, value in old.transfiner.state_dict().items():
        assert torch.equal(new.transfiner.state_dict()[name], value)


@pytest.mark.slow
def test_as_onnx_it_sees_the_same_at_any_size(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    refiner = Refiner(RefinerModel(encoder_config(backbone="tiny_vit")))
    export_onnx(refiner, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "image_encoder.onnx")
    assert refiner.model.image_encoder is not None
    for shape in ((1, 3, 256, 256), (3, 3, 64, 96), (2, 3, 160, 416), (1, 3, 32, 32)):
        pixels = torch.rand(*shape)
        with torch.inference_mode():
            expected = refiner.model.image_encoder(pixels).maps
        for ours, theirs in zip(session.run(None, {"pixels": pixels.numpy()}), expected, strict=True):
            assert torch.allclose(torch.from_numpy(ours), theirs, atol=1e-4 * float(theirs.std()))
