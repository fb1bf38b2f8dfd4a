"""Training: targets that form a quadtree, and losses that teach."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from small_models import discs
from torch import Tensor
from training_runs import DEPTH, disc_sample, tiny_model

from transfiner_refine.functional.incoherence import dilate, incoherence_levels
from transfiner_refine.modeling.transfiner import coarse_levels
from transfiner_refine.training.losses import LossConfig, RefinementLoss, sample_nodes
from transfiner_refine.training.targets import make_targets
from transfiner_refine.types import LevelNodes


def batch(count: int, seed: int = 0) -> list[Tensor]:
    """Arguments of the objective: image, roi, coarse, truth, weight."""
    generator = torch.Generator().manual_seed(seed)
    samples = [disc_sample(generator) for _ in range(count)]
    return [torch.stack(column) for column in list(zip(*samples, strict=True))[:5]]


def exact_coarse(truth: Tensor) -> Tensor:
    """A coarse mask ``(R, S, S)`` without an error."""
    return F.avg_pool2d(truth[:, None].float(), 2)[:, 0]


class TestTargets:
    @pytest.fixture
    def truth(self) -> Tensor:
        """``(2, 224, 224)``: a disc, and a disc with a hole."""
        a, b, hole = discs(224, 224, [(110.0, 100.0, 70.0), (120.0, 120.0, 90.0), (130.0, 110.0, 20.0)])
        return torch.stack([a, b & ~hole])

    def targets(self, truth: Tensor, coarse: Tensor | None = None, seed: int = 0, mark_wrong: bool = True):
        coarse = exact_coarse(truth) if coarse is None else coarse
        generator = torch.Generator().manual_seed(seed)
        return make_targets(truth, coarse_levels(coarse, 3), generator, mark_wrong)

    def test_all_that_is_lost_and_a_random_part_of_its_neighbours(self, truth: Tensor):
        """Paper, Sec. 3.4: jittered ground truth."""
        found, other = self.targets(truth).incoherent[-1], self.targets(truth, seed=1).incoherent[-1]
        lost = incoherence_levels(truth, 3)[-1]
        assert not (lost & ~found).any() and not (found & ~dilate(lost)).any()
        assert lost.sum() < found.sum() < dilate(lost).sum()
        assert torch.equal(found, self.targets(truth).incoherent[-1]) and not torch.equal(found, other)

    def test_every_ancestor_is_marked(self, truth: Tensor):
        maps = self.targets(truth).incoherent
        assert [m.shape[-1] for m in maps] == [28, 56, 112]
        for above, below in pairwise(maps):
            roi, row, col = below.nonzero().unbind(1)
            assert above[roi, row // 2, col // 2].all()
        for lost, found in zip(incoherence_levels(truth, 3), maps, strict=True):
            assert not (lost & ~found).any()

    def test_coverage_is_the_share_of_each_cell(self, truth: Tensor):
        for level, coverage in enumerate(self.targets(truth).coverage):
            side = 28 << level
            blocks = truth.float().unflatten(2, (side, -1)).unflatten(1, (side, -1))
            torch.testing.assert_close(coverage, blocks.mean(dim=(2, 4)))

    def test_a_missed_part_is_marked_at_the_root_alone(self, truth: Tensor):
        coarse = exact_coarse(truth)
        coarse[0, 40:60, 40:60] = 0.0  # 5 × 5 root cells inside the disc, far from its outline
        plain = self.targets(truth, coarse, mark_wrong=False).incoherent
        marked = self.targets(truth, coarse).incoherent
        assert not plain[0][0, 10:15, 10:15].any() and marked[0][0, 10:15, 10:15].all()
        assert torch.equal(marked[0][1], plain[0][1])
        assert torch.equal(marked[1], plain[1]) and torch.equal(marked[2], plain[2])

    def test_no_objects(self):
        targets = self.targets(torch.zeros(0, 224, 224, dtype=torch.bool))
        assert [m.shape for m in targets.incoherent] == [(0, side, side) for side in (28, 56, 112)]


class TestSampling:
    def nodes(self, counts: list[int]) -> LevelNodes:
        roi = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))[
            torch.randperm(sum(counts))
        ]
        place = torch.arange(len(roi))
        return LevelNodes(roi, place, place, place, place.float(), 28)

    def test_at_most_the_quota_of_each_roi(self):
        kept = sample_nodes(self.nodes([500, 3, 0, 100, 101]), 100)
        assert torch.bincount(kept.roi, minlength=5).tolist() == [100, 3, 0, 100, 100]
        assert len(kept.row.unique()) == len(kept.row) and (kept.parent == -1).all()

    def test_chosen_at_random(self):
        """Whatever the detector thinks of them: the paper samples, it does not rank."""
        nodes = self.nodes([400])
        torch.manual_seed(1)
        first, second = sample_nodes(nodes, 100), sample_nodes(nodes, 100)
        assert not torch.equal(first.row, second.row)
        assert abs(float(first.logits.mean()) - 199.5) < 40  # three and a half standard errors

    def test_nothing_to_choose_from(self):
        assert len(sample_nodes(self.nodes([]), 100)) == 0


class TestLosses:
    def test_a_gradient_for_every_trainable_weight(self):
        model = tiny_model().train()
        assert model.image_encoder is not None
        model.image_encoder.backbone.freeze(4)
        with torch.no_grad():
            model.transfiner.pixel_decoder.layers[2].weight.normal_()  # type: ignore[operator, union-attr]
        losses = RefinementLoss(model, LossConfig())(*batch(2))
        assert set(losses) == {"loss_refine", "loss_incoherence", "recall", "precision", "wrong_before", "wrong_after"}
        (losses["loss_refine"] + losses["loss_incoherence"]).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.abs().sum() > 0, name

    def test_weights_of_equation_2(self):
        losses = {}
        for scale in (1.0, 2.0):
            config = LossConfig(refine_weight=scale, incoherence_weight=0.5 * scale, cross_entropy_weight=3.0 * scale)
            torch.manual_seed(0)
            losses[scale] = RefinementLoss(tiny_model(), config)(*batch(2))
        for name in ("loss_refine", "loss_incoherence", "loss_cross_entropy"):
            torch.testing.assert_close(losses[2.0][name], 2 * losses[1.0][name])
        assert (LossConfig().refine_weight, LossConfig().incoherence_weight) == (1.0, 0.5)
        assert LossConfig().nodes_per_level == (100, 100)

    def test_the_untrained_model_is_as_wrong_as_the_coarse_mask(self):
        """And its L1 loss is that of the coarse mask, whose logits are limited to ±3, over all nodes of all levels."""
        model = tiny_model()
        with torch.no_grad():
            model.transfiner.incoherence_detector.classifier.bias.fill_(-50.0)  # type: ignore[operator, union-attr]
        _, _, coarse, truth, _ = given = batch(3)
        torch.manual_seed(1)
        losses = RefinementLoss(model, LossConfig(nodes_per_level=(10**6, 10**6)))(*given)
        torch.manual_seed(1)
        levels = coarse_levels(coarse, DEPTH)
        targets = make_targets(truth, levels)
        before, label = (
            torch.cat([x[wanted] for x, wanted in zip(maps, targets.incoherent, strict=True)])
            for maps in (levels, targets.coverage)
        )
        limited = torch.sigmoid(torch.logit(before).clamp(-3, 3))
        torch.testing.assert_close(losses["loss_refine"], (limited - label).abs().mean())
        wrong = ((before >= 0.5) != (label >= 0.5)).float().mean()
        assert 0.05 < wrong == losses["wrong_before"] == losses["wrong_after"]

    def test_an_object_without_weight_teaches_nothing(self):
        config = LossConfig(nodes_per_level=(10**6, 10**6))  # all nodes, so that no draw depends on their number
        model = tiny_model()
        first, second = batch(2), batch(2, seed=7)
        results = []
        for other in (first, second):
            columns = [torch.cat([a[:1], b[1:]]) for a, b in zip(first, other, strict=True)]
            columns[4] = torch.tensor([1.0, 0.0])
            torch.manual_seed(0)
            losses = RefinementLoss(model, config)(*columns)
            results.append([losses["loss_refine"], losses["loss_incoherence"]])
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)

    def test_nodes_that_inference_would_take_are_trained_too(self):
        """A detector that fires everywhere must have its false nodes refined, not those of the truth alone."""
        model = tiny_model()
        counts = {}
        for bias in (-50.0, 50.0):
            with torch.no_grad():
                model.transfiner.incoherence_detector.classifier.bias.fill_(bias)  # type: ignore[operator, union-attr]
            taken: list[int] = []
            handle = model.transfiner.pixel_decoder.register_forward_hook(lambda m, a, out, t=taken: t.append(len(out)))
            RefinementLoss(model, LossConfig(nodes_per_level=(10**6, 10**6)))(*batch(1))
            handle.remove()
            counts[bias] = sum(taken)
        assert counts[-50.0] > 28 and counts[50.0] > counts[-50.0] + 400

    @pytest.mark.parametrize("frozen", [False, True])
    def test_no_node_at_all(self, frozen: bool):
        """A uniform truth and a coarse mask that is right: nothing to learn, nothing undefined."""
        image, roi, coarse, truth, weight = batch(1)
        config = LossConfig(incoherence_threshold=1.0, cross_entropy_weight=1.0)
        model = tiny_model()
        if frozen:  # as in fine-tuning
            model.transfiner.incoherence_detector.requires_grad_(False)
            model.image_encoder.requires_grad_(False)  # type: ignore[union-attr]
        losses = RefinementLoss(model, config)(image, roi, torch.ones_like(coarse), torch.ones_like(truth), weight)
        values = {name: float(value.detach()) for name, value in losses.items()}
        assert all(math.isfinite(value) for value in values.values()), values
        assert values["loss_refine"] == values["wrong_after"] == 0.0
        sum(losses.values(), start=torch.zeros(())).backward()

    def test_fifty_steps_overfit_one_sample(self):
        model = tiny_model()
        assert model.image_encoder is not None
        model.image_encoder.backbone.freeze(5)
        objective = RefinementLoss(model, LossConfig(cross_entropy_weight=0.5))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        sample, history = batch(1), []
        for _ in range(50):
            losses = objective(*sample)
            loss = sum((v for name, v in losses.items() if name.startswith("loss")), start=torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append({"loss": loss.detach()} | {name: value.detach() for name, value in losses.items()})

        def mean(name: str, steps: slice) -> float:
            return float(torch.stack([record[name] for record in history[steps]]).mean())

        last = slice(-5, None)
        assert mean("loss", last) < 0.6 * mean("loss", slice(0, 2))
        assert mean("loss_incoherence", last) < 0.75 * mean("loss_incoherence", slice(0, 2))
        assert mean("wrong_after", last) < 0.7 * mean("wrong_before", last)
