"""Runs on the pictures that a metadata file lists: the same training as on a folder of them."""

import json
from pathlib import Path

from end_to_end.training_runs import Pictures, differing, subset, write_toml

from tools import check_dataset


def listing(file: Path, folder: Path) -> Path:
    """Write a metadata file of all pictures in a folder with their captions, JSON or JSONL; return its path."""
    captions = {path.name: path.with_suffix(".txt").read_text("utf-8") for path in sorted(folder.glob("*.png"))}
    if file.suffix == ".jsonl":
        lines = (json.dumps({"image_path": name, "caption": text}) for name, text in captions.items())
        file.write_text("\n".join(lines), encoding="utf-8")
    else:
        file.write_text(json.dumps({name: {"caption": text} for name, text in captions.items()}), encoding="utf-8")
    return file


def test_listed_pictures_with_masks_train_as_a_folder_of_them(train, pictures: Pictures, tmp_path):
    masks = {"conditioning_data_dir": pictures.photo_masks}
    folder = train(write_toml(tmp_path / "a.toml", subset(pictures.photos, **masks)), name="folder")
    listed = {"image_dir": pictures.photos, "metadata_file": listing(tmp_path / "meta.json", pictures.photos)}
    run = train(write_toml(tmp_path / "b.toml", listed | masks), name="listed")
    assert differing(run.tensors, folder.tensors) == []


def test_in_json_trains_and_the_file_says_so(train, pictures: Pictures, tmp_path):
    sizes = ("--resolution", "64", "--train_batch_size", 2)
    file = listing(tmp_path / "meta.jsonl", pictures.veils)
    run = train(None, "--in_json", file, "--train_data_dir", pictures.veils, *sizes, "--alpha_mask")
    folder = train(write_toml(tmp_path / "d.toml", subset(pictures.veils, alpha_mask=True)), name="folder")
    assert differing(run.tensors, folder.tensors) == []
    assert json.loads(run.metadata["ss_dataset_dirs"]) == {"meta.jsonl": {"n_repeats": 1, "img_count": 2}}
    assert set(json.loads(run.metadata["ss_tag_frequency"])) == {"meta.jsonl"}


def test_a_config_with_a_metadata_file_is_described_as_fine_tuning(train, pictures: Pictures, tmp_path):
    listed = {"image_dir": pictures.photos, "metadata_file": listing(tmp_path / "meta.json", pictures.photos)}
    (described,) = json.loads(train(write_toml(tmp_path / "d.toml", listed)).metadata["ss_datasets"])
    assert described["is_dreambooth"] is False
    assert described["subsets"][0]["metadata_file"] == "meta.json"


def test_check_dataset_shows_listed_pictures_and_their_masks(pictures: Pictures, tmp_path, capsys):
    file = listing(tmp_path / "meta.json", pictures.photos)
    keys = {"image_dir": pictures.photos, "metadata_file": file, "conditioning_data_dir": pictures.photo_masks}
    assert check_dataset.main(["--dataset_config", str(write_toml(tmp_path / "d.toml", keys))]) == 0
    shown = capsys.readouterr().out
    assert f"subset 0: {file}: 2 images with 1 repeat, masks from {pictures.photo_masks}: 2" in shown
    assert "problems: 0 errors, 0 warnings" in shown


def test_check_dataset_takes_in_json_and_finds_what_is_not_there(tmp_path, capsys):
    (tmp_path / "meta.json").write_text('{"a.png": {"caption": "x"}}', encoding="utf-8")
    assert check_dataset.main(["--in_json", str(tmp_path / "meta.json"), "--resolution", "64"]) == 1
    assert f"there is no image {tmp_path / 'a.png'}" in capsys.readouterr().out
