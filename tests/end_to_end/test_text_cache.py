"""Runs whose captions are encoded before training: the same networks, and no text encoder where none is needed."""

from pathlib import Path

import pytest
from end_to_end.conftest import Train
from end_to_end.training_runs import Family, Pictures, arguments, differing, subset, write_toml

UNET_ONLY = ("--network_train_unet_only", "--max_train_steps", 4)
CACHE = "--cache_text_encoder_outputs"
DISK = "--cache_text_encoder_outputs_to_disk"


@pytest.fixture
def config(tmp_path: Path, pictures: Pictures) -> Path:
    return write_toml(tmp_path / "data.toml", subset(pictures.photos, conditioning_data_dir=pictures.photo_masks))


def test_captions_encoded_before_training_train_the_same_network(train: Train, config: Path, tmp_path: Path) -> None:
    plain = train(config, *UNET_ONLY, name="plain")
    for name, more in {
        "memory": [CACHE],
        "disk": [DISK, "--cache_dir", tmp_path / "cache"],
        "again": [DISK, "--cache_dir", tmp_path / "cache"],
    }.items():
        cached = train(config, *UNET_ONLY, *more, name=name)
        assert cached.losses == plain.losses
        assert not differing(cached.tensors, plain.tensors)
