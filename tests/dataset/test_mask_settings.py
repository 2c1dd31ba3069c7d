import json
import logging

import pytest
from dataset.pictures import sample_of, save_picture

from library.dataset.config import DatasetConfig, SubsetConfig, load
from library.dataset.mask_settings import read_first_label_maps, warn_of_idle, warn_of_idle_dropping
from library.dataset.scan import scan
from library.errors import DataError, OptionError
from library.masks import MaskShape, MaskSource
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.masks import MaskOptions


@pytest.fixture
def read(tmp_path):
    """Return a function from the lines of a subset, and options, to its settings."""

    def read(lines, **masks):
        path = tmp_path / "dataset.toml"
        path.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n{lines}\n", encoding="utf-8")
        options = DatasetOptions(dataset_config=str(path), resolution="512")
        (config,) = load(options, CaptionOptions(), MaskOptions(**masks))
        return config.subsets[0]

    return read


def test_settings_of_the_shape_are_pixels_and_labels_of_the_subset(read):
    subset = read(
        "mask_erode = 1\nmask_labels = {1 = 1, '#FF0000' = 0.5, other = 0.1}",
        mask_invert=True,
        mask_erode=7.0,
        mask_dilate=2.5,
        mask_feather=3.0,
    )
    labels = (("#ff0000", 0.5), ("1", 1.0), ("other", 0.1))
    assert subset.mask_shape == MaskShape(labels, invert=True, erode=1.0, dilate=2.5, feather=3.0)


@pytest.mark.parametrize("metadata_file", [False, True])
def test_every_mask_gets_the_shape_of_its_subset_and_only_files_get_labels(tmp_path, metadata_file):
    """With the headers kept by cache_info too, at a first and a second start."""
    for name, channels in (("a", 3), ("b", 4), ("c", 3)):
        save_picture(tmp_path / "img" / f"{name}.png", channels=channels)
    save_picture(tmp_path / "masks" / "a.png", channels=1)
    content = {f"{name}.png": {"caption": name} for name in "abc"}
    (tmp_path / "meta.json").write_text(json.dumps(content), encoding="utf-8")
    subset = SubsetConfig(
        tmp_path / "img",
        conditioning_data_dir=tmp_path / "masks",
        alpha_mask=True,
        missing_mask="train_all",
        class_tokens="x",
        mask_labels=(("1", 1.0),),
        mask_erode=2,
        metadata_file=tmp_path / "meta.json" if metadata_file else None,
        cache_info=not metadata_file,
    )
    for _ in range(2):
        found = scan((DatasetConfig((64, 64), (subset,)),))
        assert not found.problems
        assert [sample.mask for sample in found.samples] == [
            MaskSource("file", tmp_path / "masks" / "a.png", MaskShape((("1", 1.0),), erode=2.0)),
            MaskSource("alpha", shape=MaskShape(erode=2.0)),
            MaskSource("none"),
        ]


@pytest.mark.parametrize("fill", ["extend", "mean", "noise"])
def test_a_fill_and_draws_without_a_mask_contradict_each_other(read, fill):
    with pytest.raises(OptionError, match=rf"subsets\[0\]: unmasked_probability 0.1 .* mask_fill {fill}"):
        read(f"mask_fill = ['keep', '{fill}']\nunmasked_probability = 0.1")
    with pytest.raises(OptionError, match=r"unmasked_probability 0\.1"):
        read("", mask_fill=(fill,), unmasked_probability=0.1)
    assert read("mask_fill = 'keep'\nunmasked_probability = 0.1").unmasked_probability == 0.1


def test_a_fill_that_is_learnt_is_warned_about(read, caplog):
    read("mask_fill = ['extend', 'noise']\nmask_weight_min = 0.05")
    assert "mask_weight_min 0.05 lets the fill itself (mask_fill extend, noise) be learnt" in caplog.text
    caplog.clear()
    read("mask_weight_min = 0.05")
    read("mask_fill = 'extend'")
    assert not caplog.messages


def test_a_floor_of_areas_needs_the_exponent(read, caplog):
    read("mask_area_floor = 0.05\nmask_area_norm = 1.0")
    assert not caplog.text
    read("mask_area_floor = 0.05")
    assert "mask_area_floor has no effect without mask_area_norm" in caplog.text


def test_labels_without_mask_files_are_warned_about(read, caplog):
    read("mask_labels = {1 = 1.0}\nalpha_mask = true")
    assert "mask_labels has no effect without conditioning_data_dir" in caplog.text
    caplog.clear()
    read("mask_labels = {1 = 1.0}\nconditioning_data_dir = 'm'")
    assert not caplog.messages


def test_the_first_label_map_of_a_subset_is_read_before_training(tmp_path):
    subset = SubsetConfig(tmp_path, mask_labels=(("1", 1.0),), conditioning_data_dir=tmp_path)
    source = MaskSource("file", save_picture(tmp_path / "m.png", channels=3), subset.mask_shape)
    samples = [sample_of(tmp_path / name, source, subset=subset) for name in ("a.png", "b.png")]
    with pytest.raises(DataError, match=r"m\.png: has neither a palette nor greys"):
        read_first_label_maps(samples)
    save_picture(tmp_path / "m.png", channels=1)
    read_first_label_maps(samples)


def test_dropping_tokens_is_idle_where_every_cell_has_some_weight(tmp_path, caplog):
    samples = [
        sample_of(tmp_path / "a.png", subset=SubsetConfig(tmp_path, mask_weight_min=least)) for least in (0.1, 0)
    ]
    warn_of_idle_dropping(2, samples)
    warn_of_idle_dropping(None, samples[:1])
    assert not caplog.messages
    warn_of_idle_dropping(2, samples[:1])
    warn_of_idle_dropping(2, [sample_of(tmp_path / "a.png", MaskSource("none"))])
    assert caplog.messages == [
        "--mask_token_drop has no effect: mask_weight_min gives every cell some weight",
        "--mask_token_drop has no effect: none of the 1 images has a mask",
    ]


def test_settings_that_act_on_masks_are_idle_without_any(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    subset = SubsetConfig(tmp_path, mask_fill=("mean",), mask_erode=2.0)
    sample = sample_of(tmp_path / "a.png", MaskSource("none"), subset=subset)
    warn_of_idle([subset, SubsetConfig(tmp_path)], [sample])
    assert caplog.messages == [
        f"{tmp_path}: {name} has no effect: no image has a mask" for name in ("mask_fill", "mask_erode")
    ]
    caplog.clear()
    warn_of_idle([subset], [sample, sample_of(tmp_path / "b.png")])
    assert not caplog.messages
