"""The adapter of Hugging Face transformers, on tiny models of the real framework with random weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import adapter_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import encoder_config, eventful_model
from tiny_transformers import (
    BOX_KINDS,
    DETRS,
    MASK_KINDS,
    QUERIES,
    SIZES,
    TWO_AND_ONE,
    Adapter,
    call,
    class_field,
    identity,
    make,
    mask_field,
    processor,
    resnet,
    results,
    small_adapter,
    train_call,
    transformers,
)
from torch import Tensor, nn

from transfiner_refine import InvalidInputError, Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.functional.incoherence import dilate
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfiner_refine.adapters.transformers.TransformersAdapter", small_adapter)


def host(kind: str) -> cases.Host:
    return cases.Host(
        make=partial(make, kind),
        call=partial(call, kind),
        results=partial(results, kind),
        losses=lambda model: train_call(kind, model, *TWO_AND_ONE)[1],
        sizes=SIZES,
    )


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(
    "check",
    [
        cases.check_identity,
        cases.check_every_instance_is_refined,
        partial(cases.check_batch_equals_loop, alike=SIZES[:1] * 2),
        cases.check_detach,
        cases.check_threads,
        cases.check_training_on_the_image_is_refused,
        partial(cases.check_joint_training, steps=6, learning_rate=3e-4),
        cases.check_scopes,
    ],
    ids=lambda check: getattr(check, "func", check).__name__,
)
def test_as_every_host(kind: str, check: Callable[[cases.Host], None]):
    check(host(kind))


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_saved_and_loaded(kind: str, tmp_path: Path):
    cases.check_saved_model(host(kind), tmp_path)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_predictions_are_the_host_own_queries(kind: str):
    model = make(kind)
    adapter: Any = adapt(model)
    image = cases.random_scene(*SIZES[0])
    inputs = processor(kind)(image, return_tensors="pt", do_rescale=False)
    with torch.no_grad():
        output = model(**inputs)
    probs = output[class_field(kind)][0]
    scores, labels = (probs.sigmoid() if kind == "conditional" else probs.softmax(-1)[:, :-1]).max(-1)
    logits = output[mask_field(kind)][0]
    if kind not in DETRS:
        inside = logits > 0
        scores = scores * torch.stack([m[i].sigmoid().mean() for m, i in zip(logits, inside, strict=True)])
    adapter.score_threshold = float(scores.sort().values[:2].mean())  # all but the worst query

    (prediction,) = adapter.detect([image])
    kept = (scores > adapter.score_threshold).nonzero()[:, 0]
    assert prediction.indices.tolist() == kept.tolist() and len(kept) == QUERIES - 1
    instances = prediction.instances
    torch.testing.assert_close(instances.scores, scores[kept])
    assert torch.equal(cast(Tensor, instances.labels), labels[kept])
    assert prediction.mask_logits is not None and torch.equal(prediction.mask_logits, logits[kept])
    assert instances.masks.dtype == torch.float32 and instances.image_size == SIZES[0]
    if kind in DETRS:
        resized = F.interpolate(logits[None].sigmoid(), SIZES[0], mode="bilinear")[0]
        (expected,) = processor(kind).post_process_object_detection(output, threshold=0, target_sizes=[SIZES[0]])
        distance = torch.cdist(instances.boxes, expected["boxes"])
        assert float(distance.amin(dim=1).max()) < 1e-3
    else:
        resized = F.interpolate(logits[None], SIZES[0], mode="bilinear")[0].sigmoid()
        assert torch.equal(instances.boxes, boxes_from_masks(instances.masks))
    torch.testing.assert_close(instances.masks, resized[kept])
    assert ((instances.masks >= 0.5).sum(dim=0) > 1).any(), "masks overlap, and stay so"


def test_images_may_come_in_any_kind(tmp_path: Path):
    adapter = adapt(make("mask2former"))
    pixels = (255 * cases.random_scene(*SIZES[0])).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "image.png")
    kinds = [pixels, pixels.float() / 255, array, Image.fromarray(array), tmp_path / "image.png"]
    first, *others = adapter.detect(kinds)
    for other in others:
        assert cases.share_different(other.instances.masks, first.instances.masks) < 0.01
        torch.testing.assert_close(other.instances.scores, first.instances.scores, rtol=0, atol=0.01)


class FirstChannels(nn.Module):
    """Laterals that hand the first channels on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, level[:, :4]) for name, level in maps.items())


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_features_lie_where_the_image_says(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = make(kind)
    adapter: Any = adapt(model)
    larger = processor(kind, size={"shortest_edge": 150, "longest_edge": 230})
    monkeypatch.setattr(adapter, "_processor", larger)
    mean, std = (torch.tensor(value)[:, None, None] for value in (larger.image_mean, larger.image_std))
    widths = [8, 16, 32, 64] if "former" in kind else [8, 16, 24, 32]
    backbone: Any = adapter.backbone

    def painted(pixel_values: Tensor, *args: Any) -> Any:
        pixels = pixel_values * std + mean
        maps = [cases.pooled(pixels, (s,), w)[0] for s, w in zip((4, 8, 16, 32), widths, strict=True)]
        if kind in DETRS:
            return [(level, torch.ones_like(level[:, 0]).bool()) for level in maps]
        return transformers.modeling_outputs.BackboneOutput(feature_maps=tuple(maps))

    monkeypatch.setattr(backbone, "forward", painted)
    adapter.laterals = FirstChannels()
    sizes = [(97, 131), (203, 117), (150, 230)]
    images = [cases.position_image(height, width) for height, width in sizes]
    cases.check_pattern(adapter.detect(images), tolerance=0.1)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_post_processing_is_the_processor_own(kind: str):
    """With a refiner that changes nothing, on an input on which the processor has nothing to cut off."""
    model, refined = identity(kind)
    side = 384 if kind == "mask2former" else 128  # the processor resizes to 384 first
    images = torch.stack([cases.random_scene(side, side, seed) for seed in range(2)])
    with torch.no_grad():
        plain, output = model(images), refined(images)
    targets = [(side, side), (side, side)]
    options: dict[str, Any] = {"threshold": 0.0, "target_sizes": targets}
    expected = processor(kind).post_process_instance_segmentation(plain, **options)
    found = refined.post_process_instance_segmentation(output, **options)
    assert type(output) is type(plain)
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs.keys() == ours.keys() and len(theirs["segments_info"]) > 0
        for a, b in zip(theirs["segments_info"], ours["segments_info"], strict=True):
            assert {**a, "score": 0} == {**b, "score": 0} and abs(a["score"] - b["score"]) < 0.02
        maps = theirs["segmentation"], ours["segmentation"]
        assert maps[0].shape == maps[1].shape and maps[0].dtype == maps[1].dtype
        # MaskFormer's processor takes each cell of a mask map, of four pixels, as a whole.
        outline = torch.zeros((1, side, side), dtype=torch.bool)
        for segment in maps[0].unique():
            here = (maps[0] == segment)[None]
            for _ in range({"maskformer": 4}.get(kind, 1)):
                outline |= dilate(here) & dilate(~here)
                here = here & ~dilate(~here)
        wrong = (maps[0] != maps[1])[None]
        assert not (wrong & ~outline).any()
        if kind != "maskformer":
            assert wrong.float().mean() < 1e-4


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_post_processing_cuts_padding_off(kind: str):
    """Each image of a padded batch is shown in its own size, where the processor would squeeze the padding in."""
    _, refined = identity(kind)
    images = [cases.random_scene(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    with torch.no_grad():
        output, pixel_mask = call(kind, refined, images)
    sizes = [(int(inside.any(1).sum()), int(inside.any(0).sum())) for inside in pixel_mask.bool()]
    assert output.image_sizes == sizes and len(set(sizes)) == 2
    shown = refined.post_process_instance_segmentation(output, threshold=0.0)
    assert [tuple(one["segmentation"].shape) for one in shown] == sizes
    doubled = [(2 * height, 2 * width) for height, width in sizes]
    enlarged = refined.post_process_instance_segmentation(output, threshold=0.0, target_sizes=torch.tensor(doubled))
    for one, large in zip(shown, enlarged, strict=True):
        differ = one["segmentation"] != large["segmentation"][::2, ::2]
        assert tuple(large["segmentation"].shape) in doubled and float(differ.float().mean()) < 0.05
    if kind == "mask2former":
        binary = refined.post_process_instance_segmentation(output, threshold=0.0, return_binary_maps=True)
        for one, result in zip(binary, results(kind, (output, pixel_mask)), strict=True):
            own = {mask.numpy().tobytes() for mask in result["masks"]}
            assert {mask.bool().numpy().tobytes() for mask in one["segmentation"]} == own


def test_what_the_processor_shows_is_refined_whatever_it_scores():
    """Conditional DETR scores by a sigmoid, but its processor shows masks by a softmax."""
    model: Any = make("conditional")
    head = model.conditional_detr.class_labels_classifier
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([-5.0, -8.0, -8.0]))
    adapter: Any = adapt(model)
    image = cases.random_scene(*SIZES[0])
    assert len(adapter.detect([image])[0]) == 0
    refined: Any = cases.wrapped(adapter, cases.eventful_refiner(adapter))
    with torch.no_grad():
        before, after = call("conditional", model, [image]), call("conditional", refined, [image])
    shown = refined.post_process_instance_segmentation(after[0], 0.5)
    assert len(shown[0]["segments_info"]) > 0
    masks = results("conditional", before)[0]["masks"], results("conditional", after)[0]["masks"]
    assert (masks[0] != masks[1]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_without_an_instance(kind: str):
    _, refined = identity(kind)
    adapter = refined.adapter
    adapter.score_threshold = 1.0
    (prediction,) = adapter.detect([cases.random_scene(*SIZES[0])])
    assert len(prediction) == 0 and prediction.instances.masks.shape == (0, *SIZES[0])
    with torch.no_grad():
        output, _ = call(kind, refined, [cases.random_scene(*SIZES[0])])
    shown = refined.post_process_instance_segmentation(output, threshold=1.0, target_sizes=[SIZES[0]])
    assert shown[0]["segments_info"] == [] and tuple(shown[0]["segmentation"].shape) == SIZES[0]


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_half_precision(kind: str):
    model = make(kind)
    adapter: Any = adapt(model)
    refined: Any = cases.wrapped(adapter, cases.eventful_refiner(adapter)).to(torch.bfloat16)
    image = cases.random_scene(*SIZES[0])
    with torch.no_grad():
        output, _ = call(kind, refined, [image])
    logits = output[mask_field(kind)]
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())
    (prediction,) = adapter.detect([image])
    assert prediction.instances.masks.dtype == torch.float32 and len(prediction) == QUERIES


def test_refiner_on_the_image_sees_the_image(monkeypatch: pytest.MonkeyPatch):
    model = make("detr")
    refined: Any = adapt(model).with_refiner(Refiner(eventful_model(encoder_config())), options=cases.LEFT_ALONE)
    images = [cases.random_scene(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    seen: list[Tensor] = []
    refine = refined.refine

    def spy(predictions: Any, given: list[Tensor]) -> Any:
        seen.extend(given)
        return refine(predictions, given)

    monkeypatch.setattr(refined, "refine", spy)
    with torch.no_grad():
        output, _ = call("detr", refined, images)
        plain, _ = call("detr", model, images)
    for image, given, size in zip(images, seen, output.image_sizes, strict=True):
        assert tuple(given.shape) == (3, *size)
        resized = processor("detr")(image, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0]
        torch.testing.assert_close(given, resized.clamp(0, 1), rtol=0, atol=1e-5)
    enlarged = F.interpolate(plain.pred_masks.sigmoid(), output.pred_masks.shape[2:], mode="bilinear") >= 0.5
    assert ((output.pred_masks >= 0) != enlarged).any()
    with pytest.raises(InvalidInputError, match="got one with an image encoder: make one with"):
        train_call("detr", refined.train(), *TWO_AND_ONE)


def square_masks(image: Any, boxes: Tensor) -> np.ndarray:
    """Masks that fill their boxes, as an array."""
    height, width = image.shape[1:]
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, box in zip(masks, boxes.round().int().clamp(min=0).tolist(), strict=True):
        mask[box[1] : max(box[3], box[1] + 1), box[0] : max(box[2], box[0] + 1)] = 1
    return masks


@pytest.mark.parametrize("kind", BOX_KINDS)
def test_detectors_of_boxes_take_masks_from_elsewhere(kind: str):
    model = make(kind)
    adapter: Any = adapt(model)
    adapter.score_threshold = 0.0
    image = cases.random_scene(*SIZES[0])
    (prediction,) = adapter.detect([image], masks=square_masks)
    inputs = processor(kind)(image, return_tensors="pt", do_rescale=False)
    with torch.no_grad():
        output = model(**inputs)
    (expected,) = processor(kind).post_process_object_detection(output, threshold=0.0, target_sizes=[SIZES[0]])
    instances = prediction.instances
    assert len(instances) == QUERIES and prediction.features is None
    # The processor lists the best pairs of a query and a class, so that not every query need be among them.
    best = expected["scores"].argmax()
    own = torch.cat([instances.boxes, 100 * cast(Tensor, instances.scores)[:, None]], dim=1)
    distance = own - torch.cat([expected["boxes"][best], 100 * expected["scores"][best, None]])
    assert float(distance.abs().amax(dim=1).min()) < 1e-3
    assert torch.equal(instances.masks, torch.from_numpy(square_masks(image, instances.boxes)).bool())
    refiner = Refiner(RefinerModel(encoder_config()))
    assert len(refiner.refine_batch([image], [instances])[0]) == QUERIES

    with pytest.raises(InvalidInputError, match="has boxes but no masks; pass masks=, a function"):
        adapter.detect([image])
    with pytest.raises(InvalidInputError, match=r"has boxes but no masks to refine; .*detect\(images, masks="):
        adapter.with_refiner(refiner)
    with pytest.raises(InvalidInputError, match="has boxes but no features"):
        adapter.config()


def test_what_cannot_be_used_is_refused():
    model = make("detr")
    adapter: Any = adapt(model)
    image = cases.random_scene(*SIZES[0])
    with pytest.raises(InvalidInputError, match="masks=None for DetrForSegmentation, which predicts masks itself"):
        adapter.detect([image], masks=square_masks)
    with pytest.raises(InvalidInputError, match=r"expected one of DetrForSegmentation, .*, got ResNetModel"):
        adapt(transformers.ResNetModel(resnet(4)))
    refined: Any = cases.wrapped(adapter, cases.refiner_for(adapter))
    with pytest.raises(InvalidInputError, match="leave out return_dict=False"):
        refined(image[None], return_dict=False)
    with torch.no_grad():
        plain, output = model(image[None]), refined(image[None])
    with pytest.raises(InvalidInputError, match="expected outputs of this module"):
        refined.post_process_instance_segmentation(plain)
    with pytest.raises(InvalidInputError, match="a target size for each of 1 images, got 2"):
        refined.post_process_instance_segmentation(output, target_sizes=[(8, 8), (8, 8)])


def test_processor_is_found_or_asked_for(tmp_path: Path):
    model: Any = make("detr")
    assert Adapter(model).processor.size["shortest_edge"] == 800
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(InvalidInputError, match=r"got none: pass TransformersAdapter\(model, processor\)"):
        Adapter(model).processor  # noqa: B018
    processor("detr").save_pretrained(tmp_path)
    assert Adapter(model).processor.size["shortest_edge"] == 76
    given = processor("detr")
    assert Adapter(model, given).processor is given
