"""What all adapters share: choosing one, checking a refiner, leaving the host alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapter_cases as cases
import numpy as np
import pytest
import torch
from made_up_host import CIRCLES, MadeUp, adapter
from small_models import discs, encoder_config, eventful_model
from torch import Tensor, nn

from transfiner_refine import (
    Instances,
    InvalidInputError,
    MissingDependencyError,
    Refiner,
    WeightsError,
)
from transfiner_refine.adapters import adapt
from transfiner_refine.adapters.protocol import (
    Prediction,
    as_images,
    evaluating,
    missing_dependency,
    recording,
)
from transfiner_refine.inputs import boxes_from_masks


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))


class TestAdapt:
    @pytest.mark.parametrize("host", ["detectron2", "mmdet", "transformers"])
    def test_a_missing_framework_is_named(self, host: str, uninstall: Callable[..., None]):
        uninstall(host, f"transfiner_refine.adapters.{host}")
        model = type("Detector", (nn.Module,), {"__module__": f"{host}.models.detectors"})()
        with pytest.raises(
            MissingDependencyError, match=r"(?i)expected (Detectron2|MMDetection|transformers).*install"
        ):
            adapt(model)

    def test_only_the_framework_of_the_type_is_imported(self, monkeypatch: pytest.MonkeyPatch):
        wanted: list[str] = []
        module = type("module", (), {"TransformersAdapter": lambda model: ("adapted", model)})
        monkeypatch.setattr("transfiner_refine.adapters.import_module", lambda name: wanted.append(name) or module)
        parent = type("Parent", (nn.Module,), {"__module__": "transformers.models.detr.modeling_detr"})
        model = type("Mine", (parent,), {"__module__": "torchvision_helpers"})()
        assert adapt(model) == ("adapted", model)
        assert wanted == ["transfiner_refine.adapters.transformers"]

    def test_unknown_types_are_refused(self):
        with pytest.raises(InvalidInputError, match=r"got Linear of torch\.nn\.modules\.linear: refine its boxes"):
            adapt(nn.Linear(1, 1))
        with pytest.raises(InvalidInputError, match=r"got DataParallel .* pass the detector inside of it.*\.module"):
            adapt(nn.DataParallel(nn.Linear(1, 1)))

    @pytest.mark.filterwarnings("ignore:.*torch.jit.*")
    def test_a_scripted_model_is_refused(self):
        with pytest.raises(InvalidInputError, match="got a torchscripted one: adapt it before it is scripted"):
            adapt(torch.jit.script(nn.ReLU()))


class TestPredictionAndImages:
    def test_parts_of_one_length(self):
        masks = discs(64, 96, CIRCLES)
        instances = Instances(boxes_from_masks(masks), masks, (64, 96))
        for name in ("indices", "box_probs", "mask_logits"):
            parts: dict[str, Any] = {"indices": torch.arange(2), name: torch.zeros(3, 28, 28)}
            with pytest.raises(InvalidInputError, match=f"expected {name} of 2 instances, got 3"):
                Prediction(instances, **parts)

    def test_a_list_of_images(self):
        array = np.zeros((4, 6, 3), np.uint8)
        for images in ([array, array], (torch.zeros(3, 4, 6),) * 2, torch.zeros(2, 3, 4, 6)):
            assert [image.shape for image in as_images(images)] == [(3, 4, 6)] * 2
        for single in (array, torch.zeros(3, 4, 6), "photo.jpg", 5):
            with pytest.raises(InvalidInputError, match=r"a list of images, got .*put a single image into a list"):
                as_images(single)


class TestHostModelsAreLeftAsTheyWere:
    def test_recording(self):
        model = MadeUp().eval()
        with pytest.raises(ZeroDivisionError), recording(stem=model.backbone, head=model.head) as calls:
            maps = model(torch.rand(1, 3, 32, 32))
            raise ZeroDivisionError
        assert set(calls) == {"stem"} and calls["stem"].args[0].shape == (1, 3, 32, 32)
        torch.testing.assert_close(nn.functional.avg_pool2d(calls["stem"].output, 4), maps[0])
        assert not model.backbone._forward_hooks and not model.head._forward_hooks

    def test_recording_hears_its_own_thread_alone(self):
        model = MadeUp().eval()
        with ThreadPoolExecutor(1) as pool, recording(stem=model.backbone) as calls:
            model(torch.zeros(1, 3, 32, 32))
            pool.submit(model, torch.ones(1, 3, 64, 64)).result()
        assert calls["stem"].args[0].shape == (1, 3, 32, 32)

    def test_a_recording_that_ends_while_another_thread_calls(self):
        """Torch lists the hooks first, and looks up whether one wants keyword arguments when it comes to it."""
        model = nn.Identity()
        with recording(model=model):
            (hook,) = model._forward_hooks.values()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(hook, model, (torch.zeros(1),), torch.zeros(1)).result()

    def test_recordings_of_many_threads(self):
        model = nn.Identity()

        def record(number: int) -> bool:
            given = torch.full((1,), number)
            with recording(model=model) as calls:
                model(given)
            return calls["model"].output is given

        with cases.frequent_switches(), ThreadPoolExecutor(4) as pool:
            assert all(pool.map(record, range(2000)))
        assert not model._forward_hooks

    def test_evaluating(self):
        model = MadeUp().train()
        model.backbone[1].eval()
        with pytest.raises(ZeroDivisionError), evaluating(model):
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert model.training and model.backbone.training and not model.backbone[1].training
        assert torch.is_grad_enabled()

    def test_detach_twice_and_a_second_refiner(self):
        host = adapter()
        host.model.get_submodule("head").requires_grad_(False)
        before = cases.state_of(host.model)[1]
        host.with_refiner(cases.refiner_for(host), train="refiner").train()
        host.with_refiner(cases.refiner_for(host), train="heads")
        host.detach()
        host.detach()
        assert cases.state_of(host.model)[1] == before


class TestFingerprint:
    def test_says_which_weights(self):
        first = adapter().fingerprint
        assert len(first) == 64 and first == adapter().fingerprint != adapter(1).fingerprint

    def test_of_weights_buffers_and_dtypes_and_nothing_else(self):
        host = adapter()
        first = host.fingerprint
        host.model.requires_grad_(False).train()
        assert host.fingerprint == first
        host.model.get_buffer("backbone.1.running_mean")[0] += 1
        second = host.fingerprint
        host.model.bfloat16()
        assert len({first, second, host.fingerprint}) == 3


class TestTheRefinerHasToFit:
    @pytest.mark.parametrize(
        ("changes", "message", "can_be_overridden"),
        [
            ({"feature_channels": 16}, r"8 channels at strides \(4, 8, 16, 32\).*got one for 16 channels", False),
            ({"strides": (8, 16)}, r"got one for 8 channels at strides \(8, 16\)", False),
            (
                {"feature_source": "torchvision:MaskRCNN"},
                "of 'made_up:MadeUp', got one for 'torchvision:MaskRCNN'",
                True,
            ),
            ({"feature_fingerprint": 64 * "0"}, f"SHA-256 {64 * '0'}, got a detector of [0-9a-f]+: load those", True),
        ],
    )
    def test_or_is_refused(self, changes: dict[str, Any], message: str, can_be_overridden: bool, image: Tensor):
        host = adapter()
        refiner = cases.refiner_for(host, **changes)
        with pytest.raises(InvalidInputError, match=message):
            host.with_refiner(refiner)
        if can_be_overridden:
            host.with_refiner(refiner, check_source=False)([image])
        else:
            with pytest.raises(InvalidInputError, match=message):
                host.with_refiner(refiner, check_source=False)

    def test_one_with_an_image_encoder_fits_everywhere(self, image: Tensor):
        host = adapter()
        (masks,) = host.with_refiner(Refiner(eventful_model(encoder_config(depth=1))), options=cases.LEFT_ALONE)(
            [image]
        )
        assert (masks ^ discs(64, 96, CIRCLES)).flatten(1).any(dim=1).all()

    def test_what_is_no_refiner(self):
        host = adapter()
        refiner: Any = cases.refiner_for(host).model
        with pytest.raises(InvalidInputError, match=r"got RefinerModel: wrap it in Refiner\(\.\.\.\)"):
            host.with_refiner(refiner)
        nothing: Any = None
        with pytest.raises(InvalidInputError, match=r"a directory or a Hub id, got NoneType: pass Refiner\.from_pre"):
            host.with_refiner(nothing)

    def test_a_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The refiner comes from where ``Refiner.from_pretrained`` finds it, without what lies beside it."""
        host = adapter(with_laterals=True)
        cases.refiner_for(host).save_pretrained(tmp_path)
        find = "transfiner_refine.adapters.protocol.find_model"
        monkeypatch.setattr(find, lambda name: {"org/name": tmp_path}[name])
        model = adapter().with_refiner("org/name")
        expected = cases.refiner_for(host).model.half().float().state_dict()
        for name, value in model.refiner_model.state_dict().items():
            assert torch.equal(value, expected[name])
        with pytest.raises(WeightsError, match=r"expected laterals.safetensors .* got 'org/name', a Hub id"):
            host.with_refiner("org/name")
        (tmp_path / "detector.safetensors").unlink(missing_ok=True)
        monkeypatch.undo()
        with pytest.raises(WeightsError, match="there is no such directory"):
            host.with_refiner(tmp_path / "gone")

    @pytest.mark.parametrize("changes", [{"train": "backbone"}, {"max_rois": 0}])
    def test_options_in_range(self, changes: dict[str, Any]):
        host = adapter()
        with pytest.raises(InvalidInputError, match=f"expected {next(iter(changes))}"):
            host.with_refiner(cases.refiner_for(host), **changes)


def test_the_message_of_a_missing_framework():
    assert str(missing_dependency("a host", "pip install it")).endswith("which is not installed: pip install it")
