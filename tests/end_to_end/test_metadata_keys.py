"""The metadata keys of whole runs are those of the frozen list; options that write one write what they are given."""

import json
from pathlib import Path
from typing import Any

import pytest
from end_to_end.training_runs import Family, Trained, arguments, subset, write_toml
from PIL import Image

from library.options.toml import read_toml

LIST: dict[str, Any] = read_toml(Path(__file__).parents[1] / "contracts" / "metadata_keys.toml")
TEXTS = {
    "metadata_title": "Zundamon",
    "metadata_author": "a painter",
    "metadata_description": "a green fairy",
    "metadata_license": "CC-BY-4.0",
    "metadata_tags": "character, green",
    "metadata_merged_from": "one, another",
    "metadata_usage_hint": "say zundamon",
    "metadata_trigger_phrase": "zundamon",
    "metadata_preprocessor": "none",
    "metadata_is_negative_embedding": "false",
}


def always(family: Family) -> set[str]:
    """Return the keys that each file of the family's script has."""
    return {*LIST["always"], *LIST["always_of"].get(family.script, ())}


@pytest.fixture(scope="module")
def every_option(family: Family, pictures, tmp_path_factory) -> Trained:
    """A step of a run with every option that adds a key."""
    folder = tmp_path_factory.mktemp("every-option")
    Image.new("RGB", (4, 4), "green").save(folder / "thumbnail.png")
    more: list[object] = ["--max_train_steps", 1, "--vae", family.checkpoint(), "--network_args", "rank_dropout=0.1"]
    more += ["--clip_skip", 2, "--min_timestep", 100, "--metadata_thumbnail", folder / "thumbnail.png"]
    more += [part for name, text in TEXTS.items() for part in (f"--{name}", text)]
    more += ["--training_comment", "a first try"]
    argv = arguments(family, folder, write_toml(folder / "d.toml", subset(pictures.photos)), *more)
    assert family.run(*argv) == 0
    return Trained(folder, tuple(argv))


def test_a_plain_run_has_the_keys_that_are_always_there(family: Family, plain_run: Trained) -> None:
    assert set(plain_run.metadata) == {*always(family), *LIST["with_dataset_config"], *LIST["with_masks"]}


def test_a_run_with_every_option_has_every_key(family: Family, every_option: Trained) -> None:
    added = {key for keys in LIST["with_option"].values() for key in keys}
    assert set(every_option.metadata) == {*always(family), *LIST["with_dataset_config"], *added}


def test_a_run_without_dataset_config_has_the_plain_keys(family: Family, train, pictures, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "2_fairy").symlink_to(pictures.photos)
    run = train(None, "--train_data_dir", tmp_path / "images", "--resolution", 64, "--max_train_steps", 1)
    assert set(run.metadata) == {*always(family), *LIST["without_dataset_config"]}


def test_no_metadata_leaves_the_listed_keys(train, pictures, tmp_path: Path) -> None:
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos))
    run = train(config, "--no_metadata", "--max_train_steps", 1)
    assert set(run.metadata) == set(LIST["left_by_no_metadata"])


def test_the_description_of_the_data_has_the_listed_keys(plain_run: Trained) -> None:
    for dataset in json.loads(plain_run.metadata["ss_datasets"]):
        assert set(dataset) == set(LIST["in_datasets"])
        masks, alpha = (set(entry) - set(LIST["in_subsets"]) for entry in dataset["subsets"])
        assert all(set(LIST["in_subsets"]) <= set(entry) for entry in dataset["subsets"])
        assert (masks, alpha) == ({"conditioning_data_dir"}, {"alpha_mask"})


def test_masked_images_are_counted_in_the_file(plain_run: Trained) -> None:
    keys = ("ss_masked_loss", "ss_alpha_mask", "ss_num_masked_images", "ss_num_train_images")
    assert [plain_run.metadata[key] for key in keys] == ["True", "True", "4", "4"]
    assert float(plain_run.metadata["ss_mean_mask_weight"]) == pytest.approx(0.5)


@pytest.mark.parametrize("option", TEXTS)
def test_a_text_for_the_file_stands_in_it_as_given(option: str, every_option: Trained) -> None:
    assert every_option.metadata[f"modelspec.{option.removeprefix('metadata_')}"] == TEXTS[option]


def test_a_thumbnail_stands_in_the_file_as_a_data_url(every_option: Trained) -> None:
    assert every_option.metadata["modelspec.thumbnail"].startswith("data:image/png;base64,")


def test_a_training_comment_stands_in_the_file(every_option: Trained) -> None:
    assert every_option.metadata["ss_training_comment"] == "a first try"


def test_the_vae_is_named_with_its_hashes(every_option: Trained, family: Family) -> None:
    metadata = every_option.metadata
    assert metadata["ss_vae_name"] == family.checkpoint().name
    assert metadata["ss_new_vae_hash"] == metadata["ss_new_sd_model_hash"]
    assert metadata["ss_vae_hash"] == metadata["ss_sd_model_hash"]
