"""The network's variants: the cues of a node, the ablations of the paper, precision and gradients."""

from dataclasses import replace

import pytest
import torch
from small_models import (
    ALL_CUES,
    CIRCLES,
    HALF,
    make_eventful,
    random_pyramid,
    refine,
    roi_scene,
    select_all,
    small_config,
    small_transfiner,
)
from torch import Tensor

from transfiner_refine.config import TransfinerConfig
from transfiner_refine.functional.coarse import coarse_levels, coarse_logits
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.transfiner import MaskTransfiner
from transfiner_refine.types import LevelNodes


class TestVariants:
    @pytest.mark.parametrize("cues", [(cue,) for cue in ALL_CUES if cue != "position"])
    def test_one_cue_is_enough(self, cues: tuple[str, ...]):
        out = refine(small_transfiner(node_cues=cues), CIRCLES[:1])
        assert len(out.node_probs[0]) and out.probs.isfinite().all()

    @pytest.mark.parametrize(
        ("cues", "read"),
        [
            (("fine",), {"features"}),
            (("context",), {"features"}),
            (("coarse",), {"coarse"}),
            (("guidance",), {"guidance", "place"}),
            (("coarse", "position"), {"coarse", "place"}),
        ],
    )
    def test_a_cue_reads_its_own_input_and_no_other(self, cues: tuple[str, ...], read: set[str]):
        encoder = small_transfiner(node_cues=cues).node_encoder
        roi = torch.zeros(1, dtype=torch.long)
        box = torch.tensor([[40.0, 40.0, 200.0, 200.0]])

        def token(features: float = 1.0, coarse: float = 0.3, guidance: int = 0, place: float = 0.4) -> Tensor:
            pyramid = random_pyramid(256, 256)
            pyramid = replace(pyramid, maps=tuple(torch.full_like(m, features) for m in pyramid.maps))
            planes = torch.randn(1, 16, 28, 28, generator=torch.Generator().manual_seed(guidance))
            centre = torch.tensor([[0.5, place]])
            return encoder(RoIPyramid.of(pyramid, box, roi), planes, torch.tensor([coarse]), roi, centre, 28, 0)

        changes = {"features": 2.0, "coarse": 0.9, "guidance": 1, "place": 0.6}
        assert {name for name, value in changes.items() if not torch.equal(token(), token(**{name: value}))} == read

    def test_context_sees_the_neighbours_and_fine_does_not(self):
        """A node between two feature pixels of stride 4, far enough from the third that only its context sees it."""
        pyramid = random_pyramid(64, 64)
        other = [m.clone() for m in pyramid.maps]
        other[0][:, :, :, 9:] += 1.0
        roi, box = torch.zeros(1, dtype=torch.long), torch.tensor([[0.0, 0.0, 56.0, 56.0]])
        for cue, sees in (("fine", False), ("context", True)):
            encoder = small_transfiner(node_cues=(cue,)).node_encoder
            tokens = [
                encoder(
                    RoIPyramid.of(p, box, roi),
                    torch.zeros(1, 16, 28, 28),
                    torch.zeros(1),
                    roi,
                    torch.full((1, 2), 0.6),
                    28,
                    2,
                )
                for p in (pyramid, replace(pyramid, maps=tuple(other)))
            ]
            assert torch.equal(*tokens) != sees

    def test_fine_and_guidance_are_those_of_the_node_itself(self):
        """Cell (5, 9) of the root of the second RoI, though the context is read with it."""
        encoder = small_transfiner(node_cues=("fine", "context", "guidance")).node_encoder
        read: list[Tensor] = []
        encoder.fuse.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        boxes = torch.tensor([[0.0, 0.0, 90.0, 90.0], [40.0, 60.0, 200.0, 180.0]])
        roi_pyramid = RoIPyramid.of(random_pyramid(256, 256), boxes, torch.zeros(2, dtype=torch.long))
        planes, roi = torch.randn(2, 16, 28, 28), torch.tensor([1])
        centre = torch.tensor([[9.5, 5.5]]) / 28
        encoder(roi_pyramid, planes, torch.zeros(1), roi, centre, 28, 0)
        torch.testing.assert_close(read[0][:, :8], roi_pyramid.sample(roi, centre, 0))
        torch.testing.assert_close(read[0][0, -16:], planes[1, :, 5, 9], rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        "change", [{"lower_level_guidance": False}, {"level_embedding": False}, {"decoder": "label"}]
    )
    def test_other_architectures_run(self, change: dict):
        out = refine(small_transfiner(**change), CIRCLES[:2])
        assert all(len(p) for p in out.node_probs) and out.probs.isfinite().all()

    def test_guidance_carries_the_parent_into_the_finer_detector(self):
        """Paper, Table 3: without it a child's incoherence knows nothing of its parent's."""
        for guided in (True, False):
            model = small_transfiner(lower_level_guidance=guided)
            roi_pyramid, coarse = roi_scene(model, CIRCLES[:1], 2)
            logits = []
            for _ in range(2):
                found = model.incoherence_detector(roi_pyramid, coarse_levels(coarse, 2), 2, select_all)
                logits.append(found.candidates[1].logits)
                with torch.no_grad():
                    model.incoherence_detector.tower[6].bias.add_(1.0)  # type: ignore[union-attr, operator]
            assert torch.equal(*logits) != guided

    def test_without_propagation_only_the_finest_nodes_are_written(self):
        out = refine(small_transfiner(propagate=False))
        finest = torch.zeros_like(out.touched)
        nodes = out.detection.quadtree[-1]
        finest[nodes.roi, nodes.row, nodes.col] = True
        assert torch.equal(out.touched, finest)

    def test_coarse_logits_can_be_overturned(self):
        logits = coarse_logits(torch.tensor([0.0, 0.2, 0.5, 1.0]))
        assert logits.abs().max() == 3 and logits[2] == 0
        torch.testing.assert_close(logits[1].sigmoid(), torch.tensor(0.2))

    @pytest.mark.parametrize("tree_keys", [False, True])
    def test_bfloat16_is_close(self, tree_keys: bool):
        model = small_transfiner(tree_keys=tree_keys)
        roi_pyramid, coarse = roi_scene(model, CIRCLES)
        half = small_transfiner(tree_keys=tree_keys).to(torch.bfloat16)
        half_pyramid, _ = roi_scene(half, CIRCLES, pyramid=random_pyramid(256, 256).to(dtype=torch.bfloat16))
        chosen = {}

        def remember(level: int, cells: LevelNodes) -> Tensor:
            chosen[level] = cells.logits >= 0
            return chosen[level]

        with torch.no_grad():
            expected = model(roi_pyramid, coarse, 3, remember)
            out = half(half_pyramid, coarse, 3, lambda level, cells: chosen[level])  # the same nodes
        assert out.probs.dtype == torch.float32
        assert (out.probs - expected.probs).abs().mean() < 0.005
        assert ((out.probs >= 0.5) != (expected.probs >= 0.5)).float().mean() < 0.005
        assert not torch.equal(out.probs, expected.probs)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"decoder": "label"},
        {"joint_levels": False},
        {"tree_keys": True},
        {"depth": 1},
        {"lower_level_guidance": False},
    ],
)
def test_gradient_reaches_every_parameter(change: dict):
    torch.manual_seed(0)
    model = make_eventful(MaskTransfiner(small_config(**change)).train())
    roi_pyramid, coarse = roi_scene(model, CIRCLES[:2])
    out = model(roi_pyramid, coarse, model.config.depth, HALF)
    loss = sum((cells.logits.square().mean() for cells in out.detection.candidates), start=torch.zeros(()))
    (loss + sum(p.sum() for p in out.node_probs)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    level = model.node_encoder.level
    assert level is not None and level.weight.grad is not None
    assert level.weight.grad.abs().sum(dim=1).gt(0).all()  # the reference grid's vector, and each level's


def test_gradient_reaches_the_features():
    model = small_transfiner()
    pyramid = random_pyramid(256, 256)
    for level in pyramid.maps:
        level.requires_grad_()
    roi_pyramid, coarse = roi_scene(model, CIRCLES, pyramid=pyramid)
    model(roi_pyramid, coarse, 3, HALF).probs.sum().backward()
    used = pyramid.maps[:3]  # the largest RoI, of 275 pixels, has its root at stride 16
    assert all(level.grad is not None and level.grad.abs().sum() > 0 for level in used)


def test_paper_defaults_have_the_paper_s_shape():
    """Mask Transfiner, Sec. 3.3 and 4.1: 3 layers, 4 heads, 256 channels, four 3×3 convolutions, four cues."""
    config = TransfinerConfig()
    assert (config.layers, config.heads, config.channels, config.depth, config.decoder) == (3, 4, 256, 3, "label")
    assert set(config.node_cues) == {"fine", "coarse", "context", "position"}
    with torch.device("meta"):
        model = MaskTransfiner(config)
    tower = [m for m in model.incoherence_detector.tower if isinstance(m, torch.nn.Conv2d)]
    assert [m.kernel_size for m in tower] == [(3, 3)] * 4
    assert len(model.sequence_encoder.layers) == 3 and len(model.incoherence_detector.fusion) == 2
