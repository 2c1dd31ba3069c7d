import logging

import pytest
from dataset.pictures import sample_of

from library.dataset.config import SubsetConfig, load
from library.dataset.mask_settings import warn_of_idle
from library.errors import OptionError
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
        "mask_invert = true\nmask_erode = 1\nmask_dilate = 2.5\nmask_labels = {1 = 1, '#FF0000' = 0.5, other = 0.1}",
        mask_feather=3.0,
        mask_erode=7.0,
    )
    labels = (("#ff0000", 0.5), ("1", 1.0), ("other", 0.1))
    assert subset.mask_shape == MaskShape(labels, invert=True, erode=1.0, dilate=2.5, feather=3.0)


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


def test_labels_without_mask_files_are_warned_about(read, caplog):
    read("mask_labels = {1 = 1.0}\nalpha_mask = true")
    assert "mask_labels has no effect without conditioning_data_dir" in caplog.text
    caplog.clear()
    read("mask_labels = {1 = 1.0}\nconditioning_data_dir = 'm'")
    assert not caplog.messages


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
