"""What has changed since a state was written is told, and what its numbers cannot serve is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.geometry import Transform
from library.dataset.placement import Placement
from library.dataset.scan import Sample, scan
from library.errors import CheckpointError
from library.masks import MaskSource
from library.options import Options
from library.options.groups import build_all
from library.training import changes
from library.training.state import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "photos"
    made.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(made / f"{name}.png")
        (made / f"{name}.txt").write_text(f"a {name}")
    return made


def print_of(subset: SubsetConfig, **dataset: object) -> list[str]:
    config = DatasetConfig((64, 64), (subset,), **dataset)  # type: ignore[arg-type]
    return changes.fingerprint([config], scan([config]).samples).split("-")


def subset_of(folder: Path, **keys: object) -> SubsetConfig:
    return SubsetConfig(folder, caption_extension=".txt", **keys)  # type: ignore[arg-type]


def differing(one: list[str], other: list[str]) -> list[str]:
    return [name for name, a, b in zip(changes.PARTS_OF_A_DATASET, one, other, strict=True) if a != b]


def test_a_dataset_that_was_moved_is_the_same(folder: Path, tmp_path: Path) -> None:
    before = print_of(subset_of(folder))
    moved = tmp_path / "elsewhere" / "photos"
    moved.parent.mkdir()
    folder.rename(moved)
    assert print_of(subset_of(moved)) == before


def test_a_changed_caption_setting_or_image_is_told_apart(folder: Path) -> None:
    before = print_of(subset_of(folder))
    assert differing(before, print_of(subset_of(folder), batch_size=2)) == ["settings"]
    assert differing(before, print_of(subset_of(folder, flip_aug=True))) == ["settings"]
    (folder / "a.txt").write_text("a dog")
    assert differing(before, print_of(subset_of(folder))) == ["captions"]
    (folder / "a.txt").write_text("a a")
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "a.png")
    assert differing(before, print_of(subset_of(folder))) == ["images and masks"]


def test_a_mask_that_was_drawn_anew_is_another(folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("a", "b"):
        Image.new("L", (64, 64)).save(masks / f"{name}.png")
    before = print_of(subset_of(folder, conditioning_data_dir=masks))
    assert differing(before, print_of(subset_of(folder))) == ["images and masks", "settings"]
    Image.effect_noise((64, 64), 90).save(masks / "b.png")
    assert differing(before, print_of(subset_of(folder, conditioning_data_dir=masks))) == ["images and masks"]


def manifest(options: Options, num_processes: int = 1, **more: object) -> Manifest:
    values = changes.deciding_values(options, num_processes)
    return replace(Manifest(1, 1, 7, values, "1-2-3", 5), **more)  # type: ignore[arg-type]


def told(before: Options, now: Options, caplog: pytest.LogCaptureFixture, num_processes: int = 1) -> list[str]:
    caplog.clear()
    changes.tell(manifest(before), changes.deciding_values(now, num_processes), "1-2-3", 5)
    return [record.getMessage() for record in caplog.records]


def test_files_count_by_name_and_the_cache_by_whether_there_is_one(caplog) -> None:
    before = build_all({"pretrained_model_name_or_path": "models/a.safetensors", "output_dir": "x"})
    moved = build_all({"pretrained_model_name_or_path": "drive/a.safetensors", "output_dir": "y", "vae_batch_size": 4})
    assert told(before, moved, caplog) == []
    other = build_all({"pretrained_model_name_or_path": "models/b.safetensors", "cache_latents_to_disk": True})
    assert told(before, other, caplog) == [
        "--resume: --cache_latents was False, is True",
        "--resume: --pretrained_model_name_or_path was a.safetensors, is b.safetensors",
    ]


def test_options_of_sd3_count_unless_they_only_move_things_about(caplog) -> None:
    moved = build_all({"blocks_to_swap": 8, "t5xxl_device": "cpu", "save_clip": True, "save_t5xxl": True})
    assert told(build_all({}), moved, caplog) == []
    other = build_all({"training_shift": 3.0, "t5_dropout_rate": 0.1, "mask_token_drop": 4})
    assert told(build_all({}), other, caplog) == [
        "--resume: --mask_token_drop was not given, is 4",
        "--resume: --t5_dropout_rate was 0.0, is 0.1",
        "--resume: --training_shift was 1.0, is 3.0",
    ]


def test_another_number_of_processes_is_told(caplog) -> None:
    assert told(build_all({}), build_all({}), caplog, num_processes=2) == ["--resume: --num_processes was 1, is 2"]


def test_what_of_the_dataset_differs_is_named(caplog) -> None:
    changes.tell(manifest(build_all({})), {}, "1-2-4", 5)
    assert "the dataset has changed (5 images then, 5 now): other settings, so" in caplog.text


SAME = [
    ({}, {"optimizer_type": "adamw"}),
    ({}, {"lr_scheduler": "cosine"}),
    ({"optimizer_type": "AdamW"}, {"optimizer_type": "torch.optim.AdamW"}),
    ({"lr_scheduler_type": "StepLR"}, {"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR"}),
]
OTHER = [
    ({}, {"optimizer_type": "Lion"}, "--optimizer_type"),
    ({"optimizer_type": "AdamW8bit"}, {}, "AdamW8bit, and this run has AdamW"),
    ({}, {"lr_scheduler_type": "StepLR"}, "--lr_scheduler_type"),
    ({"lr_scheduler": "reduce_lr_on_plateau"}, {"lr_scheduler": "linear"}, "reduce_lr_on_plateau"),
]


@pytest.mark.parametrize(("before", "now"), SAME)
def test_other_names_of_the_same_kind_and_other_curves_go_on(before, now) -> None:
    changes.refuse_other_kinds(manifest(build_all(before)), build_all(now))


@pytest.mark.parametrize(("before", "now", "message"), OTHER)
def test_another_kind_of_optimizer_or_schedule_is_refused(before, now, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        changes.refuse_other_kinds(manifest(build_all(before)), build_all(now))


def test_a_state_from_before_masks_had_settings_is_still_of_the_same_data_set() -> None:
    one = SubsetConfig(Path("photos"), caption_extension=".txt", flip_aug=True, conditioning_data_dir=Path("m"))
    reg = SubsetConfig(Path("reg"), index=1, is_reg=True)
    written = changes.fingerprint([DatasetConfig((64, 64), (one, reg), batch_size=2)], []).split("-")[2]
    assert written == "d438b6e4bcc1373e"  # by the version before them
    assert changes.fingerprint([DatasetConfig((64, 64), (one,))], []).split("-")[2] == "8aa95730f4fc3d5d"


def test_a_state_from_before_pictures_were_placed_is_still_of_the_same_images() -> None:
    cut = Transform((100, 80), (80, 64), (8, 0), (64, 64))
    mask = MaskSource("file", Path("m/a.png"))
    sample = Sample(Path("photos/a.png"), ("a",), SubsetConfig(Path("photos")), 0, False, 2, 1, cut, mask)
    written = changes.fingerprint([], [sample]).split("-")[0]
    assert written == "616eb1a0d8d4707d"  # by the version before
    for other in (replace(cut, placement=Placement()), replace(cut, reach=(0, 0, 9, 0))):
        assert changes.fingerprint([], [replace(sample, transform=other)]).split("-")[0] != written


@pytest.mark.parametrize(
    "setting",
    [
        {"mask_fill": ("mean",)},
        {"mask_labels": (("1", 0.5),)},
        {"mask_invert": True},
        {"mask_feather": 3.0},
        {"mask_area_norm": 0.5},
        {"unmasked_probability": 0.1},
        {"mask_prior_weight": 1.0},
        {"mask_drop_tags": ("hat",)},
        {"mask_captions": True},
        {"mask_aware_crop": True},
        {"random_placement": True},
        {"placement_rotate": 5.0},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_changed_setting_of_masks_is_told_of_a_subset(setting: dict[str, object]) -> None:
    plain = SubsetConfig(Path("photos"))
    before, now = (
        changes.fingerprint([DatasetConfig((64, 64), (each,))], []).split("-")
        for each in (plain, replace(plain, **setting))  # type: ignore[arg-type]
    )
    assert differing(before, now) == ["settings"]


def test_a_changed_setting_of_masks_is_told_of_the_command_line(caplog) -> None:
    now = build_all({"mask_fill": ["noise", "mean"], "mask_prior_every": 4, "mask_drop_tags": ["hat"]})
    assert told(build_all({}), now, caplog) == [
        "--resume: --mask_drop_tags was not given, is hat",
        "--resume: --mask_fill was keep, is noise mean",
        "--resume: --mask_prior_every was 1, is 4",
    ]
