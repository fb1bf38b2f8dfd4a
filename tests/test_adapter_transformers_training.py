"""Joint training of a query model of Hugging Face transformers and its refiner, on tiny models."""

from __future__ import annotations

import adapter_cases as cases
import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import (
    CLASSES,
    DETRS,
    MASK_KINDS,
    TWO_AND_ONE,
    class_field,
    identity,
    make,
    mask_field,
    small_adapter,
    train_call,
    training_input,
)
from torch import Tensor

from transfiner_refine.adapters import adapt
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.types import FeaturePyramid


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfiner_refine.adapters.transformers.TransformersAdapter", small_adapter)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_loss_is_the_host_own_and_the_refiner_s(kind: str):
    model, refined = identity(kind)
    plain, _ = train_call(kind, model.train(), *TWO_AND_ONE)
    output, losses = train_call(kind, refined.train(), *TWO_AND_ONE)
    assert type(output) is type(plain) and output[mask_field(kind)].shape == plain[mask_field(kind)].shape
    added = losses["loss_refine"] + losses["loss_incoherence"]
    torch.testing.assert_close(output.loss, plain.loss + added)
    assert added.item() > 0 and output.loss_dict["loss_refine"] is losses["loss_refine"]
    with torch.no_grad():
        evaluated, again = train_call(kind, refined.eval(), *TWO_AND_ONE)
    assert evaluated.loss.isfinite() and "loss_refine" in again
    assert evaluated[mask_field(kind)].shape[2:] == (96, 128)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_matched_queries_are_trained_on_their_instance(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The host's labels name, in an order of their own, what some queries predict; the last instance nobody found."""
    model, refined = identity(kind)
    if kind in DETRS:  # boxes or masks say which query is meant
        model.config.class_cost = 0
    else:
        model.criterion.matcher.cost_class = 0.0
    refined.train()
    inputs = training_input(kind, *TWO_AND_ONE)
    with torch.no_grad():
        output = model(inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
    queries = [[2, 0], [1]]
    sizes = [(96, 128), (80, 100)]
    found, masks = [], []
    for index, (chosen, (height, width)) in enumerate(zip(queries, sizes, strict=True)):
        logits = F.interpolate(output[mask_field(kind)][index][None].float(), (96, 128), mode="bilinear")[0]
        if kind in DETRS:
            probs = F.interpolate(output.pred_masks[index][None].sigmoid(), (96, 128), mode="bilinear")[0]
        else:
            probs = logits.sigmoid()
        found.append(probs[chosen, :height, :width])
        truth = torch.zeros((len(chosen), 96, 128), dtype=torch.bool)
        truth[:, :height, :width] = found[-1] >= 0.5
        masks.append(truth)
    labels = output[class_field(kind)].softmax(-1)[..., :CLASSES].argmax(-1)
    if kind in DETRS:
        inputs["labels"] = [
            {"class_labels": labels[i, q], "boxes": output.pred_boxes[i, q], "masks": m}
            for i, (q, m) in enumerate(zip(queries, masks, strict=True))
        ]
    else:
        inputs |= {"mask_labels": [m.float() for m in masks]}
        inputs |= {"class_labels": [labels[i, q] for i, q in enumerate(queries)]}
    seen: dict[str, Tensor] = {}

    def spy(pyramid: FeaturePyramid, rois: Tensor, image: Tensor, coarse: Tensor, truth: Tensor) -> dict[str, Tensor]:
        seen.update(rois=rois, image=image, coarse=coarse, truth=truth)
        return {}

    monkeypatch.setattr(refined, "refinement_losses", spy)
    refined(**inputs)
    assert seen["image"].tolist() == [0, 0, 1] and not seen["coarse"].requires_grad
    if kind not in DETRS:
        first = dict(seen)
        pairs = [(torch.tensor([0, 2]), torch.tensor([1, 0])), (torch.tensor([1]), torch.tensor([0]))]
        monkeypatch.setattr(refined, "_match", lambda *_: pairs)  # the host's counts padding as part of an instance
        inputs["mask_labels"][1][:, 80:] = 255.0  # as a processor with an ignore_index pads
        refined(**inputs)
        assert all(torch.equal(seen[name], first[name]) for name in first)
    rows = iter(range(3))
    for index, (chosen, size) in enumerate(zip(queries, sizes, strict=True)):
        # The matcher gives the queries in ascending order.
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        for place in order:
            row = next(rows)
            true_box = boxes_from_masks(masks[index][place : place + 1])
            box = true_box
            if kind in DETRS:
                x, y, w, h = output.pred_boxes[index, chosen[place]].tolist()
                own = torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2]])
                own = own * torch.tensor([size[1], size[0], size[1], size[0]])
                overlap = (
                    torch.minimum(own[:, 2:], true_box[:, 2:]) - torch.maximum(own[:, :2], true_box[:, :2])
                ).prod()
                union = (own[:, 2:] - own[:, :2]).prod() + (true_box[:, 2:] - true_box[:, :2]).prod() - overlap
                box = own if overlap / union >= 0.5 else true_box
            torch.testing.assert_close(seen["rois"][row : row + 1], box)
            expected = crop_masks(found[index][place : place + 1], box, seen["coarse"].shape[-1])
            torch.testing.assert_close(seen["coarse"][row : row + 1], expected)
            truth = crop_masks(masks[index][place : place + 1], box, seen["truth"].shape[-1]) >= 0.5
            assert torch.equal(seen["truth"][row : row + 1], truth)


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_images_without_an_instance_in_training(kind: str):
    _, refined = identity(kind)
    refined.train()
    for circles in ((TWO_AND_ONE[0], []), ([], [])):
        output, losses = train_call(kind, refined, *circles)
        assert output.loss.isfinite() and losses["loss_refine"].isfinite()
        refined.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None for p in refined.laterals.parameters())
    assert losses["loss_refine"].item() == losses["loss_incoherence"].item() == 0


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_an_instance_that_resizing_has_erased_is_left_out(kind: str, monkeypatch: pytest.MonkeyPatch):
    _, refined = identity(kind)
    counts: list[int] = []
    losses = refined.refinement_losses

    def spy(pyramid: FeaturePyramid, rois: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        counts.append(len(rois))
        return losses(pyramid, rois, *rest)

    monkeypatch.setattr(refined, "refinement_losses", spy)
    output, _ = train_call(kind, refined.train(), [*TWO_AND_ONE[0], (-9.0, -9.0, 1.0)], TWO_AND_ONE[1])
    assert counts == [3] and output.loss.isfinite()


def test_coarse_masks_are_trained_through_if_wanted():
    model = make("detr")
    adapter = adapt(model)
    for detach in (True, False):
        refined = cases.wrapped(adapter, cases.refiner_for(adapter), detach_coarse=detach).train()
        _, losses = train_call("detr", refined, *TWO_AND_ONE)
        refined.zero_grad()
        losses["loss_refine"].backward()
        gradient = model.get_submodule("mask_head.output_conv.head").weight.grad
        assert (gradient is None) == detach
