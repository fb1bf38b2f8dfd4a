"""Baselines: refiners with another network, trained in the same loop, saved and loaded."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_models import CIRCLES, HALF, encoder_config, eventful_model, random_image, roi_scene, small_config
from training_runs import SIX_STEPS, run, tiny_model

from transfiner_refine import InvalidInputError, Refiner
from transfiner_refine.errors import WeightsError
from transfiner_refine.functional.coarse import coarse_levels
from transfiner_refine.functional.quadtree import take_nodes
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.transfiner import MaskTransfiner
from transfiner_refine.training.calibration import with_gain_predictor

TWO_STEPS = replace(SIX_STEPS, steps=2)
MASKS = torch.zeros(1, 64, 64, dtype=torch.bool)
MASKS[0, 15:50, 12:45] = True


def masks_of(refiner: Refiner) -> torch.Tensor:
    return refiner.refine(random_image(64, 64), masks=MASKS).probs  # type: ignore[return-value]


@pytest.fixture
def baselines(benchmark):
    return benchmark("baselines")


def test_an_mlp_sees_each_node_alone(baselines):
    """What the transformer's output depends on and the MLP's does not: the other nodes of the sequence."""
    torch.manual_seed(0)
    tokens, sequence = torch.randn(6, 16), torch.tensor([0, 0, 0, 1, 1, 1])
    changed = tokens.clone()
    changed[1] *= -1
    kept = torch.tensor([0, 2, 3, 4, 5])
    for network, depends in (("mlp", False), ("transformer", True)):
        encoder = baselines.NETWORKS[network](encoder_config()).sequence_encoder
        before, after = encoder(tokens, sequence, 2), encoder(changed, sequence, 2)
        assert torch.equal(before[kept], after[kept]) != depends
        assert not torch.allclose(before[1], after[1])


def test_an_mlp_has_as_many_weights_as_the_transformer(baselines):
    config = Refiner.from_pretrained().config
    counts = []
    for network in ("mlp", "transformer"):
        encoder = baselines.NETWORKS[network](config).sequence_encoder
        counts.append(sum(parameter.numel() for parameter in encoder.parameters()))
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize("network", ["mlp", "transformer", "non_local_28"])
def test_another_network_and_all_else_alike(baselines, network: str):
    model = eventful_model(encoder_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    baseline = baselines.with_network(model, network)
    assert baseline.config.network == network
    fresh = ("transfiner.sequence_encoder.", "transfiner.pixel_decoder.")
    for name, value in baseline.state_dict().items():
        assert name.startswith(fresh) or torch.equal(value, before[name]), name
    assert not baseline.transfiner.pixel_decoder.layers[2].weight.any()  # corrects nothing before training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_network(baselines):
    with pytest.raises(InvalidInputError, match=r"expected a network among \['boundary', .*\], got 'lstm'"):
        baselines.with_network(eventful_model(encoder_config()), "lstm")


def test_trained_in_the_same_loop_and_loaded(baselines, tmp_path: Path):
    model = baselines.with_network(tiny_model(), "mlp")
    before = [parameter.clone() for parameter in model.transfiner.sequence_encoder.parameters()]
    result = run(tmp_path, model=model, config=TWO_STEPS)
    after = model.transfiner.sequence_encoder.parameters()
    assert all(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    refiner = baselines.load_refiner(result.directory)
    assert isinstance(refiner.model, baselines.BaselineModel) and not refiner.model.training
    assert masks_of(refiner).shape == (1, 56, 56)


def test_what_is_saved_is_what_is_loaded(baselines, tmp_path: Path):
    torch.manual_seed(0)
    model = baselines.with_network(eventful_model(encoder_config()), "mlp").eval()
    torch.nn.init.normal_(model.transfiner.pixel_decoder.layers[2].weight)
    save_model(model, tmp_path, torch.float32)
    assert torch.equal(masks_of(baselines.load_refiner(tmp_path)), masks_of(Refiner(model)))


def test_the_package_refuses_a_baseline_and_the_benchmarks_load_both(baselines, tmp_path: Path):
    save_model(baselines.with_network(eventful_model(encoder_config()), "mlp"), tmp_path / "mlp")
    with pytest.raises(WeightsError, match="network"):
        Refiner.from_pretrained(tmp_path / "mlp")
    save_model(eventful_model(encoder_config()), tmp_path / "refiner")
    assert type(baselines.load_refiner(tmp_path / "refiner").model) is RefinerModel
    assert torch.equal(masks_of(baselines.load_refiner()), masks_of(Refiner.from_pretrained()))


def test_weights_of_another_baseline(baselines, tmp_path: Path):
    save_model(baselines.with_network(eventful_model(encoder_config()), "transformer"), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"network": "transformer"', '"network": "mlp"'))
    with pytest.raises(WeightsError, match="expected a baseline of these benchmarks"):
        baselines.load_refiner(tmp_path)


def test_a_baseline_is_calibrated_like_a_refiner(baselines, tmp_path: Path):
    """Another model's predicted gains mean nothing for a new network; its own are fitted anew."""
    calibrated = with_gain_predictor(eventful_model(encoder_config()))
    baseline = baselines.with_network(calibrated, "mlp")
    assert baseline.gain_predictor is None and not baseline.config.predicts_gain
    predicting = with_gain_predictor(baseline)
    assert isinstance(predicting, baselines.BaselineModel) and asdict(predicting.config)["network"] == "mlp"
    save_model(predicting, tmp_path)
    assert baselines.load_refiner(tmp_path).model.gain_predictor is not None


class TestGrids:
    """Networks on all cells of one level."""

    GRIDS = ("cnn_28", "cnn_56", "mlp_56", "non_local_28", "transformer_28", "transformer_56")

    def scene(self, benchmark, network: str, depth: int = 2) -> tuple[MaskTransfiner, RoIPyramid, torch.Tensor]:
        torch.manual_seed(0)
        config = small_config(depth=2)
        model = benchmark("baselines").NETWORKS[network](config).eval()
        torch.nn.init.normal_(model.pixel_decoder.layers[2].weight)
        return model, *roi_scene(model, CIRCLES, depth)

    @pytest.mark.parametrize("network", GRIDS)
    @torch.no_grad()
    def test_every_cell_is_refined(self, benchmark, network: str):
        model, pyramid, coarse = self.scene(benchmark, network)
        out = model(pyramid, coarse, 2, HALF)
        level = int(network.endswith("56"))
        assert [len(nodes) for nodes in out.detection.quadtree] == [
            len(CIRCLES) * 28**2 * (level == 0),
            len(CIRCLES) * 56**2 * (level == 1),
        ]
        assert out.touched.all() and out.probs.shape == coarse.shape
        assert (out.probs != coarse).float().mean() > 0.9

    @pytest.mark.parametrize("network", [name for name in GRIDS if name != "transformer_56"])
    @torch.no_grad()
    def test_one_by_one_and_some_nodes_equal_all(self, benchmark, network: str):
        """The groups of the budget, and the nodes that training samples, change no result."""
        model, pyramid, coarse = self.scene(benchmark, network)
        levels = coarse_levels(coarse, 2)
        found = model.incoherence_detector(pyramid, levels, 2, HALF)
        logits = model.refine_nodes(pyramid, levels, found.guidance, found.quadtree)
        for values, others in zip(
            logits, model.refine_nodes(pyramid, levels, found.guidance, found.quadtree, 1), strict=True
        ):
            torch.testing.assert_close(values, others, rtol=0, atol=1e-4)
        torch.manual_seed(0)
        index = [torch.randperm(len(nodes))[:7] for nodes in found.quadtree]
        some = [take_nodes(nodes, i) for nodes, i in zip(found.quadtree, index, strict=True)]
        for values, i, few in zip(
            logits, index, model.refine_nodes(pyramid, levels, found.guidance, some), strict=True
        ):
            torch.testing.assert_close(few, values[i], rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_an_mlp_on_the_grid_and_on_nodes_answer_alike(self, benchmark):
        """The same weights, the same cells: what differs is which cells are asked."""
        grid, pyramid, coarse = self.scene(benchmark, "mlp_28")
        nodes = benchmark("baselines").NETWORKS["mlp"](small_config(depth=2)).eval()
        weights = grid.state_dict()
        nodes.load_state_dict(
            {name.replace("sequence_encoder.network.", "sequence_encoder."): weights[name] for name in weights}
        )
        levels = coarse_levels(coarse, 2)
        found = grid.incoherence_detector(pyramid, levels, 2, HALF)
        asked = (pyramid, levels, found.guidance, found.quadtree)
        torch.testing.assert_close(grid.refine_nodes(*asked)[0], nodes.refine_nodes(*asked)[0], rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_the_budget_bounds_the_grids_held_at_once(self, benchmark):
        model, pyramid, coarse = self.scene(benchmark, "cnn_28")
        held = []
        model.sequence_encoder.register_forward_hook(lambda module, args, output: held.append(len(args[0])))
        model(pyramid, coarse, 2, HALF, token_budget=2 * 28**2)
        assert held == [2, 2, 1]

    @pytest.mark.parametrize(("network", "reach"), [("mlp_28", 0), ("cnn_28", 2), ("non_local_28", 27)])
    @torch.no_grad()
    def test_how_far_a_network_sees(self, benchmark, network: str, reach: int):
        """Two layers of 3×3 convolutions see two cells far."""
        torch.manual_seed(0)
        encoder = benchmark("baselines").NETWORKS[network](small_config()).sequence_encoder
        maps = torch.randn(1, 16, 28, 28)
        changed = maps.clone()
        changed[0, :, 0, 0] *= -1
        _, row, col = (encoder(maps) - encoder(changed)).abs().amax(1).nonzero().unbind(1)
        assert int(row.max()) == int(col.max()) == reach

    def test_trained_in_the_same_loop(self, baselines, tmp_path: Path):
        model = baselines.with_network(tiny_model(), "cnn_56")
        before = model.transfiner.sequence_encoder.layers[0][2].weight.clone()
        result = run(tmp_path, model=model, config=TWO_STEPS)
        assert not torch.equal(model.transfiner.sequence_encoder.layers[0][2].weight, before)
        assert masks_of(baselines.load_refiner(result.directory)).shape == (1, 56, 56)
