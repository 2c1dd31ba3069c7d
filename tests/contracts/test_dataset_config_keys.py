"""The dataset config is a contract: every key of sd-scripts may stand where it may stand there."""

import json
from pathlib import Path
from typing import Any

import pytest

from library.dataset import config, schema
from library.errors import OptionError
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.masks import MaskOptions
from library.options.toml import read_toml

KEYS: dict[str, dict[str, Any]] = read_toml(Path(__file__).with_name("dataset_config_keys.toml"))
PLACES = ("general", "datasets", "subsets")
EVERY_PLACE = [(key, place) for key in KEYS for place in PLACES]


def load(folder: Path, key: str, place: str) -> None:
    """Read a config of two subsets, the first of which may be any, that has the key at the place."""
    entry = {key: KEYS[key]["value"]}
    subset = {"image_dir": "a"} | (entry if place == "subsets" else {})
    dataset = {"subsets": [subset, {"image_dir": "b"}]} | (entry if place == "datasets" else {})
    content = {"datasets": [dataset]} | ({"general": entry} if place == "general" else {})
    path = folder / "dataset.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    config.load(DatasetOptions(dataset_config=str(path), resolution="512"), CaptionOptions(), MaskOptions())


def test_the_list_has_every_key_and_no_other() -> None:
    taken = {
        "datasets": {*schema.DATASET_KEYS, *schema.SUBSET_KEYS},
        "subsets": {*schema.SUBSET_KEYS, *schema.SUBSET_ONLY_KEYS},
    }
    assert {key for key in KEYS if "datasets" in KEYS[key]["at"]} == taken["datasets"]
    assert {key for key in KEYS if "subsets" in KEYS[key]["at"]} == taken["subsets"]


def test_the_keys_of_custom_attributes_are_frozen() -> None:
    assert set(KEYS["custom_attributes"]["value"]) == set(schema.ATTRIBUTES)


@pytest.mark.parametrize(("key", "place"), EVERY_PLACE)
def test_a_key_is_taken_where_the_list_says_and_refused_elsewhere(key: str, place: str, tmp_path: Path) -> None:
    if place in KEYS[key]["at"]:
        load(tmp_path, key, place)
    else:
        with pytest.raises(OptionError, match=rf"{place}.*\.{key} can"):
            load(tmp_path, key, place)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_stands_wherever_sd_scripts_lets_it_stand(key: str) -> None:
    assert set(KEYS[key].get("in_sd_scripts", [])) <= set(KEYS[key]["at"]) <= set(PLACES)


@pytest.mark.parametrize("key", ["general", "datasets", "subsets"])
def test_the_tables_have_the_names_of_sd_scripts(key: str, tmp_path: Path) -> None:
    content = {"general": {}, "datasets": [{"subsets": [{"image_dir": "a"}]}]}
    misspelt = json.loads(json.dumps(content).replace(f'"{key}"', f'"{key}s"'))
    path = tmp_path / "dataset.json"
    options = DatasetOptions(dataset_config=str(path), resolution="512")
    path.write_text(json.dumps(content), encoding="utf-8")
    config.load(options, CaptionOptions(), MaskOptions())
    path.write_text(json.dumps(misspelt), encoding="utf-8")
    with pytest.raises(OptionError, match=f"{key}s"):
        config.load(options, CaptionOptions(), MaskOptions())
