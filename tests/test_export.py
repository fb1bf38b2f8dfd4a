"""The exported graphs compute what the refiner computes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import (
    CIRCLES,
    discs,
    encoder_config,
    make_eventful,
    random_image,
    random_pyramid,
    roi_scene,
    small_transfiner,
)
from typer.testing import CliRunner

from transfiner_refine import InvalidInputError, MissingDependencyError, RefineOptions, Refiner
from transfiner_refine.cli import app
from transfiner_refine.data.coco import load_results
from transfiner_refine.export import OnnxRefiner, export_onnx
from transfiner_refine.export.graphs import RefinerGraph, node_budget
from transfiner_refine.functional.rle import decode
from transfiner_refine.modeling.gain import STATISTICS, refinement_statistics
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.pixel_head import PIXEL_SIDE
from transfiner_refine.modeling.transfiner import above_threshold

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx onnxscript onnxruntime")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnx onnxscript onnxruntime")

pytestmark = [
    # torch 2.15's own exporter.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]

DEMO = Path(__file__).resolve().parent.parent / "transfiner_refine" / "assets" / "demo"
MAX_NODES = 150
HEIGHT, WIDTH = 240, 250
PROBABILITY = 1e-3
"""Most by which a probability may differ."""


def small_refiner(**changes) -> Refiner:
    """A refiner with an image encoder that finds nodes, corrects and aligns them, and predicts gains."""
    torch.manual_seed(0)
    config = encoder_config(**({"depth": 2, "layers": 1, "predicts_gain": True, "pixel_widths": (8, 12)} | changes))
    model = RefinerModel(config).eval()
    pixels = torch.from_numpy(random_image(256, 256)).permute(2, 0, 1)[None].float() / 255
    assert model.image_encoder is not None and model.gain_predictor is not None
    with torch.no_grad():
        make_eventful(model.transfiner, pyramid=model.image_encoder(pixels))
        model.gain_predictor.weight.copy_(torch.linspace(-0.02, 0.03, len(STATISTICS)))
        if model.pixel_head is not None:
            torch.nn.init.normal_(model.pixel_head.out.weight, std=0.5)
    return Refiner(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_refiner(tree_keys=True).save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def refiner(saved: Path) -> Refiner:
    """The small refiner as it is loaded: files hold rounded weights."""
    return Refiner.from_pretrained(saved)


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small refiner as ONNX, by the command; it accepts every refinement, however small its predicted gain."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    arguments = ["--model", saved, "--output", folder, "--max-nodes", MAX_NODES]
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    change_config(folder, keep_if_gain_below=-1.0, keep_if_iou_below=0.0)
    return folder


def change_config(folder: Path, **changes: float) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() >= changes.keys()
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_no_sum_is_left_to_chance(exported: Path):
    """Onnxruntime adds up the repeated rows of ScatterND in several threads, which overwrite one another's sums."""
    onnx = pytest.importorskip("onnx", reason="the graph is read by onnx")
    nodes = onnx.load(exported / "refiner.onnx", load_external_data=False).graph.node
    sums = {node.op_type for node in nodes for a in node.attribute if a.name == "reduction" and a.s == b"add"}
    assert sums == {"ScatterElements"}


def test_the_segmenter_is_exported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its proposals, believed whatever they are, are those of the refiner; of some the refinement is refused."""
    monkeypatch.setattr("transfiner_refine.proposals.LEAST_AGREEMENT", 0.1)
    refiner = small_refiner(depth=1, segments=True)
    predictor = refiner.model.gain_predictor
    assert predictor is not None and predictor.proposal_weight is not None
    assert predictor.edge_weight is not None and predictor.again_weight is not None and predictor.again_bias is not None
    # Gains around the threshold, and mostly by what is said of the proposals.
    weight = torch.linspace(-0.02, 0.03, len(predictor.proposal_weight))
    predictor.edge_weight.data.copy_(weight[:-2])
    predictor.again_weight.data.copy_(weight[:-2])
    weight[-2:] = torch.tensor([1.0, -0.5])
    predictor.proposal_weight.data.copy_(weight)
    predictor.again_bias.data.fill_(0.06)  # so that those without a proposal are among the others
    options = RefineOptions(max_nodes=MAX_NODES, encode="crops", keep_if_iou_below=0, keep_if_gain_below=-1)
    image, masks = random_image(HEIGHT, WIDTH, seed=1), discs(HEIGHT, WIDTH, CIRCLES).numpy()
    folder = export_onnx(refiner, tmp_path / "onnx", options=options)
    config = json.loads((folder / "config.json").read_text())
    assert [x["name"] for x in config["refiner"]["inputs"][-2:]] == ["given", "proposals"]
    expected = refiner.refine(image, masks=masks, options=options)
    without = refiner.refine(image, masks=masks, options=replace(options, segment=False))
    assert expected.predicted_gain is not None and expected.probs is not None and expected.rois is not None
    runtime = OnnxRefiner(folder, threads=1)
    refined = runtime.refine(image, masks=masks, batch_size=3)
    assert refined.predicted_gain is not None
    assert not torch.equal(expected.masks, without.masks)
    np.testing.assert_allclose(refined.rois, expected.rois.numpy(), atol=1.0)
    np.testing.assert_allclose(refined.predicted_gain, expected.predicted_gain.numpy(), atol=0.01)
    assert np.mean(refined.masks != np.asarray(expected.masks)) < 0.01
    # What is refused behind its proposal is tried without, and may be refused once more.
    kept, again = 0, 0
    ordered = torch.cat([x.predicted_gain for x in (expected, without) if x.predicted_gain is not None]).sort().values
    for least in ((ordered[1:] + ordered[:-1]) / 2).tolist():
        judged = refiner.refine(image, masks=masks, options=replace(options, keep_if_gain_below=least))
        assert judged.predicted_gain is not None and judged.kept_coarse is not None
        change_config(folder, keep_if_gain_below=least)
        refined = OnnxRefiner(folder, threads=1).refine(image, masks=masks, batch_size=3)
        assert refined.predicted_gain is not None
        np.testing.assert_allclose(refined.predicted_gain, judged.predicted_gain.numpy(), atol=0.01)
        np.testing.assert_array_equal(refined.kept_coarse, judged.kept_coarse.numpy())
        assert np.array_equal(refined.masks[refined.kept_coarse], masks[refined.kept_coarse])
        assert np.mean(refined.masks != np.asarray(judged.masks)) < 0.01
        kept += int(judged.kept_coarse.sum())
        again += int(((judged.predicted_gain != expected.predicted_gain) & ~judged.kept_coarse).sum())
    assert kept > 0 and again > 0
    (folder / "segmenter.onnx").unlink()
    with pytest.raises(InvalidInputError, match=r"segmenter\.onnx"):
        OnnxRefiner(folder)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_onnxruntime_refines_as_the_refiner(refiner: Refiner, exported: Path, tmp_path: Path, count: int, passes: int):
    folder = shutil.copytree(exported, tmp_path / "exported")
    change_config(folder, passes=passes, again_if_iou_below=0.95)
    image = random_image(HEIGHT, WIDTH, seed=1)
    # The last ones reach beyond the border; one has no pixel.
    circles = [*CIRCLES, (240.0, 230.0, 60.0), (500.0, 500.0, 10.0)][:count]
    masks = discs(HEIGHT, WIDTH, circles).numpy() if count else np.zeros((0, HEIGHT, WIDTH), bool)
    options = RefineOptions(
        passes=passes,
        again_if_iou_below=0.95,
        max_nodes=MAX_NODES,
        encode="crops",
        keep_if_gain_below=-1,
        keep_if_iou_below=0,
    )
    expected = refiner.refine(image, masks=masks, options=options)
    refined = OnnxRefiner(folder, threads=1).refine(image, masks=masks, batch_size=3)
    assert expected.probs is not None and expected.predicted_gain is not None and refined.predicted_gain is not None
    assert refined.probs == pytest.approx(expected.probs.numpy(), abs=PROBABILITY)
    assert refined.predicted_gain == pytest.approx(expected.predicted_gain.numpy(), abs=PROBABILITY)
    assert np.array_equal(refined.masks, expected.masks.numpy())
    if count:
        assert (refined.masks != masks)[0].sum() > 100  # or else nothing was compared


def test_a_mask_of_probabilities_and_boxes_of_the_caller(refiner: Refiner, exported: Path):
    image = random_image(HEIGHT, WIDTH, seed=1)
    masks = discs(HEIGHT, WIDTH, CIRCLES[:2]).float().numpy() * 0.8 + 0.1
    boxes = np.array([[10.0, 40.0, 170.5, 200.0], [150.0, 20.0, 230.0, 100.25]], np.float32)
    options = RefineOptions(max_nodes=MAX_NODES, encode="crops", keep_if_gain_below=-1, keep_if_iou_below=0)
    expected = refiner.refine(image, boxes=boxes, masks=masks, options=options)
    refined = OnnxRefiner(exported, threads=1).refine(image, boxes=boxes, masks=masks)
    assert expected.probs is not None
    assert refined.probs == pytest.approx(expected.probs.numpy(), abs=PROBABILITY)
    assert np.array_equal(refined.masks, expected.masks.numpy())


def test_large_instances_are_shrunk_alike(refiner: Refiner, exported: Path):
    image = np.repeat(np.repeat(random_image(160, 171), 5, axis=0), 5, axis=1)
    masks = discs(800, 855, [(400.0, 420.0, 300.0)]).numpy()
    options = RefineOptions(max_nodes=MAX_NODES, encode="crops", keep_if_gain_below=-1, keep_if_iou_below=0)
    expected = refiner.refine(image, masks=masks, options=options)
    refined = OnnxRefiner(exported, threads=1).refine(image, masks=masks)
    assert expected.probs is not None
    assert refined.probs == pytest.approx(expected.probs.numpy(), abs=PROBABILITY)
    assert np.mean(refined.masks != expected.masks.numpy()) < 1e-5


@pytest.mark.parametrize(("name", "value"), [("keep_if_gain_below", 0.99), ("keep_if_iou_below", 1.0)])
def test_refused_refinements_keep_their_coarse_mask(exported: Path, tmp_path: Path, name: str, value: float):
    folder = tmp_path / "strict"
    shutil.copytree(exported, folder)
    change_config(folder, **{name: value})
    masks = discs(HEIGHT, WIDTH, CIRCLES[:2]).numpy()
    refined = OnnxRefiner(folder, threads=1).refine(random_image(HEIGHT, WIDTH, seed=1), masks=masks)
    assert refined.kept_coarse.all()
    assert np.array_equal(refined.masks, masks)


def test_without_a_node_the_coarse_mask_comes_back(exported: Path, tmp_path: Path):
    folder = tmp_path / "calm"
    shutil.copytree(exported, folder)
    graph = onnx.load(folder / "refiner.onnx")
    (bias,) = (x for x in graph.graph.initializer if x.name.endswith("incoherence_detector.classifier.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([-100], np.float32), bias.name))
    onnx.save(graph, folder / "refiner.onnx")
    masks = discs(HEIGHT, WIDTH, CIRCLES).numpy()
    image = random_image(HEIGHT, WIDTH, seed=1)
    refined = OnnxRefiner(folder, threads=1).refine(image, masks=masks)
    assert np.array_equal(refined.masks, masks)
    assert not np.array_equal(OnnxRefiner(exported, threads=1).refine(image, masks=masks).masks, masks)


VARIANTS = {
    "paper": {"node_cues": ("fine", "coarse", "context", "position"), "decoder": "label", "level_embedding": False},
    "levels apart": {"joint_levels": False},
    "keys of trees": {"tree_keys": True},
    "keys of trees, levels apart": {"tree_keys": True, "joint_levels": False},
    "no guidance": {"lower_level_guidance": False, "node_cues": ("fine", "coarse")},
    "no propagation": {"propagate": False},
}


@pytest.mark.parametrize("max_nodes", [40, 400])
@pytest.mark.parametrize("changes", [{}, *VARIANTS.values()], ids=["default", *VARIANTS])
def test_the_graph_is_the_network_for_every_architecture(changes: dict, max_nodes: int):
    """Before any export: a fixed node budget changes nothing, with more nodes than it or less, in RoIs of all sizes."""
    transfiner = small_transfiner(**changes)
    model = RefinerModel(transfiner.config)
    model.transfiner = transfiner
    pyramid = random_pyramid(256, 256)
    roi_pyramid, coarse = roi_scene(transfiner, CIRCLES, pyramid=pyramid)
    graph = RefinerGraph(model.eval(), node_budget(max_nodes, 3), 0.5, 0.5)
    with torch.no_grad():
        expected = transfiner(roi_pyramid, coarse, 3, above_threshold(0.5, max_nodes))
        probs, touched = graph(pyramid.maps, roi_pyramid.rois, roi_pyramid.image, coarse)[:2]
    torch.testing.assert_close(probs, expected.probs, atol=1e-5, rtol=0)
    assert torch.equal(touched, expected.touched)
    assert touched.any()


def test_the_graph_predicts_the_gain(refiner: Refiner):
    transfiner, predictor = refiner.model.transfiner, refiner.model.gain_predictor
    assert predictor is not None
    pyramid = random_pyramid(256, 256, strides=transfiner.config.strides)
    roi_pyramid, coarse = roi_scene(transfiner, CIRCLES, pyramid=pyramid)
    graph = RefinerGraph(refiner.model, node_budget(100, 2), 0.5, 0.5, align_pixels=False)
    with torch.no_grad():
        output = transfiner(roi_pyramid, coarse, 2, above_threshold(0.5, 100))
        expected = predictor(refinement_statistics(output, coarse))
        gain = graph(pyramid.maps, roi_pyramid.rois, roi_pyramid.image, coarse)[2]
    torch.testing.assert_close(gain, expected)


def test_node_budget():
    assert node_budget(5000, 3) == (784, 3136, 5000)
    assert node_budget([10, 1000, 100], 3) == (10, 40, 100)
    assert len(node_budget(None, 4)) == 4
    with pytest.raises(InvalidInputError, match="one for each of 3 levels"):
        node_budget([10, 20], 3)
    with pytest.raises(InvalidInputError, match="at least 1"):
        node_budget(0, 3)


def test_the_graphs_take_whole_images(refiner: Refiner, exported: Path):
    encoder, graph = (
        ort.InferenceSession(str(exported / name), providers=["CPUExecutionProvider"])
        for name in ("image_encoder.onnx", "refiner.onnx")
    )
    pixels = torch.rand(2, 3, 224, 320)
    image_encoder = refiner.model.image_encoder
    assert image_encoder is not None
    coarse, roi_pixels = torch.rand(5, 56, 56), torch.rand(5, 3, PIXEL_SIDE, PIXEL_SIDE)
    rois = torch.tensor([[10.0, 20, 100, 120], [0, 0, 220, 320], [5, 5, 9, 9], [-20, 100, 60, 400], [8, 8, 40, 200]])
    image = torch.tensor([0, 0, 1, 1, 0])
    eager = RefinerGraph(refiner.model, node_budget(MAX_NODES, 2), 0.5, 0.5)
    with torch.no_grad():
        maps = image_encoder(pixels).maps
        expected = eager(maps, rois, image, coarse, roi_pixels)
    for found, wanted in zip(encoder.run(None, {"pixels": pixels.numpy()}), maps, strict=True):
        assert found == pytest.approx(wanted.numpy(), abs=1e-4)
    names = [x.name for x in graph.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, [*maps, rois, image, coarse, roi_pixels], strict=True)}
    probs, touched, aligned, gain = graph.run(None, feed)
    assert probs == pytest.approx(expected[0].numpy(), abs=PROBABILITY)
    assert np.array_equal(touched, expected[1].numpy())
    assert aligned == pytest.approx(expected[2].numpy(), abs=PROBABILITY)
    assert gain == pytest.approx(expected[3].numpy(), abs=PROBABILITY)


def test_the_runtime_needs_no_torch(exported: Path):
    code = f"""if True:
        import sys
        sys.modules["torch"] = None  # an import of it fails
        sys.path.insert(0, {str(exported)!r})
        import numpy as np
        from onnx_refiner import OnnxRefiner
        masks = np.zeros((1, 90, 100), bool)
        masks[0, 20:70, 30:80] = True
        refined = OnnxRefiner({str(exported)!r}, threads=1).refine(np.zeros((90, 100, 3), np.uint8), masks=masks)
        assert refined.masks.shape == masks.shape
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_wrong_input_is_refused(exported: Path, tmp_path: Path):
    refiner = OnnxRefiner(exported, threads=1)
    image = random_image(20, 30)
    with pytest.raises(InvalidInputError, match=r"\(N, 20, 30\)"):
        refiner.refine(image, masks=np.zeros((1, 30, 20), bool))
    with pytest.raises(InvalidInputError, match="bool or float"):
        refiner.refine(image, masks=np.zeros((1, 20, 30), np.uint8))
    with pytest.raises(InvalidInputError, match="one per mask"):
        refiner.refine(image, masks=np.zeros((1, 20, 30), bool), boxes=[])
    with pytest.raises(InvalidInputError, match="uint8 RGB"):
        refiner.refine(image / 255, masks=np.zeros((1, 20, 30), bool))
    one = np.ones((1, 20, 30), bool)
    for value in (2.0, -1.0, np.nan):
        with pytest.raises(InvalidInputError, match=r"probabilities in \[0, 1\]"):
            refiner.refine(image, masks=np.where(one, value, 0.0))
    with pytest.raises(InvalidInputError, match="finite boxes"):
        refiner.refine(image, masks=one, boxes=[[0, 0, np.nan, 9]])
    with pytest.raises(InvalidInputError, match=r"x2 > x1 and y2 > y1, got others at index \[0\]"):
        refiner.refine(image, masks=one, boxes=[[5, 5, 3, 9]])
    with pytest.raises(InvalidInputError, match="batch_size of at least 1"):
        refiner.refine(image, masks=one, batch_size=0)
    with pytest.raises(InvalidInputError, match="at least one pixel"):
        refiner.refine(image[:0], masks=one[:, :0])
    assert len(refiner.refine(image, masks=one[:0], boxes=[]).masks) == 0
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        OnnxRefiner(tmp_path)


def test_missing_packages_are_named(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refiner: Refiner):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        OnnxRefiner(exported)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"transfiner-refine\[onnx\]"):
        export_onnx(refiner, tmp_path)


@pytest.mark.slow
def test_saved_programs_compute_the_same(saved: Path, refiner: Refiner, tmp_path: Path):
    arguments = ["--model", saved, "--output", tmp_path / "out", "--format", "pt2"]
    budget = ["--max-nodes", "20", "--max-nodes", "60"]
    result = CliRunner().invoke(app, ["export", *map(str, arguments), *budget], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "image_encoder.pt2", "refiner.pt2"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_nodes"] == [20, 60]
    pyramid = random_pyramid(256, 224, strides=refiner.config.strides)
    coarse, image = torch.rand(4, 56, 56), torch.zeros(4, dtype=torch.long)
    rois = torch.tensor([[10.0, 20, 100, 120], [0, 0, 220, 220], [5, 5, 9, 9], [-20, 100, 60, 400]])
    inputs = (pyramid.maps, rois, image, coarse, torch.rand(4, 3, PIXEL_SIDE, PIXEL_SIDE))
    with torch.no_grad():
        expected = RefinerGraph(refiner.model, (20, 60), 0.5, 0.5)(*inputs)
    program = torch.export.load(tmp_path / "out" / "refiner.pt2").module()
    for found, wanted in zip(program(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_embedded_model_on_a_photo(tmp_path: Path):
    entries = [x for x in load_results(DEMO / "detections.json") if x["category_id"] == 17]
    image = np.asarray(Image.open(DEMO / "chelsea.jpg").convert("RGB"))
    masks = np.stack([decode(x["segmentation"], image.shape[:2]) for x in entries])
    refiner = Refiner.from_pretrained()
    export_onnx(refiner, tmp_path, max_nodes=512)
    expected = refiner.refine(image, masks=masks, options=RefineOptions(max_nodes=512, encode="crops"))
    refined = OnnxRefiner(tmp_path).refine(image, masks=masks)
    assert expected.probs is not None
    assert refined.probs == pytest.approx(expected.probs.numpy(), abs=PROBABILITY)
    assert np.mean(refined.masks != expected.masks.numpy()) < 1e-6
    assert (refined.masks != masks).sum() > 1000
