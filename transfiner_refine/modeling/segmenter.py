"""The segmenter: proposes the mask of what is in a box, before the refinement.

Not in the paper. What a detector misses or takes in far from any outline is found neither by the incoherent regions
along it nor by a small network that knows few objects. A promptable segmenter that was taught with a billion masks
finds it: TinyViT as the encoder and the two-way transformer of *Segment Anything* (Kirillov et al., ICCV 2023) as the
decoder, in the form of MobileSAM (Zhang et al., 2023), whose weights :func:`segmenter_from_mobile_sam` takes over. Only
prompts of one box are kept of it.

R boxes, T tokens, P cells of the embedding, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.errors import WeightsError
from transfiner_refine.modeling.tiny_vit import TinyViT, tiny_vit_from_mobile_sam

CHANNELS = 256
"""Width of tokens and of the image embedding."""

HEADS = 8
HIDDEN = 2048
"""Hidden width of the feed-forward networks."""

FRAME = 1024
"""Pixels that positions are relative to: a smaller image lies in the upper left corner of this frame."""

STRIDE = 16
"""Pixels per cell of the embedding."""

MASK_STRIDE = 4
"""Pixels per cell of the masks."""

CANDIDATES = 3
"""Masks proposed for a box: the whole, a part, a part of that."""

MASK_CHANNELS = CHANNELS // 8
"""Width of the map at stride 4 that masks are read from."""


class _MapNorm(nn.Module):
    """Layer norm over the channels of a map ``(B, C, H, W)``."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        cells = F.layer_norm(maps.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return cells.permute(0, 3, 1, 2)


class _Attention(nn.Module):
    """Multi-head attention whose heads share ``width`` channels."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(CHANNELS, width) for _ in range(3))
        self.project = nn.Linear(width, CHANNELS)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``(R, Q, C)``, ``(R, K, C)`` and ``(R, K, C)`` to ``(R, Q, C)``."""
        q, k, v = (
            layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _TwoWayLayer(nn.Module):
    """Tokens look at each other, then at the image; then the image looks at the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.own = _Attention(CHANNELS)
        self.to_image, self.to_tokens = _Attention(CHANNELS // 2), _Attention(CHANNELS // 2)
        self.expand, self.project = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(4))

    def forward(
        self, tokens: Tensor, cells: Tensor, prompt: Tensor, place: Tensor, is_first: bool
    ) -> tuple[Tensor, Tensor]:
        """New tokens ``(R, T, C)`` and cells ``(R, P, C)``.

        Args:
            tokens: ``(R, T, C)``.
            cells: ``(R, P, C)``.
            prompt: ``(R, T, C)``, the tokens as they were before the first layer.
            place: ``(1, P, C)``, the positions of the cells.
            is_first: Whether tokens are still what ``prompt`` is, which is then not added to them.
        """
        own, to_image, feed, to_tokens = self.norms
        if is_first:
            tokens = own(self.own(tokens, tokens, tokens))
        else:
            placed = tokens + prompt
            tokens = own(tokens + self.own(placed, placed, tokens))
        tokens = to_image(tokens + self.to_image(tokens + prompt, cells + place, cells))
        tokens = feed(tokens + self.project(F.relu(self.expand(tokens))))
        return tokens, to_tokens(cells + self.to_tokens(cells + place, tokens + prompt, tokens))


def _perceptron(out: int) -> nn.Sequential:
    """Three linear layers with ReLU between them."""
    return nn.Sequential(
        nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, out)
    )


class Segmenter(nn.Module):
    """Images and a box in each to three masks, and how good each is expected to be; randomly initialised."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny_vit = TinyViT()
        self.neck = nn.Sequential(
            nn.Conv2d(self.tiny_vit.channels[-1], CHANNELS, 1, bias=False),
            _MapNorm(CHANNELS),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            _MapNorm(CHANNELS),
        )
        self.frequencies = nn.Parameter(torch.randn(2, CHANNELS // 2))
        self.corners = nn.Parameter(torch.zeros(2, CHANNELS))
        # The first asks for the masks' quality, the second for a single mask, which is not read; then the candidates.
        self.queries = nn.Parameter(torch.randn(2 + CANDIDATES, CHANNELS))
        self.layers = nn.ModuleList([_TwoWayLayer(), _TwoWayLayer()])
        self.last = _Attention(CHANNELS // 2)
        self.norm = nn.LayerNorm(CHANNELS)
        self.enlarge = nn.Sequential(
            nn.ConvTranspose2d(CHANNELS, CHANNELS // 4, 2, 2),
            _MapNorm(CHANNELS // 4),
            nn.GELU(),
            nn.ConvTranspose2d(CHANNELS // 4, MASK_CHANNELS, 2, 2),
            nn.GELU(),
        )
        self.read = nn.ModuleList(_perceptron(MASK_CHANNELS) for _ in range(CANDIDATES))
        self.quality = _perceptron(1 + CANDIDATES)

    def forward(self, images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Propose masks.

        Args:
            images: ``(R, 3, H, W)`` float, RGB in [0, 1]; sides in multiples of 16, 1024 at most.
            boxes: ``(R, 4)`` float xyxy, pixels of the images.

        Returns:
            Logits ``(R, 3, H / 4, W / 4)`` float32 and expected IoUs ``(R, 3)`` float32.
        """
        return self.decode(self.embed(images), boxes)

    def embed(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, H / 16, W / 16)``."""
        return self.neck(self.tiny_vit(images)[-1])

    def decode(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of boxes ``(R, 4)`` in embeddings ``(R, C, H / 16, W / 16)``, as :meth:`forward` returns them."""
        height, width = embedding.shape[2:]
        rows, columns = (torch.arange(n, device=boxes.device) + 0.5 for n in (height, width))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1) * STRIDE
        place = self._positions(grid.flatten(0, 1))[None].to(embedding.dtype)  # (1, P, C)
        corners = self._positions(boxes.reshape(-1, 2, 2) + 0.5).to(embedding.dtype) + self.corners
        prompt = torch.cat([self.queries.expand(boxes.shape[0], -1, -1), corners], dim=1)
        tokens, cells = prompt, embedding.flatten(2).transpose(1, 2)
        for number, layer in enumerate(self.layers):
            tokens, cells = layer(tokens, cells, prompt, place, number == 0)
        tokens = self.norm(tokens + self.last(tokens + prompt, cells + place, cells))
        maps = self.enlarge(cells.transpose(1, 2).unflatten(2, (height, width)))
        readers = torch.stack([read(tokens[:, 2 + number]) for number, read in enumerate(self.read)], dim=1)
        logits = torch.einsum("rkc,rchw->rkhw", readers, maps)
        return logits.float(), self.quality(tokens[:, 0])[:, 1:].float()

    def _positions(self, points: Tensor) -> Tensor:
        """Embed points ``(..., 2)``, x and y in pixels: ``(..., C)`` float32."""
        phases = 2 * math.pi * ((2 / FRAME * points.float() - 1) @ self.frequencies.float())
        return torch.cat([phases.sin(), phases.cos()], dim=-1)


def segmenter_from_mobile_sam(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`Segmenter` from MobileSAM's, ``mobile_sam.pt``.

    Args:
        weights: MobileSAM's state dict.

    Raises:
        WeightsError: If they are not MobileSAM's.
    """
    made = {f"tiny_vit.{name}": value for name, value in tiny_vit_from_mobile_sam(weights).items()}

    def take(source: str, target: str) -> None:
        for part in ("weight", "bias"):
            made[f"{target}.{part}"] = weights[f"{source}.{part}"]

    def attention(source: str, target: str) -> None:
        for old, new in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "project")):
            take(f"{source}.{old}", f"{target}.{new}")

    def perceptron(source: str, target: str) -> None:
        for number in range(3):
            take(f"{source}.layers.{number}", f"{target}.{2 * number}")

    decoder, transformer = "mask_decoder", "mask_decoder.transformer"
    try:
        for number in (0, 2):
            made[f"neck.{number}.weight"] = weights[f"image_encoder.neck.{number}.weight"]
            take(f"image_encoder.neck.{number + 1}", f"neck.{number + 1}")
        # What it adds to every cell where it is given no mask.
        made["neck.3.bias"] = made["neck.3.bias"] + weights["prompt_encoder.no_mask_embed.weight"][0]
        made["frequencies"] = weights["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
        corners = [weights[f"prompt_encoder.point_embeddings.{number}.weight"] for number in (2, 3)]
        made["corners"] = torch.cat(corners)
        made["queries"] = torch.cat([weights[f"{decoder}.{name}.weight"] for name in ("iou_token", "mask_tokens")])
        for number in range(2):
            source, target = f"{transformer}.layers.{number}", f"layers.{number}"
            attention(f"{source}.self_attn", f"{target}.own")
            attention(f"{source}.cross_attn_token_to_image", f"{target}.to_image")
            attention(f"{source}.cross_attn_image_to_token", f"{target}.to_tokens")
            take(f"{source}.mlp.lin1", f"{target}.expand")
            take(f"{source}.mlp.lin2", f"{target}.project")
            for index in range(4):
                take(f"{source}.norm{index + 1}", f"{target}.norms.{index}")
        attention(f"{transformer}.final_attn_token_to_image", "last")
        take(f"{transformer}.norm_final_attn", "norm")
        for number in (0, 1, 3):
            take(f"{decoder}.output_upscaling.{number}", f"enlarge.{number}")
        for number in range(CANDIDATES):
            perceptron(f"{decoder}.output_hypernetworks_mlps.{number + 1}", f"read.{number}")
        perceptron(f"{decoder}.iou_prediction_head", "quality")
    except KeyError as error:
        raise WeightsError(f"expected the weights of MobileSAM, got none named {error}: name mobile_sam.pt") from None
    return made
