"""What fills do to whole runs, beside what test_isolation.py shows of every family."""

from pathlib import Path

import pytest
from end_to_end.conftest import Train
from end_to_end.hidden_pictures import FILLS, draw
from end_to_end.train_db_runs import train_db
from end_to_end.training_runs import Family, Pictures, arguments, differing, subset, write_toml
from PIL import Image

STEPS = ("--max_train_steps", 4)


def test_without_a_cache_what_is_masked_out_changes_no_bit_of_the_network(train: Train, tmp_path: Path) -> None:
    one, other = (train(draw(tmp_path / str(hidden), hidden), *STEPS, name=f"run{hidden}") for hidden in (1, 2))
    assert not differing(one.tensors, other.tensors)
    assert one.losses == other.losses


@pytest.mark.parametrize(
    "kept", [name if name == "files" else pytest.param(name, marks=pytest.mark.slow) for name in FILLS]
)
def test_one_subset_that_keeps_what_is_masked_out_does_change_the_network(
    kept: str, train: Train, tmp_path: Path
) -> None:
    one, other = (
        train(draw(tmp_path / str(hidden), hidden, (kept,)), "--cache_latents", *STEPS, name=f"run{hidden}")
        for hidden in (1, 2)
    )
    assert differing(one.tensors, other.tensors)


BESIDE = {
    "aware crops": "--mask_aware_crop --mask_aware_zoom 2 --mask_area_norm 1 --mask_prior_weight 0.5",
    "placements": "--random_placement --placement_rotate 30 --mask_area_norm 1 --mask_prior_weight 0.5",
    "placements in a cache": "--random_placement --placement_rotate 30 --placement_scale 0.4,2 --cache_latents",
    "moved and shaped": "--random_crop --mask_aware_crop --color_aug --mask_dilate 3 --mask_erode 3",
    "validation": "--validation_split 0.3 --validate_every_n_steps 1 --mask_weight_min 0.1",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", BESIDE.values(), ids=BESIDE)
def test_beside_all_that_acts_on_masks_what_is_masked_out_changes_no_bit(
    words: str, train: Train, tmp_path: Path
) -> None:
    one, other = (
        train(draw(tmp_path / str(hidden), hidden), *words.split(), *STEPS, name=f"run{hidden}") for hidden in (1, 2)
    )
    assert not differing(one.tensors, other.tensors)
    assert one.losses == other.losses


@pytest.mark.slow
def test_whole_models_do_not_depend_on_what_is_masked_out(tmp_path: Path) -> None:
    one, other = (
        train_db(tmp_path / f"run{hidden}", draw(tmp_path / str(hidden), hidden), *STEPS) for hidden in (1, 2)
    )
    assert not differing(one.tensors, other.tensors)


def test_fills_and_shapes_of_the_command_line_are_seen_in_the_contact_sheet(
    family: Family, pictures: Pictures, tmp_path: Path
) -> None:
    """Of cut-outs whose right half is transparent the left half is filled, once the mask is inverted."""
    config = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))
    sheets = []
    for more in ((), ("--mask_fill", "mean"), ("--mask_fill", "mean", "--mask_invert")):
        folder = tmp_path / str(len(sheets))
        words = ("--dataset_config", config, "--debug_dataset", "--output_dir", folder, *more)
        assert family.run(*words) == 0
        with Image.open(next(folder.glob("*-masks.png"))) as sheet:
            sheets.append(sheet.convert("RGB").tobytes())
    assert len(set(sheets)) == 3


def test_a_fill_with_draws_that_show_what_is_masked_out_is_refused(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = draw(tmp_path / "1", 1)
    assert family.run(*arguments(family, tmp_path, config, "--unmasked_probability", 0.1)) == 2
    assert "unmasked_probability 0.1 shows and learns what mask_fill extend" in capsys.readouterr().err
