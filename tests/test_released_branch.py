"""The released mask branch: against the recorded outputs of the released code, and against a loop over instances."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from released_cases import RecordedCase, original_shapes, random_branch, recorded_case, scene
from torch import Tensor, nn
from torchvision.ops import roi_align

from transfiner_refine.errors import InvalidInputError, WeightsError
from transfiner_refine.functional.sampling import FeatureTable
from transfiner_refine.modeling.released import ReleasedMaskBranch, ReleasedMasks
from transfiner_refine.modeling.released_branch import Sequences
from transfiner_refine.modeling.released_layout import ReleasedConfig
from transfiner_refine.modeling.released_pooling import CellPooler, pyramid_level
from transfiner_refine.types import FeaturePyramid

STRIDES = (4, 8, 16, 32)


def branch_weights() -> dict[str, Tensor]:
    """A mask branch's tensors with their original names, each a view of one number."""
    shapes = original_shapes(ReleasedConfig())
    return {key: torch.full((1,), 0.01).expand(shape) for key, shape in shapes.items() if ".mask_" in key}


def assert_same(a: ReleasedMasks, b: ReleasedMasks, tolerance: float = 1e-5) -> None:
    assert torch.equal(a.tokens, b.tokens)
    torch.testing.assert_close(a.coarse_logits, b.coarse_logits, atol=tolerance, rtol=0)
    torch.testing.assert_close(a.incoherence, b.incoherence, atol=tolerance, rtol=0)
    torch.testing.assert_close(a.probs, b.probs, atol=tolerance, rtol=0)


class TestRecorded:
    """``case_a`` is one image, ``case_b`` two images with 13 instances, of which the released code refined ten."""

    @staticmethod
    def run(case: RecordedCase, max_instances: int) -> ReleasedMasks:
        branch = ReleasedMaskBranch.from_original(case.weights("keys_mask_branch.json"))
        (height, width), seed = case.settings["image_size"], 100 * case.settings["seed"]
        counts = case.settings["instances_per_image"]
        maps = [case.recipe.features(height, width, seed=seed + i) for i in range(len(counts))]
        found = [case.recipe.boxes(count, height, width, seed=seed + i) for i, count in enumerate(counts)]
        return branch(
            [torch.from_numpy(np.concatenate(levels)) for levels in zip(*maps, strict=True)],
            [torch.from_numpy(boxes) for boxes, _ in found],
            [torch.from_numpy(classes) for _, classes in found],
            max_instances,
        )

    def check(self, case: RecordedCase, refined: int) -> None:
        out, recorded = self.run(case, refined), case.tensors
        limit = case.settings["limit"]
        assert out.tokens.tolist() == recorded["tokens"].tolist()[:refined]
        # As they are compared with each other, so is the step at which a cell becomes a node.
        torch.testing.assert_close(out.incoherence, recorded["incoherence_28"], atol=1e-4, rtol=0)
        torch.testing.assert_close(out.coarse_logits, recorded["coarse_logits_28"], atol=1e-4, rtol=0)
        for part in (slice(refined), slice(limit, None)):
            torch.testing.assert_close(out.probs[part], recorded["refined_probs_112"][part], atol=1e-4, rtol=0)

    def test_first_instance_and_those_past_the_limit(self):
        self.check(recorded_case("case_b"), refined=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["case_a", "case_b"])
    def test_all_refined_instances(self, name: str):
        self.check(recorded_case(name), refined=10)

    @pytest.mark.parametrize("name", ["case_a", "case_b"])
    def test_pooled_crops(self, name: str):
        case = recorded_case(name)
        branch = ReleasedMaskBranch.from_original(case.weights("keys_mask_branch.json"))
        (height, width), seed = case.settings["image_size"], 100 * case.settings["seed"]
        count = case.settings["instances_per_image"][0]
        maps = [torch.from_numpy(x) for x in case.recipe.features(height, width, seed=seed)]
        boxes = torch.from_numpy(case.recipe.boxes(count, height, width, seed=seed)[0])
        with torch.no_grad():
            enhanced = [maps[0] + branch.semantic_tower(maps[0]), *maps[1:]]
        level = pyramid_level(boxes)
        for depth, (key, side) in enumerate(
            {"pooled_14": 14, "pooled_28": 28, "pooled_56_sampled": 56, "pooled_112_sampled": 112}.items()
        ):
            recorded = case.tensors[key]
            pooler = pooler_of(enhanced if depth else maps, boxes)
            pooled = pooler.crop(torch.arange(recorded.shape[0]), side, level - depth)
            every = side // recorded.shape[-1]
            torch.testing.assert_close(pooled[:, :, ::every, ::every], recorded, atol=1e-4, rtol=0)


def pooler_of(maps: list[Tensor], boxes: Tensor) -> CellPooler:
    pyramid = FeaturePyramid(tuple(maps), STRIDES)
    return CellPooler(FeatureTable.of(pyramid), boxes, torch.zeros(len(boxes), dtype=torch.long))


class TestPooling:
    BOXES = torch.tensor(
        [
            [0.0, 0.0, 192.0, 128.0],  # the whole image
            [10.0, 20.0, 66.0, 76.0],  # 56 pixels: one sample per cell at 14 on stride 4, exactly
            [3.3, 5.1, 4.2, 6.9],  # smaller than a feature pixel
            [0.0, 60.0, 192.0, 62.5],  # many samples along one axis alone
            [-40.0, -30.0, 30.0, 50.0],  # beyond the border
            [300.0, 300.0, 340.0, 320.0],  # outside
            [20.0, 20.0, 20.0, 40.0],  # without area
        ]
    )

    @pytest.mark.parametrize("side", [7, 14, 28])
    @pytest.mark.parametrize("level", [2, 3, 5])
    def test_is_roi_align(self, level: int, side: int):
        maps = [torch.randn(1, 8, 128 // s, 192 // s) for s in STRIDES]
        levels = torch.full((len(self.BOXES),), level)
        pooled = pooler_of(maps, self.BOXES).crop(torch.arange(len(self.BOXES)), side, levels)
        rois = F.pad(self.BOXES, (1, 0))
        expected = roi_align(maps[level - 2], rois, side, 1 / 2**level, sampling_ratio=-1, aligned=True)
        torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("side", "level"), [(1, 2), (111.9, 2), (112, 3), (223.9, 3), (224, 4), (448, 5), (1333, 5)]
    )
    def test_level_of_a_box(self, side: float, level: int):
        assert pyramid_level(torch.tensor([[0.0, 0.0, side, side], [0.0, 0.0, 2 * side, side / 2]])).tolist() == [
            level,
            level,
        ]


def slow_branch(branch: ReleasedMaskBranch, features: list[Tensor], box: Tensor, label: int, smooth: bool) -> Tensor:
    """One instance, step by step, with dense crops and torch's own attention: ``(112, 112)``."""
    level = int(pyramid_level(box[None]))
    semantic = features[0] + branch.semantic_tower(features[0])

    def pooled(first: Tensor, depth: int, side: int) -> Tensor:
        index = max(level - depth, 2)
        source = first if index == 2 else features[index - 2]
        return roi_align(source, F.pad(box[None], (1, 0)), side, 1 / 2**index, sampling_ratio=-1, aligned=True)

    crops = [pooled(features[0], 0, 14), *(pooled(semantic, d, s) for d, s in ((1, 28), (2, 56), (3, 112)))]
    hidden = branch.coarse_tower(crops[0])
    logits = branch.coarse_classifier(F.relu(branch.coarse_upsample(hidden)))[:, label, None]
    coarse = logits.sigmoid()
    tower = branch.incoherence_tower(crops[0] + hidden)
    incoherence = branch.incoherence_classifier(branch.incoherence_upsample(tower)).sigmoid()

    sides, tokens, codes, nodes = (14, 28, 56, 112), [], [], []
    for crop, side, threshold in zip(crops, sides, (None, 1e-6, 0.125, 0.8), strict=True):
        chosen = torch.ones(side, side, dtype=torch.bool)
        if threshold is not None:
            chosen = F.interpolate(incoherence, side)[0, 0] >= threshold
        if smooth and side == 112:
            chosen = F.max_pool2d(chosen[None, None].float(), 3, 1, 1)[0, 0] > 0
        value = F.interpolate(coarse, side, mode="bilinear")
        cell = torch.cat([crop, value], dim=1)[0].permute(1, 2, 0)[chosen]
        tokens.append(F.linear(cell, branch.node_encoder.weight, branch.node_encoder.bias))
        codes.append(detr_position(side)[chosen])
        nodes.append(chosen)
    x, code = torch.cat(tokens)[:, None], torch.cat(codes)[:, None]  # (T, 1, C)
    layers: Any = branch.sequence_encoder
    for layer in layers:
        attention = nn.MultiheadAttention(256, 4)
        attention.in_proj_weight.data, attention.in_proj_bias.data = layer.qkv.weight, layer.qkv.bias
        attention.out_proj = layer.project
        x = layer.norm_attention(x + attention(x + code, x + code, x)[0])
        x = layer.norm_ffn(x + layer.ffn(x))
    probs = branch.pixel_decoder(x)[:, 0, 0].split([int(n.sum()) for n in nodes])
    refined = coarse.clone()
    refined[0, 0, nodes[1]] = probs[1]
    if nodes[2].any():
        refined = F.interpolate(refined, 56, mode="bilinear", align_corners=True)
        refined[0, 0, nodes[2]] = probs[2]
    refined = F.interpolate(refined, 112, mode="bilinear", align_corners=True)
    refined[0, 0, nodes[3]] = probs[3]
    if smooth:
        pascal = torch.tensor([1.0, 6.0, 15.0, 20.0, 15.0, 6.0, 1.0])
        kernel = torch.outer(pascal, pascal) / pascal.sum() ** 2
        refined = F.conv2d(refined, kernel[None, None], padding=3)
    return refined[0, 0]


def detr_position(side: int) -> Tensor:
    """``(side, side, 256)``, y first, sine and cosine in turn."""
    code = torch.zeros(side, side, 256)
    place = torch.arange(1, side + 1) / (side + 1e-6) * 2 * torch.pi
    for channel in range(128):
        angle = place / 10000 ** (2 * (channel // 2) / 128)
        wave = angle.sin() if channel % 2 == 0 else angle.cos()
        code[:, :, channel] = wave[:, None]
        code[:, :, 128 + channel] = wave
    return code


class TestForward:
    @pytest.mark.parametrize("smooth", [False, True])
    @torch.no_grad()
    def test_agrees_with_a_loop_over_instances(self, smooth: bool):
        features, boxes, classes = scene([3])
        branch = random_branch()
        out = branch(features, boxes, classes, smooth=smooth)
        assert len(set(out.tokens.tolist())) == 3 and bool((out.tokens > 196).all())
        for index, (box, label) in enumerate(zip(boxes[0], classes[0].tolist(), strict=True)):
            expected = slow_branch(branch, features, box, label, smooth)
            torch.testing.assert_close(out.probs[index], expected, atol=1e-5, rtol=0)

    def test_images_of_a_batch_do_not_mix(self):
        features, boxes, classes = scene([1, 0, 2])
        branch = random_branch()
        together = branch(features, boxes, classes)
        alone = [branch([f[i, None] for f in features], [boxes[i]], [classes[i]]) for i in (0, 2)]
        joined = ReleasedMasks(*(torch.cat([getattr(x, n) for x in alone]) for n in together.__dataclass_fields__))
        assert_same(together, joined)

    def test_order_and_budget_do_not_matter(self):
        features, boxes, classes = scene([3])
        branch, order = random_branch(), torch.tensor([2, 0, 1])
        first = branch(features, boxes, classes, token_budget=1 << 20)
        second = branch(features, [boxes[0][order]], [classes[0][order]], token_budget=1)
        back = torch.argsort(order)
        assert_same(first, ReleasedMasks(*(getattr(second, n)[back] for n in first.__dataclass_fields__)))

    def test_a_group_fits_the_budget(self, monkeypatch: pytest.MonkeyPatch):
        padded: list[int] = []
        of = Sequences.of

        def watched(lengths: Tensor) -> Sequences:
            padded.append(int(lengths.max()) * len(lengths))
            return of(lengths)

        monkeypatch.setattr(Sequences, "of", staticmethod(watched))
        features, boxes, classes = scene([6])
        longest = int(random_branch()(features, boxes, classes).tokens.max())
        padded.clear()
        random_branch()(features, boxes, classes, token_budget=2 * longest)
        assert 1 < len(padded) < 6 and max(padded) <= 2 * longest

    def test_past_the_limit_the_coarse_mask_is_upsampled(self):
        features, boxes, classes = scene([2, 2])
        branch = random_branch()
        limited, whole = branch(features, boxes, classes, 2), branch(features, boxes, classes)
        assert len(limited.tokens) == 2 and len(whole.tokens) == 4
        torch.testing.assert_close(limited.probs[:2], whole.probs[:2], atol=1e-5, rtol=0)
        upsampled = F.interpolate(limited.coarse_logits.sigmoid()[:, None], 112, mode="bilinear")[:, 0]
        assert torch.equal(limited.probs[2:], upsampled[2:])
        assert bool((whole.probs[2:] != upsampled[2:]).flatten(1).any(dim=1).all())

    def test_every_instance_is_refined_unless_told_otherwise(self):
        features, _, _ = scene([1])
        boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0]]).repeat(12, 1)
        out = random_branch()(features, [boxes], [torch.zeros(12, dtype=torch.long)])
        assert len(out.tokens) == 12
        torch.testing.assert_close(out.probs, out.probs[:1].expand(12, -1, -1), atol=1e-5, rtol=0)

    def test_no_instances(self):
        features, boxes, classes = scene([0, 0])
        out = random_branch()(features, boxes, classes)
        assert out.probs.shape == (0, 112, 112) and out.coarse_logits.shape == (0, 28, 28) and out.tokens.shape == (0,)

    def test_inputs_are_not_changed(self):
        features, boxes, classes = scene([1])
        given = [*features, *boxes, *classes]
        copies = [x.clone() for x in given]
        random_branch()(features, boxes, classes, smooth=True)
        assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f, b, c: ([x[:, :8] for x in f], b, c), "256 channels"),
            (lambda f, b, c: (f[::-1], b, c), "finest first"),
            (lambda f, b, c: (f, b * 2, c * 2), "for each of 1 images"),
            (lambda f, b, c: (f, b, [c[0][:1]]), "boxes .N, 4. and classes"),
            (lambda f, b, c: (f, b, [c[0] * 0 + 80]), "classes from 0 to 79"),
        ],
    )
    def test_input_that_does_not_fit(self, change, message: str):
        with pytest.raises(InvalidInputError, match=message):
            random_branch()(*change(*scene([2])))

    @pytest.mark.parametrize("options", [{"max_instances": -1}, {"token_budget": 0}])
    def test_limits_out_of_range(self, options: dict):
        with pytest.raises(InvalidInputError, match="token_budget of at least 1 and max_instances"):
            random_branch()(*scene([1]), **options)


class TestFromOriginal:
    def test_what_training_alone_needs_may_be_missing(self):
        weights = branch_weights()
        inference = {k: v for k, v in weights.items() if "_bo." not in k and "semantic_s" not in k}
        assert len(inference) == len(weights) - 6
        for given in (weights, inference):
            assert not ReleasedMaskBranch.from_original(given).training

    def test_weights_are_not_shared(self):
        weights = {key: value.clone() for key, value in branch_weights().items()}
        branch = ReleasedMaskBranch.from_original(weights)
        weights["roi_heads.mask_head.deconv.bias"].zero_()
        assert bool((branch.coarse_upsample.bias == 0.01).all())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"roi_heads.mask_head.deconv.bias": None}, "1 missing .the first is 'roi_heads.mask_head.deconv.bias'"),
            ({"roi_heads.mask_head.other": torch.zeros(1)}, "1 unknown .the first is 'roi_heads.mask_head.other'"),
            ({"roi_heads.mask_head.deconv.bias": torch.zeros(2)}, r"deconv.bias of shape \(256,\)"),
            ({"roi_heads.mask_head.deconv.bias": torch.zeros(256, dtype=torch.long)}, "float, got"),
        ],
    )
    def test_other_tensors_are_refused(self, change: dict, message: str):
        weights = {key: value for key, value in (branch_weights() | change).items() if value is not None}
        with pytest.raises(WeightsError, match=message):
            ReleasedMaskBranch.from_original(weights)
