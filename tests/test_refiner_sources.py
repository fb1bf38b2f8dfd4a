"""Where the façade takes its features from: an image, encoded in one of two ways, batches of images, or a detector."""

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import discs, encoder_config, eventful_model, random_image, random_pyramid, small_config
from torch import Tensor

from transfiner_refine import FeaturePyramid, Instances, InvalidInputError, RefineOptions, Refiner
from transfiner_refine.inputs import boxes_from_masks

H, W = 90, 120
CIRCLES = [(40.0, 45.0, 25.0), (85.0, 50.0, 18.0), (104.0, 18.0, 12.0)]
FREE = RefineOptions(keep_if_iou_below=0.0)


@pytest.fixture(scope="module")
def on_features() -> Refiner:
    return Refiner(eventful_model(small_config()))


@pytest.fixture(scope="module")
def on_images() -> Refiner:
    return Refiner(eventful_model(encoder_config(depth=2)))


@pytest.fixture
def masks() -> Tensor:
    return discs(H, W, CIRCLES)


def probs_of(out: Instances) -> Tensor:
    assert out.probs is not None
    return out.probs


class TestEncoding:
    def test_auto_takes_the_cheaper_way(self, on_images: Refiner):
        """Three instances of a small image need more pixels as crops; one of a large image needs fewer."""
        for size, circles, cheaper in (((H, W), CIRCLES, "image"), ((300, 400), [(150.0, 140.0, 60.0)], "crops")):
            image, coarse = random_image(*size), discs(*size, circles)
            results = {
                way: probs_of(on_images.refine(image, masks=coarse, options=replace(FREE, encode=way)))
                for way in ("auto", "image", "crops")
            }
            assert torch.equal(results["auto"], results[cheaper])
            assert not torch.equal(results["image"], results["crops"])

    def test_a_whole_image_is_encoded_once(self, on_images: Refiner, masks: Tensor):
        shapes: list[tuple[int, ...]] = []
        encoder = on_images.model.image_encoder
        assert encoder is not None
        handle = encoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
        many, image = torch.cat([masks] * 3), random_image(H, W)
        on_images.refine(image, masks=many, options=RefineOptions(encode="image", token_budget=4096))
        on_images.refine(image, masks=many, options=RefineOptions(encode="crops", token_budget=4096))
        on_images.refine(image, masks=many, options=RefineOptions(encode="crops", token_budget=1 << 30))
        handle.remove()
        crops = [4, 4, 1, 6, 3]  # what fits into the budget, but no more than a CPU likes
        assert shapes == [(1, 3, 2 * H, 2 * W)] + [(n, 3, 256, 256) for n in crops]  # at most twice its size

    def test_a_large_image_is_encoded_within_bounds(self, on_images: Refiner):
        """The median RoI asks for 216 pixels, the bound of 2048 for less."""
        encoder = on_images.model.image_encoder
        shapes: list[tuple[int, ...]] = []
        assert encoder is not None
        handle = encoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
        image, coarse = np.zeros((40, 4096, 3), np.uint8), discs(40, 4096, [(2000.0, 20.0, 18.0)])
        out = on_images.refine(image, masks=coarse, options=replace(FREE, encode="image"))
        handle.remove()
        assert shapes == [(1, 3, 20, 2048)] and len(out) == 1

    def test_the_encoder_s_own_features_may_be_passed(self, on_images: Refiner):
        """A RoI of 216 pixels is encoded at the image's own scale, so both ways see the same features."""
        size = (280, 300)
        image = random_image(*size)
        coarse = discs(*size, [(150.0, 140.0, 80.0)])
        boxes = torch.tensor([[150 - 86.4, 140 - 86.4, 150 + 86.4, 140 + 86.4]])
        assert on_images.model.image_encoder is not None
        with torch.no_grad():
            features = on_images.model.image_encoder(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        expected = on_images.refine(image, masks=coarse, boxes=boxes, options=replace(FREE, encode="image"))
        out = on_images.refine(features=features, image_size=size, masks=coarse, boxes=boxes, options=FREE)
        torch.testing.assert_close(probs_of(out), probs_of(expected), rtol=0, atol=1e-4)
        assert (out.masks != coarse).any()

    @pytest.mark.parametrize("circle", [(100.0, 80.0, 44.0), (106.0, 80.0, 50.0), (100.0, 80.0, 58.0)])
    def test_the_embedded_model_finds_a_plain_outline_both_ways(self, circle: tuple[float, float, float]):
        """A bright disc; the coarse mask is too small, beside it, or too large."""
        refiner = Refiner.from_pretrained()
        truth, coarse = discs(160, 200, [(100.0, 80.0, 50.0)]), discs(160, 200, [circle])
        noise = random_image(160, 200) // 4
        image = np.where(truth[0].numpy()[:, :, None], noise + np.uint8(150), noise + np.uint8(30))
        of_image, of_crop = (
            refiner.refine(image, masks=coarse, options=RefineOptions(encode=way)).masks for way in ("image", "crops")
        )
        assert iou(coarse, truth) < 0.87
        assert min(iou(of_image, truth), iou(of_crop, truth), iou(of_image, of_crop)) > 0.92


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


class TestBatches:
    @pytest.fixture
    def batch(self) -> tuple[list[np.ndarray], list[Instances]]:
        """Four images of three sizes: alone, the second is best encoded as crops; the third has no instances."""
        sizes = [(H, W), (200, 260), (50, 50), (H, W)]
        circles = [CIRCLES, [(130.0, 100.0, 60.0)], [], CIRCLES[:2]]
        instances = []
        for number, (size, of_image) in enumerate(zip(sizes, circles, strict=True)):
            masks = discs(*size, of_image) if of_image else torch.zeros(0, *size, dtype=torch.bool)
            count = len(masks)
            scores, labels = torch.rand(count), torch.full((count,), number)
            instances.append(Instances(boxes_from_masks(masks), masks, size, scores=scores, labels=labels))
        return [random_image(*size, seed=number) for number, size in enumerate(sizes)], instances

    @pytest.mark.parametrize("encode", ["auto", "crops"])
    def test_equals_one_by_one(self, on_images: Refiner, batch: tuple, encode: Any):
        images, instances = batch
        options = replace(FREE, encode=encode, token_budget=2048)  # two instances a group, of two images at times
        outs = on_images.refine_batch(images, instances, options=options)
        assert len(outs) == 4
        for image, given, out in zip(images, instances, outs, strict=True):
            single = on_images.refine(
                image, boxes=given.boxes, masks=given.masks, labels=given.labels, scores=given.scores, options=options
            )
            torch.testing.assert_close(probs_of(out), probs_of(single), rtol=0, atol=1e-4)
            for name in ("masks", "boxes", "labels", "scores", "rois", "kept_coarse"):
                assert torch.equal(getattr(out, name), getattr(single, name)), name
            assert len(given) == 0 or (out.masks != given.masks).any()

    def test_details_of_each_image(self, on_images: Refiner, batch: tuple):
        options = replace(FREE, return_quadtree=True, encode="crops")
        for out in on_images.refine_batch(*batch, options=options):
            assert out.details is not None and len(out.details) == len(out)
            roots = out.details.quadtree[0].roi.unique().tolist() if len(out) else []
            assert roots == list(range(len(out)))

    def test_the_features_of_one_image_are_held_at_a_time(self, on_images: Refiner, masks: Tensor):
        """And of the one before, while its successor is encoded."""
        encoder = on_images.model.image_encoder
        held: list[weakref.ref] = []
        counts: list[int] = []

        def note(module: torch.nn.Module, args: tuple, output: FeaturePyramid) -> None:
            counts.append(sum(ref() is not None for ref in held))
            held.append(weakref.ref(output.maps[0]))

        assert encoder is not None
        handle = encoder.register_forward_hook(note)
        coarse = Instances(boxes_from_masks(masks), masks, (H, W))
        on_images.refine_batch([random_image(H, W)] * 4, [coarse] * 4, options=RefineOptions(encode="image"))
        handle.remove()
        assert len(counts) == 4 and max(counts) <= 1

    def test_an_empty_batch(self, on_images: Refiner):
        assert on_images.refine_batch([], []) == []

    def test_lists_of_unequal_length(self, on_images: Refiner, batch: tuple):
        with pytest.raises(InvalidInputError, match="one Instances per image, got 3 images and 4 Instances"):
            on_images.refine_batch(batch[0][:3], batch[1])

    def test_lists_in_another_order(self, on_images: Refiner, batch: tuple):
        with pytest.raises(InvalidInputError, match=r"image size \(200, 260\), got \(90, 120\): .*same order"):
            on_images.refine_batch(batch[0][1:2], batch[1][:1])


class TestFeatures:
    def refine(self, refiner: Refiner, masks: Any, **changes) -> Instances:
        values = {"features": random_pyramid(H, W), "image_size": (H, W), "masks": masks, "options": FREE}
        return refiner.refine(**(values | changes))

    def test_scale_and_origin_place_the_image_in_the_network_s_input(self, on_features: Refiner):
        """The same RoI of the network, reached from an image twice as small that starts at (8, 4)."""
        probs = torch.rand(2, 28, 28)
        network = torch.tensor([[20.0, 20.0, 60.0, 70.0], [50.0, 10.0, 110.0, 80.0]])
        in_network = {"masks": probs, "mask_frame": "box"}
        expected = self.refine(on_features, **in_network, boxes=network)
        origin, scale = torch.tensor([[8.0, 4.0]]), torch.tensor([[2.0, 2.0]])
        features = replace(random_pyramid(H, W), scale=scale, origin=origin)
        boxes = network / 2 + origin.repeat(1, 2)
        out = self.refine(on_features, **in_network, boxes=boxes, features=features, image_size=(49, 68))
        torch.testing.assert_close(probs_of(out), probs_of(expected), rtol=0, atol=1e-4)
        other = self.refine(on_features, **in_network, boxes=boxes, image_size=(49, 68))
        assert (probs_of(other) - probs_of(expected)).abs().max() > 0.01

    def test_the_features_count(self, on_features: Refiner, masks: Tensor):
        out = self.refine(on_features, masks)
        other = self.refine(on_features, masks, features=random_pyramid(H, W, seed=1))
        assert not torch.equal(out.masks, other.masks)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (random_pyramid(H, W, channels=4), "8 channels at strides .* got 4 channels .* trained on this detector"),
            (random_pyramid(H, W, strides=(4, 8, 16)), r"strides \(4, 8, 16, 32\), got 8 channels .* \(4, 8, 16\)"),
            (random_pyramid(H, W, strides=(2, 4, 8, 16)), r"got 8 channels at strides \(2, 4, 8, 16\)"),
            (replace(random_pyramid(H, W), source="torchvision"), "'detector', got features of 'torchvision'"),
            (random_pyramid(H, W, batch=2), "one image, got a batch of 2"),
        ],
    )
    def test_features_that_do_not_fit(
        self, on_features: Refiner, masks: Tensor, features: FeaturePyramid, message: str
    ):
        with pytest.raises(InvalidInputError, match=message):
            self.refine(on_features, masks, features=features)

    def test_a_detector_s_features_for_a_refiner_of_images(self, on_images: Refiner, masks: Tensor):
        features = random_pyramid(H, W, strides=(2, 4, 8, 16, 32))
        with pytest.raises(InvalidInputError, match=r"'image_encoder', got features of 'detector'.*pass the image"):
            self.refine(on_images, masks, features=features)

    def test_an_image_for_a_refiner_of_features(self, on_features: Refiner, masks: Tensor):
        image = random_image(H, W)
        with pytest.raises(InvalidInputError, match=r"features of 'detector', got an image.*pass features="):
            on_features.refine(image, masks=masks)
        with pytest.raises(InvalidInputError, match="no image encoder"):
            on_features.refine_batch([image], [Instances(boxes_from_masks(masks), masks, (H, W))])

    def test_the_size_of_the_image_is_needed(self, on_features: Refiner, masks: Tensor):
        with pytest.raises(InvalidInputError, match=r"image_size=\(H, W\) with features, got None"):
            self.refine(on_features, masks, image_size=None)
        with pytest.raises(InvalidInputError, match=r"masks of shape \(N, 120, 90\) as the image"):
            self.refine(on_features, masks, image_size=(W, H))


class TestPrecision:
    def test_bfloat16_is_close(self, masks: Tensor):
        model = eventful_model(small_config())
        expected = Refiner(model).refine(features=random_pyramid(H, W), image_size=(H, W), masks=masks, options=FREE)
        refiner = Refiner(eventful_model(small_config()).to(torch.bfloat16))
        assert refiner.dtype == torch.bfloat16
        out = refiner.refine(features=random_pyramid(H, W), image_size=(H, W), masks=masks, options=FREE)
        assert probs_of(out).dtype == torch.float32
        iou = (out.masks & expected.masks).sum((1, 2)) / (out.masks | expected.masks).sum((1, 2))
        assert (iou > 0.95).all() and not torch.equal(probs_of(out), probs_of(expected)), iou

    @pytest.mark.parametrize("encode", ["image", "crops"])
    def test_bfloat16_from_an_image(self, masks: Tensor, encode: Any):
        refiner = Refiner(eventful_model(encoder_config(depth=2)).to(torch.bfloat16))
        out = refiner.refine(random_image(H, W), masks=masks, options=replace(FREE, encode=encode))
        assert (out.masks != masks).any() and probs_of(out).isfinite().all()


class TestErrors:
    def refine(self, refiner: Refiner, **changes) -> Instances:
        return refiner.refine(**({"features": random_pyramid(H, W), "image_size": (H, W)} | changes))

    def test_neither_image_nor_features(self, on_features: Refiner, masks: Tensor):
        with pytest.raises(InvalidInputError, match="an image or features, got neither"):
            on_features.refine(masks=masks)

    def test_no_masks(self, on_features: Refiner):
        with pytest.raises(InvalidInputError, match="masks to refine, got None"):
            self.refine(on_features, boxes=np.zeros((0, 4)))

    def test_masks_in_the_box_frame_need_boxes(self, on_features: Refiner):
        with pytest.raises(InvalidInputError, match='boxes with mask_frame="box", got None'):
            self.refine(on_features, masks=np.zeros((1, 28, 28)), mask_frame="box")

    def test_another_number_of_boxes(self, on_features: Refiner, masks: Tensor):
        with pytest.raises(InvalidInputError, match="one box per mask, got 2 boxes and 3 masks"):
            self.refine(on_features, masks=masks, boxes=boxes_from_masks(masks)[:2])

    def test_another_number_of_labels_or_scores(self, on_features: Refiner, masks: Tensor):
        for name in ("labels", "scores"):
            with pytest.raises(InvalidInputError, match=name):
                self.refine(on_features, masks=masks, **{name: [1, 2]})

    def test_boxes_without_area_are_named(self, on_features: Refiner, masks: Tensor):
        boxes = boxes_from_masks(masks)
        boxes[1, 2] = boxes[1, 0]
        with pytest.raises(InvalidInputError, match=r"without area at index \[1\]"):
            self.refine(on_features, masks=masks, boxes=boxes)

    def test_a_depth_beyond_the_model(self, on_images: Refiner, masks: Tensor):
        with pytest.raises(InvalidInputError, match="at most 2, the model's, got 3"):
            on_images.refine(random_image(H, W), masks=masks, options=RefineOptions(depth=3))

    @pytest.mark.parametrize(
        "values",
        [
            {"depth": 5},
            {"token_budget": 0},
            {"max_nodes": 0},
            {"mask_threshold": 1.0},
            {"mask_threshold": float("nan")},
            {"incoherence_threshold": -0.1},
            {"incoherence_threshold": float("nan")},
            {"keep_if_iou_below": 1.1},
            {"encode": "tiles"},
            {"depth": True},
            {"passes": 1.5},
            {"token_budget": "16384"},
            {"max_nodes": 2.0},
            {"box_margin": "0.1"},
            {"mask_threshold": "0.5"},
            {"incoherence_threshold": None},
            {"keep_if_iou_below": False},
            {"keep_if_gain_below": float("nan")},
            {"align_pixels": "no"},
            {"return_quadtree": 1},
        ],
    )
    def test_options_out_of_range(self, values: dict):
        with pytest.raises(InvalidInputError, match=next(iter(values))):
            RefineOptions(**values)

    def test_options_of_numpy(self):
        values: dict[str, Any] = {
            "depth": np.int64(2),
            "mask_threshold": np.float32(0.5),
            "align_pixels": np.bool_(False),
        }
        options = RefineOptions(**values)
        assert options == RefineOptions(depth=2, mask_threshold=0.5, align_pixels=False)
        assert [type(getattr(options, name)) for name in values] == [int, float, bool]
