"""Tiny models of Hugging Face transformers with random weights, and how their user calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import adapter_cases as cases
import pytest
import torch
import torch.nn.functional as F
from small_models import discs
from torch import Tensor, nn

from transfiner_refine.adapters import adapt
from transfiner_refine.adapters.protocol import recording
from transfiner_refine.adapters.transformers_hosts import host_of
from transfiner_refine.inputs import boxes_from_masks

pytest.importorskip("scipy", reason="scipy, with which transformers matches queries, is not installed")
transformers: Any = pytest.importorskip("transformers", minversion="5.4", reason="transformers is not installed")
Adapter: Any = pytest.importorskip("transfiner_refine.adapters.transformers").TransformersAdapter

NAMES = {
    "detr": "Detr",
    "conditional": "ConditionalDetr",
    "mask2former": "Mask2Former",
    "maskformer": "MaskFormer",
    "deformable": "DeformableDetr",
    "rt_detr": "RTDetr",
    "d_fine": "RTDetr",
}
"""Kind of model: what the name of its image processor begins with."""

BACKBONES = {
    "detr": "detr.model.backbone",
    "conditional": "conditional_detr.model.backbone",
    "mask2former": "model.pixel_level_module.encoder",
    "maskformer": "model.pixel_level_module.encoder",
}
MASK_KINDS = ("detr", "conditional", "mask2former", "maskformer")
DETRS = ("detr", "conditional")
BOX_KINDS = ("deformable", "rt_detr", "d_fine")
QUERIES, CLASSES = 3, 3
SIZES = ((67, 91), (81, 70))


def discs_of_queries(logits: Tensor) -> Tensor:
    """Mask logits ``(B, Q, h, w)`` with a disc for each query: without training there is no outline to look at."""
    height, width = logits.shape[2:]
    circles = [((2 + q) * width / 6, height / 2, height / (3 + 0.5 * q)) for q in range(QUERIES)]
    return 0.2 * logits.clamp(-5, 5) + 8.0 * discs(height, width, circles).to(logits) - 4


class DiscHead(nn.Module):
    """Last layer of DETR's mask head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x)  # (B · Q, 1, h, w)
        return discs_of_queries(logits.unflatten(0, (-1, QUERIES))[:, :, 0]).flatten(0, 1)[:, None]


class DiscPredictor(nn.Module):
    """Mask predictor of Mask2Former."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logits, attention = self.predictor(*args, **kwargs)
        return discs_of_queries(logits), attention


class DiscMaskFormer(transformers.MaskFormerForInstanceSegmentation):
    def get_logits(self, outputs: Any) -> tuple[Tensor, Tensor, Any]:
        classes, logits, auxiliary = super().get_logits(outputs)
        return classes, discs_of_queries(logits), auxiliary


def resnet(*stages: int) -> Any:
    names = [f"stage{stage}" for stage in stages]
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=names
    )


def detr_options(width: int, *stages: int) -> dict[str, Any]:
    sizes = {"d_model": width, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": width // 4, "decoder_attention_heads": width // 4, "num_queries": QUERIES}
    backbone = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    backbone |= {"backbone_config": resnet(*stages)}
    return sizes | backbone | {"num_labels": CLASSES, "dropout": 0.0}


def mask_queries_options() -> dict[str, Any]:
    backbone = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        drop_path_rate=0.0,
    )
    return {"backbone_config": backbone, "mask_feature_size": 32, "num_labels": CLASSES}


def hybrid_options() -> dict[str, Any]:
    sizes = {"encoder_hidden_dim": 16, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
    sizes |= {"decoder_layers": 2, "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "num_queries": QUERIES}
    return sizes | {"d_model": 16, "decoder_in_channels": [16, 16, 16], "num_labels": CLASSES}


def build(kind: str) -> nn.Module:
    if kind == "detr":
        return transformers.DetrForSegmentation(transformers.DetrConfig(**detr_options(32, 1, 2, 3, 4)))
    if kind == "conditional":
        config = transformers.ConditionalDetrConfig(**detr_options(32, 1, 2, 3, 4))
        return transformers.ConditionalDetrForSegmentation(config)
    if kind == "mask2former":
        sizes = {"feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
        sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": QUERIES}
        config = transformers.Mask2FormerConfig(**mask_queries_options(), **sizes, dropout=0.0, train_num_points=256)
        return transformers.Mask2FormerForUniversalSegmentation(config)
    if kind == "maskformer":
        decoder = transformers.DetrConfig(**detr_options(16, 1, 2, 3, 4))
        config = transformers.MaskFormerConfig(**mask_queries_options(), decoder_config=decoder, fpn_feature_size=32)
        return DiscMaskFormer(config)
    if kind == "deformable":
        config = transformers.DeformableDetrConfig(**detr_options(32, 2, 3, 4))
        return transformers.DeformableDetrForObjectDetection(config)
    if kind == "rt_detr":
        widths = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
        backbone = transformers.RTDetrResNetConfig(
            **widths, layer_type="bottleneck", out_features=["stage2", "stage3", "stage4"]
        )
        config = transformers.RTDetrConfig(
            backbone_config=backbone, encoder_in_channels=[16, 24, 32], **hybrid_options()
        )
        return transformers.RTDetrForObjectDetection(config)
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 16, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(backbone_config=backbone, encoder_in_channels=[16, 16, 32], **hybrid_options())
    return transformers.DFineForObjectDetection(config)


def make(kind: str, seed: int = 0) -> nn.Module:
    """A model whose queries differ, in evaluation mode."""
    torch.manual_seed(seed)
    model = build(kind)
    gain = {"detr": 10.0, "conditional": 10.0, "mask2former": 4.0, "maskformer": 3.0}.get(kind, 1.0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "encoder.embeddings" not in name:
                module.weight.mul_(gain)  # transformers begins with small weights, so that all queries are alike
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
    if kind in DETRS:
        for parameter in model.get_submodule(BACKBONES[kind]).parameters():
            parameter.requires_grad_(True)  # DETR freezes the whole of a backbone that is not of timm
        heads: Any = model.get_submodule(BACKBONES[kind].split(".")[0])
        with torch.no_grad():
            heads.class_labels_classifier.bias[0] += 1.0  # Conditional DETR's processor drops the last class
            heads.bbox_predictor.layers[-1].weight.mul_(0.1)
            heads.bbox_predictor.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, 1.5, 1.5]))  # large, in the middle
        head: Any = model.mask_head
        head.output_conv = DiscHead(head.output_conv)
    if kind == "mask2former":
        decoder: Any = model.get_submodule("model.transformer_module.decoder")
        decoder.mask_predictor = DiscPredictor(decoder.mask_predictor)
    return model.eval()


def processor(kind: str, **changes: Any) -> Any:
    """An image processor that changes the sides of the tests' images by different factors."""
    return processor_named(f"{NAMES[kind]}ImageProcessor", **changes)


def processor_named(name: str, **changes: Any) -> Any:
    boxes_alone = name in ("DeformableDetrImageProcessor", "RTDetrImageProcessor")
    size = {"height": 96, "width": 128} if boxes_alone else {"shortest_edge": 76, "longest_edge": 120}
    return getattr(transformers, name)(**({"size": size} | changes))


def small_adapter(model: nn.Module) -> Any:
    """What the tests let `adapt` make: with the processor above, and laterals of 16 channels rather than 256."""
    return Adapter(model, processor_named(host_of(model).processor), channels=16)


def identity(kind: str) -> tuple[Any, Any]:
    """A model, and the same with a refiner that finds no node."""
    model = make(kind)
    adapter = adapt(model)
    return model, cases.wrapped(adapter, cases.refiner_for(adapter))


def call(kind: str, model: nn.Module, images: Sequence[Tensor]) -> tuple[Any, Tensor]:
    """The host's call on a padded batch: its output, and the padding mask."""
    inputs = processor(kind)(list(images), return_tensors="pt", do_rescale=False)
    weight = next(model.parameters())
    return model(inputs["pixel_values"].to(weight.dtype), pixel_mask=inputs["pixel_mask"]), inputs["pixel_mask"]


def mask_field(kind: str) -> str:
    return "pred_masks" if kind in DETRS else "masks_queries_logits"


def class_field(kind: str) -> str:
    return "logits" if kind in DETRS else "class_queries_logits"


def results(kind: str, called: tuple[Any, Tensor]) -> list[dict[str, Tensor]]:
    """All queries of each image; masks without padding in the size of the input, by the host's rule for resizing."""
    output, pixel_mask = called
    logits = output[mask_field(kind)]
    if logits.shape[2:] == pixel_mask.shape[1:]:
        masks = logits >= 0
    elif kind in DETRS:
        masks = F.interpolate(logits.sigmoid(), pixel_mask.shape[1:], mode="bilinear") >= 0.5
    else:
        masks = F.interpolate(logits, pixel_mask.shape[1:], mode="bilinear") >= 0
    found = []
    for index, inside in enumerate(pixel_mask.bool()):
        result = {"classes": output[class_field(kind)][index]}
        if kind in DETRS:
            result["boxes"] = output.pred_boxes[index]
        cropped = masks[index][:, inside.any(dim=1)][:, :, inside.any(dim=0)]
        found.append(result | {"masks": cropped})
    return found


def training_input(kind: str, *circles: list[tuple[float, float, float]]) -> dict[str, Any]:
    """The host's training input: a batch of 96 × 128 pixels, of which the last image fills 80 × 100."""
    batch = len(circles)
    pixel_mask = torch.ones((batch, 96, 128), dtype=torch.int64)
    pixel_mask[-1, 80:] = 0
    pixel_mask[-1, :, 100:] = 0
    # One disc too many, of nothing, because there may be none.
    masks = [
        (discs(96, 128, [*of_image, (0.0, 0.0, -1.0)])[:-1]) & (inside > 0)
        for of_image, inside in zip(circles, pixel_mask, strict=True)
    ]
    pixels = torch.stack([of_image.any(dim=0).expand(3, -1, -1) for of_image in masks])
    classes = [torch.arange(len(m)) % CLASSES for m in masks]
    inputs = {"pixel_values": 2 * pixels - 1.0, "pixel_mask": pixel_mask}
    if kind not in DETRS:
        return inputs | {"mask_labels": [m.float() for m in masks], "class_labels": classes}
    labels = []
    for of_image, label in zip(masks, classes, strict=True):
        boxes = boxes_from_masks(of_image) / torch.tensor([128.0, 96.0, 128.0, 96.0])
        centred = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
        labels.append({"class_labels": label, "boxes": centred, "masks": of_image})
    return inputs | {"labels": labels}


TWO_AND_ONE = ([(42.0, 47.0, 31.0), (86.0, 49.0, 23.0)], [(62.0, 44.0, 27.0)])


def train_call(
    kind: str, model: nn.Module, *circles: list[tuple[float, float, float]]
) -> tuple[Any, dict[str, Tensor]]:
    """The output of a training call, and the losses that it is made of."""
    torch.manual_seed(0)  # Mask2Former draws points, and the refinement losses draw nodes
    inner: Any = getattr(model, "detector", model)
    with recording(**({} if kind in DETRS else {"criterion": inner.criterion})) as calls:
        output = model(**training_input(kind, *circles))
    losses = getattr(output, "loss_dict", None) or calls["criterion"].output
    return output, {name: value for name, value in losses.items() if name.startswith("loss")}
