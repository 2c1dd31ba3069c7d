"""Captions of masked images in whole runs: the same networks as of captions that are written that way."""

import json
from pathlib import Path

import pytest
from end_to_end.training_runs import Pictures, differing, draw_pictures, subset, write_toml

UNET_ONLY = "--network_train_unet_only"


@pytest.fixture
def photos(tmp_path: Path) -> Pictures:
    """Two pictures of each kind, which the test may change."""
    return draw_pictures(tmp_path / "pictures")


def test_tags_that_masks_drop_train_as_captions_that_never_had_them(train, photos, tmp_path):
    keys = {"conditioning_data_dir": photos.photo_masks, "caption_prefix": "art of"}
    config = write_toml(tmp_path / "d.toml", subset(photos.photos, **keys), subset(photos.regularisation))
    with_tags = train(config, UNET_ONLY, name="with-tags")
    drop = (UNET_ONLY, "--mask_drop_tags", "Sitting", "a person")
    dropped = train(config, *drop, name="dropped")
    cached = train(config, *drop, "--cache_text_encoder_outputs", name="cached")
    for caption in photos.photos.glob("*.txt"):
        caption.write_text(caption.read_text("utf-8").replace(", sitting", ""), encoding="utf-8")
    without = train(config, UNET_ONLY, name="without")
    assert differing(dropped.tensors, without.tensors) == []
    assert differing(dropped.tensors, cached.tensors) == []
    assert differing(dropped.tensors, with_tags.tensors)
    assert json.loads(dropped.metadata["ss_mask_drop_tags"]) == ["Sitting", "a person"]
    assert dropped.metadata["ss_tag_frequency"] == without.metadata["ss_tag_frequency"]
    assert json.loads(dropped.metadata["ss_tag_frequency"])["regularisation"] == {"a person": 2}


def test_captions_beside_masks_train_as_captions_beside_images(train, photos, tmp_path):
    masks = {"conditioning_data_dir": photos.photo_masks}
    (photos.photo_masks / "photo0.txt").write_text("only the left half", encoding="utf-8")
    beside = train(write_toml(tmp_path / "a.toml", subset(photos.photos, **masks)), "--mask_captions", name="beside")
    (photos.photos / "photo0.txt").write_text("only the left half", encoding="utf-8")
    plain = train(write_toml(tmp_path / "b.toml", subset(photos.photos, **masks)), name="plain")
    assert differing(beside.tensors, plain.tensors) == []
    assert beside.metadata["ss_mask_captions"] == "True"
