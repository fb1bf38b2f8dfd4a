"""The network of the paper: what a result may and may not depend on, and where the computing goes."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from small_models import (
    CIRCLES,
    HALF,
    only_first,
    random_pyramid,
    refine,
    roi_scene,
    select_all,
    small_config,
    small_transfiner,
)
from torch import Tensor

from transfiner_refine.config import REFERENCE_SIDE, ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.coarse import coarse_levels
from transfiner_refine.functional.quadtree import double_nearest, length_groups
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.transfiner import MaskTransfiner, SequenceEncoder, TransfinerOutput, above_threshold
from transfiner_refine.types import LevelNodes


def assert_same(a: TransfinerOutput, b: TransfinerOutput) -> None:
    torch.testing.assert_close(a.probs, b.probs, rtol=0, atol=1e-5)
    assert torch.equal(a.touched, b.touched)
    for x, y in zip(a.node_probs, b.node_probs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


class TestSequences:
    @pytest.mark.parametrize("tree_keys", [True, False])
    @pytest.mark.parametrize("joint_levels", [True, False])
    @pytest.mark.parametrize("token_budget", [1, 700])
    def test_token_budget_cannot_change_a_result(self, token_budget: int, joint_levels: bool, tree_keys: bool):
        model = small_transfiner(joint_levels=joint_levels, tree_keys=tree_keys)
        assert_same(refine(model, token_budget=token_budget), refine(model))

    @pytest.mark.parametrize("tree_keys", [True, False])
    def test_padding_cannot_change_a_result(self, tree_keys: bool):
        """Sequences of 199 and of 1,996 tokens: alone, and padded to the longest one's length."""
        model = small_transfiner(tree_keys=tree_keys)
        select = only_first([1, 600, 7])
        together = refine(model, CIRCLES[:3], select)
        assert [len(level) for level in together.detection.quadtree] == [608, 608, 608]
        for index, count in enumerate((1, 600, 7)):
            alone = refine(model, CIRCLES[index : index + 1], only_first([count]))
            torch.testing.assert_close(together.probs[index], alone.probs[0], rtol=0, atol=1e-5)

    def test_encoder_gives_back_the_order_it_was_given(self):
        encoder = SequenceEncoder(small_config()).eval()
        lengths = torch.tensor([3, 50, 1])
        sequence = torch.repeat_interleave(torch.arange(3), lengths)
        tokens = torch.randn(54, 16)
        order = torch.randperm(54)
        with torch.no_grad():
            expected = torch.cat(
                [encoder(t, torch.zeros(len(t), dtype=torch.long), 1) for t in tokens.split([3, 50, 1])]
            )
            torch.testing.assert_close(encoder(tokens, sequence, 3), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(encoder(tokens[order], sequence[order], 3), expected[order], rtol=0, atol=1e-5)

    def test_groups_hold_each_roi_once_and_fit_the_budget(self):
        lengths = torch.tensor([0, 5, 900, 0, 5, 40, 7])
        roi = torch.repeat_interleave(torch.arange(7), lengths)
        zeros = torch.zeros_like(roi)
        groups = [g.tolist() for g in length_groups([LevelNodes(roi, zeros, zeros, zeros, zeros.float(), 28)], 7, 650)]
        assert groups[0] == [2]  # longer than the budget: alone, not cut
        assert sorted(roi for group in groups for roi in group) == [1, 2, 4, 5, 6]  # those without a node are in none
        for group in groups[1:]:
            assert len(group) * (REFERENCE_SIDE**2 + int(lengths[group].max())) <= 650
        assert max(map(len, groups)) > 1

    def test_levels_attend_to_each_other_only_in_joint_sequences(self):
        """Refining the root alone differs from refining it with the finer levels, unless each level is a sequence."""
        for joint, changed in ((True, True), (False, False)):
            model = small_transfiner(joint_levels=joint)
            root = [refine(model, depth=depth, select=only_first([40] * 5)).node_probs[0] for depth in (1, 2)]
            assert (not torch.allclose(root[0], root[1], atol=1e-4)) == changed


class TestInstances:
    def test_every_instance_is_refined(self):
        model = small_transfiner(depth=2)
        circles = [(12.0 + 24 * (i % 10), 20.0 + 40 * (i // 10), 6.0 + i / 10) for i in range(60)]
        out = refine(model, circles, token_budget=16384)
        assert (torch.bincount(out.detection.quadtree[0].roi, minlength=60) > 0).all()
        for index in (0, 9, 10, 30, 59):
            alone = refine(model, circles[index : index + 1])
            torch.testing.assert_close(out.probs[index], alone.probs[0], rtol=0, atol=1e-5)
        # A node that no sequence has held would have a logit of exactly zero.
        assert not any(probs.eq(0.5).any() for probs in out.node_probs)

    def test_order_does_not_matter(self):
        model = small_transfiner()
        order = [3, 0, 4, 2, 1]
        expected, permuted = refine(model), refine(model, [CIRCLES[i] for i in order])
        torch.testing.assert_close(permuted.probs, expected.probs[order], rtol=0, atol=1e-5)
        assert torch.equal(permuted.touched, expected.touched[order])

    def test_images_of_a_batch_do_not_mix(self):
        model = small_transfiner()
        pyramid = random_pyramid(256, 256, batch=2)
        rois = torch.tensor([[20.0, 30.0, 150.0, 170.0]]).expand(2, 4)
        _, coarse = roi_scene(model, CIRCLES[:1])
        with torch.no_grad():
            both = model(model.roi_pyramid(pyramid, rois, torch.tensor([0, 1])), coarse.expand(2, -1, -1), 3, HALF)
            for image in (0, 1):
                alone = model(model.roi_pyramid(pyramid, rois[:1], torch.tensor([image])), coarse, 3, HALF)
                torch.testing.assert_close(both.probs[image], alone.probs[0], rtol=0, atol=1e-5)
        assert (both.probs[0] - both.probs[1]).abs().max() > 0.01

    @pytest.mark.parametrize("decoder", ["label", "residual"])
    def test_no_instances(self, decoder: str):
        model = small_transfiner(decoder=decoder)
        pyramid = random_pyramid(64, 64)
        none = torch.zeros(0, dtype=torch.long)
        out = model(model.roi_pyramid(pyramid, torch.zeros(0, 4), none), torch.zeros(0, 112, 112), 3, HALF)
        assert out.probs.shape == out.touched.shape == (0, 112, 112)
        assert [len(level) for level in out.detection.quadtree] == [0, 0, 0]


class TestNodes:
    @pytest.mark.parametrize("decoder", ["label", "residual"])
    def test_without_a_node_the_coarse_mask_comes_back(self, decoder: str):
        model = small_transfiner(decoder=decoder)
        out = refine(model, select=above_threshold(1.01))
        assert torch.equal(out.probs, roi_scene(model, CIRCLES)[1])
        assert not out.touched.any() and not any(len(p) for p in out.node_probs)

    @pytest.mark.parametrize("decoder", ["label", "residual"])
    def test_only_nodes_and_their_descendants_change(self, decoder: str):
        model = small_transfiner(decoder=decoder)
        out = refine(model)
        root = torch.zeros(len(CIRCLES), ROOT_SIDE, ROOT_SIDE, dtype=torch.bool)
        nodes = out.detection.quadtree[0]
        root[nodes.roi, nodes.row, nodes.col] = True
        assert torch.equal(out.touched, double_nearest(double_nearest(root)))
        coarse = roi_scene(model, CIRCLES)[1]
        assert torch.equal(out.probs[~out.touched], coarse[~out.touched])
        assert ((out.probs >= 0.5) != (coarse >= 0.5)).any()

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_untrained_residual_decoder_keeps_every_label(self, depth: int):
        model = small_transfiner(eventful=False)
        out = refine(model, CIRCLES[:2], select_all if depth == 1 else only_first([200] * 2), depth)
        coarse = roi_scene(model, CIRCLES[:2], depth)[1]
        assert out.touched.any() and torch.equal(out.probs >= 0.5, coarse >= 0.5)

    def test_parents_are_nodes_and_values_are_written_where_they_stand(self):
        out = refine(small_transfiner(decoder="label"))
        quadtree = out.detection.quadtree
        for parents, children in pairwise(quadtree):
            assert len(children)
            for name in ("row", "col"):
                assert torch.equal(getattr(parents, name)[children.parent], getattr(children, name) // 2)
            assert torch.equal(parents.roi[children.parent], children.roi)
        finest = quadtree[-1]
        assert torch.equal(out.probs[finest.roi, finest.row, finest.col], out.node_probs[-1])

    def test_threshold_of_one_refines_nothing_even_where_the_detector_is_certain(self):
        model = small_transfiner()
        with torch.no_grad():
            model.incoherence_detector.classifier.bias.fill_(1000.0)  # type: ignore[union-attr]
        assert not refine(model, select=above_threshold(1.0)).touched.any()

    @pytest.mark.parametrize("max_nodes", [1, 30])
    def test_max_nodes_keeps_the_most_incoherent(self, max_nodes: int):
        model = small_transfiner()
        limited, full = refine(model, select=above_threshold(0.5, max_nodes)), refine(model)
        for level, nodes in enumerate(limited.detection.quadtree):
            found = torch.bincount(nodes.roi, minlength=5)
            assert (found <= max_nodes).all()
            if level:
                continue
            every = full.detection.quadtree[0]
            for roi in range(5):
                expected = every.logits[every.roi == roi].sort(descending=True).values[:max_nodes]
                torch.testing.assert_close(nodes.logits[nodes.roi == roi].sort(descending=True).values, expected)

    def test_same_input_same_output(self):
        first, second = refine(small_transfiner()), refine(small_transfiner())
        assert torch.equal(first.probs, second.probs)


class TestDepth:
    @pytest.mark.parametrize("depth", range(5))
    def test_each_depth_of_the_deepest_model(self, depth: int):
        model = small_transfiner(depth=4)
        out = refine(model, CIRCLES[:2], depth=depth)
        side = ROOT_SIDE << max(depth - 1, 0)
        assert out.probs.shape == (2, side, side) and out.probs.dtype == torch.float32
        assert out.probs.min() >= 0 and out.probs.max() <= 1
        assert len(out.detection.quadtree) == len(out.node_probs) == depth
        assert [level.side for level in out.detection.quadtree] == [ROOT_SIDE << level for level in range(depth)]
        if depth == 0:
            assert torch.equal(out.probs, roi_scene(model, CIRCLES[:2], 0)[1])

    @pytest.mark.parametrize("depth", range(5))
    def test_a_model_of_each_depth_runs(self, depth: int):
        model = MaskTransfiner(small_config(depth=depth)).eval()
        assert refine(model, CIRCLES[:1]).probs.shape[-1] == ROOT_SIDE << max(depth - 1, 0)

    def test_a_depth_beyond_the_model_is_refused(self):
        model = small_transfiner(depth=2)
        with pytest.raises(InvalidInputError, match="at most 2, the model's, got 3: choose a deeper model"):
            refine(model, depth=3)

    def test_a_coarse_mask_of_another_side_is_refused(self):
        model = small_transfiner()
        roi_pyramid, coarse = roi_scene(model, CIRCLES, 2)
        with pytest.raises(InvalidInputError, match=r"side 112 for depth 3, got .*56"):
            model(roi_pyramid, coarse, 3, HALF)

    def test_coarse_levels_are_averages(self):
        coarse = torch.rand(2, 112, 112)
        levels = coarse_levels(coarse, 3)
        assert levels[-1] is coarse
        torch.testing.assert_close(levels[0], coarse.unflatten(2, (28, 4)).unflatten(1, (28, 4)).mean((2, 4)))


class TestCost:
    """The computing follows the nodes: neither the area of an object nor that of the finest grid enters."""

    @staticmethod
    def count(model: MaskTransfiner, run: Callable[[], object]) -> dict[str, int]:
        """Rows that reach the finer detectors, the node encoder and the sequence encoder."""
        rows = {"finer": 0, "encoded": 0, "attended": 0}

        def counter(name: str):
            return lambda module, args, output: rows.update({name: rows[name] + len(output)})

        detector = model.incoherence_detector
        handles = [fusion.register_forward_hook(counter("finer")) for fusion in detector.fusion]
        handles.append(model.node_encoder.fuse.register_forward_hook(counter("encoded")))
        handles.append(model.sequence_encoder.register_forward_hook(counter("attended")))
        run()
        for handle in handles:
            handle.remove()
        return rows

    def test_rows_follow_the_nodes(self):
        model = small_transfiner()
        out: list[TransfinerOutput] = []
        rows = self.count(model, lambda: out.append(refine(model, select=only_first([3, 0, 50, 1, 9]))))
        nodes = [len(level) for level in out[0].detection.quadtree]
        references = 4 * REFERENCE_SIDE**2  # the RoI without a node needs none
        assert rows == {
            "finer": 4 * nodes[0] + 4 * nodes[1],
            "encoded": references + sum(nodes),
            "attended": references + sum(nodes),
        }

    def test_attention_to_trees_grows_with_the_nodes_and_not_with_their_square(self, benchmark):
        """Twice the nodes in as many trees: the multiplications beyond those of the reference tokens double."""

        def attention(tokens: int, tree_keys: bool) -> int:
            encoder = SequenceEncoder(small_config(tree_keys=tree_keys))
            key = torch.arange(tokens) % 100 if tree_keys else None
            with benchmark("measure").counting() as counter, torch.no_grad():
                encoder(torch.randn(tokens, 16), torch.zeros(tokens, dtype=torch.long), 1, key)
            return sum(counter.get_flop_counts()["Global"].values())

        for tree_keys, growth in ((True, 2.0), (False, 3.9)):
            once, twice = attention(2000, tree_keys), attention(4000, tree_keys)
            assert twice / once == pytest.approx(growth, rel=0.05)

    def test_a_large_object_costs_what_a_small_one_does(self):
        model = small_transfiner()
        select = only_first([50])
        small, large = ([(128.0, 128.0, radius)] for radius in (10.0, 110.0))
        assert self.count(model, lambda: refine(model, small, select)) == self.count(
            model, lambda: refine(model, large, select)
        )

    def test_no_finer_feature_is_sampled_without_nodes(self, monkeypatch: pytest.MonkeyPatch):
        model = small_transfiner()
        levels: list[int] = []
        sample = RoIPyramid.sample

        def spy(self: RoIPyramid, roi: Tensor, centres: Tensor, quadtree_level: int) -> Tensor:
            levels.extend([quadtree_level] * len(roi))
            return sample(self, roi, centres, quadtree_level)

        monkeypatch.setattr(RoIPyramid, "sample", spy)
        refine(model, select=above_threshold(1.01))
        assert levels == [0] * (len(CIRCLES) * ROOT_SIDE**2)
