"""A teacher's features: each is found at its place of the sample, and what is known is told apart."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from small_models import encoder_config, eventful_model
from test_crops import rectangle, write_dataset
from training_runs import disc_sample

from transfiner_refine.data import crops
from transfiner_refine.data.composite import CompositeShares
from transfiner_refine.data.object_cache import ObjectCache
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.training.losses import LossConfig

SIZE = (160, 200)


@pytest.fixture
def teach(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("teach_features")


def test_features_lie_where_they_were_seen(
    teach: ModuleType, script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Red and the first feature both tell x, green and the second y, however the sample is turned and mirrored."""
    monkeypatch.setattr(crops, "photometric", lambda crop, rng: crop)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    photo = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    mask = rectangle(SIZE, (60, 40, 140, 120))
    source = write_dataset(tmp_path / "set", [{"mask": mask, "image": photo}])
    cache = ObjectCache(source, tmp_path / "cache")
    collect = script("collect_features")
    rows = collect.Features(tmp_path / "features", cache, write=True).rows
    cut = cache.image(cache.objects[0])
    cells = collect.SIDE // collect.STRIDE
    places = (np.arange(cells) + 0.5) * collect.STRIDE * max(cut.shape[:2]) / collect.SIDE
    left, top = cut[0, 0, :2].astype(float)
    rows[0, 0], rows[0, 1] = np.broadcast_arrays(places + left, places[:, None] + top)
    rows.flush()

    dataset = teach.TaughtCrops(tmp_path / "features", [source], tmp_path / "cache", side=112)
    for epoch in range(6):
        dataset.set_epoch(epoch)
        sample = dataset[0]
        features = sample.features[:2].float() * teach.DEVIATION
        seen = torch.nn.functional.avg_pool2d(sample.image[:2].float(), teach.STRIDES[0])
        inside = (seen > 8).all(0) & (features > 0).all(0) & (sample.image[2] == 0).view(32, 8, 32, 8).all(3).all(1)
        assert inside.sum() > 100
        assert (features - seen)[:, inside].abs().max() < 4  # the photo is a JPEG, the map rounds to half precision


def test_composites_have_no_features(teach: ModuleType, script: Callable[[str], ModuleType], tmp_path: Path):
    source = write_dataset(tmp_path / "set", [{"mask": rectangle(SIZE, (60, 40, 140, 120))}] * 3)
    collect = script("collect_features")
    collect.Features(tmp_path / "features", ObjectCache(source, tmp_path / "cache"), write=True).rows[:] = 1
    always = CompositeShares(stamp=0, background=1, neighbour=0, poles=0)
    for shares, known in ((always, False), (None, True)):
        dataset = teach.TaughtCrops(tmp_path / "features", [source], tmp_path / "cache", side=112, shares=shares)
        assert bool(dataset[0].features.any()) == known


def test_features_of_other_files_are_an_error(teach: ModuleType, tmp_path: Path):
    """Those that were collected before the files of a set were written anew are not passed over in silence."""
    source = write_dataset(tmp_path / "set", [{"mask": rectangle(SIZE, (60, 40, 140, 120))}])
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "set-of-before.npy").touch()
    with pytest.raises(InvalidInputError, match=r"expected features of one of .*set-of-before"):
        teach.TaughtCrops(tmp_path / "features", [source], tmp_path / "cache", side=112)


def test_the_error_counts_known_places_alone(teach: ModuleType):
    model = teach.Taught(eventful_model(encoder_config(depth=2)))
    objective = teach.TaughtLoss(model, LossConfig(nodes_per_level=(20, 20)), weight=2.0)
    sample = disc_sample(torch.Generator().manual_seed(0))
    batch = [sample.image, sample.roi, sample.coarse, sample.target, sample.weight]
    batch = [column[None] for column in batch]
    features = torch.full((1, 256, 8, 8), 3.0)
    with torch.no_grad():
        for reader in model.readers:
            reader.bias.fill_(3.0)
        losses = objective(*batch, features)
        assert losses["unexplained"] == pytest.approx(0, abs=1e-6)
        features[..., :4] = 0  # unknown
        assert objective(*batch, features)["unexplained"] == pytest.approx(0, abs=1e-6)
        model.readers[0].bias.zero_()
        losses = objective(*batch, features)
    assert losses["unexplained"] == pytest.approx(0.5, abs=1e-6)  # one map of two
    assert losses["loss_features"] == pytest.approx(1.0, abs=1e-5)
