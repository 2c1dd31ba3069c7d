"""Every setting of masks in data sets of all kinds: metadata files, regularisation and pictures that are held back."""

from pathlib import Path

import numpy as np
import pytest
from end_to_end.test_metadata_files import listing
from end_to_end.training_runs import Pictures, differing, draw_pictures, half, picture, save, subset, write_toml

SETTINGS = {
    "mask_fill": ["extend", "noise"],
    "mask_dilate": 6.5,
    "mask_feather": 8,
    "mask_area_norm": 0.5,
    "mask_prior_weight": 0.5,
    "mask_drop_tags": ["sitting"],
    "mask_captions": True,
    "mask_aware_crop": True,
    "mask_aware_zoom": 1.5,
}


@pytest.fixture
def photos(tmp_path: Path) -> Pictures:
    """Three pictures of each kind, which the test may change."""
    return draw_pictures(tmp_path / "pictures", 3)


def test_a_metadata_file_with_every_setting_of_masks_trains_as_a_folder(train, photos, tmp_path):
    (photos.photo_masks / "photo1.txt").write_text("left, sitting", encoding="utf-8")
    keys = {"conditioning_data_dir": photos.photo_masks, **SETTINGS}
    folder = train(write_toml(tmp_path / "a.toml", subset(photos.photos, **keys)), name="folder")
    listed = subset(photos.photos, metadata_file=listing(tmp_path / "meta.json", photos.photos), **keys)
    run = train(write_toml(tmp_path / "b.toml", listed), name="listed")
    assert differing(run.tensors, folder.tensors) == []
    assert run.losses == folder.losses
    assert '"sitting"' not in run.metadata["ss_tag_frequency"]
    assert len(run.curve("loss/drift_outside")) == 2


def test_what_is_masked_out_of_regularisation_and_held_back_pictures_is_not_seen(train, photos, tmp_path):
    for i in range(3):
        save(tmp_path / "reg_masks", f"reg{i}", half())
    fill = {"mask_fill": "mean", "mask_drop_tags": ["a person"]}
    config = write_toml(
        tmp_path / "d.toml",
        subset(photos.cutouts, alpha_mask=True, validation_split=0.34, **fill),
        subset(photos.regularisation, is_reg=True, conditioning_data_dir=tmp_path / "reg_masks", **fill),
        batch_size=4,
    )
    before = train(config, name="before")
    hidden = np.arange(64)[None, :, None] >= 32
    for i in range(3):
        save(photos.regularisation, f"reg{i}", np.where(hidden, picture(90 + i), picture(20 + i)))
        save(photos.cutouts, f"cutout{i}", np.dstack([np.where(hidden, picture(80 + i), picture(10 + i)), half()]))
    after = train(config, name="after")
    measured = "loss/validation/epoch_average"
    assert differing(before.tensors, after.tensors) == []
    assert before.curve(measured) == after.curve(measured)
    assert '"a person"' not in before.metadata["ss_tag_frequency"]
    save(photos.regularisation, "reg0", picture(99))
    assert differing(before.tensors, train(config, name="other").tensors)
