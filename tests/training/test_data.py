"""How pictures become latents before training, in batches of --vae_batch_size; which tokens batches leave out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from library.dataset.plan import validation_batches
from library.errors import OptionError
from library.models.family import Parts
from library.models.sd import Sd
from library.options import Options, read_training
from library.training import data as training_data
from library.training import reporting


class Counting:
    """Encodes every picture as 0 and notes how many come at a time."""

    name = "sd"
    latent_space = Sd.latent_space

    def __init__(self) -> None:
        """Begin without any."""
        self.batches: list[int] = []

    def encode_images(self, parts: Parts, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return zeros."""
        self.batches.append(len(images))
        return torch.zeros(len(images), 4, images.shape[2] // 8, images.shape[3] // 8)


PARTS = Parts(torch.nn.Identity(), (), torch.nn.Linear(1, 1))


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """Arguments of a run over five pictures."""
    folder = tmp_path / "images" / "1_cat"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(np.full((64, 64, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    return [
        "--train_data_dir", str(folder.parent), "--resolution", "64", "--output_dir", str(tmp_path / "out"),
        "--network_module", "networks.lora", "--pretrained_model_name_or_path", "nowhere.safetensors",
    ]  # fmt: skip


def options_of(argv: list[str], *more: str) -> Options:
    return read_training([*argv, *more], "train_network").options


@pytest.mark.parametrize(("size", "batches"), [("1", [1] * 5), ("2", [2, 2, 1]), ("9", [5])])
def test_the_vae_takes_vae_batch_size_pictures_at_a_time_while_caching(size, batches, argv) -> None:
    options = options_of(argv, "--cache_latents", "--vae_batch_size", size)
    family = Counting()
    data = training_data.read(options, 64)
    encode = training_data.encoder(family, lambda: PARTS)
    training_data.cache(data, options.caching, "sd", encode, torch.float32, "vae", Accelerator(cpu=True))
    assert sorted(family.batches, reverse=True) == batches


def test_leaving_tokens_out_without_any_mask_is_named(argv, caplog) -> None:
    options = read_training([*argv, "--mask_token_drop", "4"], "sd3_train_network").options
    training_data.read(options, 64)
    assert [record.getMessage() for record in caplog.records] == [
        "--mask_token_drop has no effect: none of the 5 images has a mask"
    ]


def test_leaving_tokens_out_goes_without_a_word_where_an_image_has_a_mask(argv, tmp_path, caplog) -> None:
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:32, :, 3] = 0
    for path in tmp_path.rglob("0.png"):
        Image.fromarray(pixels).save(path)
    options = read_training([*argv, "--mask_token_drop", "4", "--alpha_mask"], "sd3_train_network").options
    training_data.read(options, 64)
    assert "--mask_token_drop" not in caplog.text


# ---- empty masks -----------------------------------------------------------------------------------------------


def with_alpha(folder: Path, **rows: int) -> None:
    """Make the first rows of pictures opaque, and the rest transparent."""
    for name, number in rows.items():
        pixels = np.full((64, 64, 4), 90, np.uint8)
        pixels[number:, :, 3] = 0
        (path,) = folder.rglob(f"{name[1:]}.png")
        Image.fromarray(pixels).save(path)


def test_images_with_empty_masks_are_left_out_by_name_where_mask_area_norm_is_on(argv, tmp_path, caplog) -> None:
    """Picture 4 has no transparency, so no mask; 0 and 2 are transparent everywhere."""
    with_alpha(tmp_path, _0=0, _1=1, _2=0, _3=64)
    data = training_data.read(options_of(argv, "--alpha_mask", "--mask_area_norm", "0.5"), 64)
    assert [sample.path.name for sample in data.samples] == ["1.png", "3.png", "4.png"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 masks have nothing white in the part that is trained: ")
    assert ["0.png" in line, "1.png" in line, "2.png" in line] == [True, False, True]
    assert "mask_area_norm" in line


def test_settings_of_masks_have_had_an_effect_where_all_masked_images_are_left_out(argv, tmp_path, caplog) -> None:
    with_alpha(tmp_path, _0=0)
    assert len(training_data.read(options_of(argv, "--alpha_mask", "--mask_area_norm", "1"), 64).samples) == 4
    assert "no effect" not in caplog.text


def test_regularisation_images_are_as_many_as_the_images_whose_masks_are_not_empty(argv, tmp_path) -> None:
    with_alpha(tmp_path, _0=0, _1=0, _2=0)
    folder = tmp_path / "reg" / "1_animal"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "only.png")
    given = ("--alpha_mask", "--mask_area_norm", "1", "--reg_data_dir", str(folder.parent))
    data = training_data.read(options_of(argv, *given), 64)
    assert [(sample.is_reg, sample.num_repeats) for sample in data.samples] == [(False, 1), (False, 1), (True, 2)]


def test_images_with_empty_masks_stay_without_it_and_are_named(argv, tmp_path, caplog) -> None:
    with_alpha(tmp_path, _0=0, _1=1)
    data = training_data.read(options_of(argv, "--alpha_mask"), 64)
    assert len(data.samples) == 5
    assert not caplog.records
    reporting.tell_masks(data, None)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "0.png: its mask has nothing white" in line
    assert "Nothing is learnt there" in line


def test_a_mask_that_only_other_cuts_of_random_crop_show_is_not_empty(argv, tmp_path, caplog) -> None:
    pixels = np.full((64, 256, 4), 255, np.uint8)
    pixels[:, 64:, 3] = 0
    Image.fromarray(pixels).save(next(tmp_path.rglob("0.png")))
    more = ("--alpha_mask", "--random_crop", "--mask_area_norm", "1")
    data = training_data.read(options_of(argv, *more), 64)
    reporting.tell_masks(data, None)
    assert "0.png" in {sample.path.name for sample in data.samples}
    assert "nothing white" not in caplog.text
    assert "black everywhere" not in caplog.text


def test_a_data_set_of_empty_masks_alone_is_an_error_with_mask_area_norm(argv, tmp_path) -> None:
    with_alpha(tmp_path, _0=0, _1=0, _2=0, _3=0, _4=0)
    with pytest.raises(OptionError, match="no image to train on: every one was left out"):
        training_data.read(options_of(argv, "--alpha_mask", "--mask_area_norm", "1"), 64)


@pytest.mark.parametrize("name", ["mask_area_norm", "mask_prior_weight", "mask_prior_every"])
def test_settings_of_masks_without_any_mask_are_named(name, argv, caplog) -> None:
    training_data.read(options_of(argv, f"--{name}", {"mask_prior_every": "2"}.get(name, "1")), 64)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{name} has no effect" in line


class Telling(Counting):
    """Has one token for every caption."""

    def tokenize(self, captions):
        """Return zeros."""
        return torch.zeros(len(captions), 1, dtype=torch.int64)


@pytest.mark.parametrize(("drop", "num_kept"), [(["--mask_token_drop", "2"], 64), ([], None)])
def test_batches_of_training_and_validation_leave_out_what_mask_token_drop_says(drop, num_kept, tmp_path) -> None:
    """A stripe of 32 pixels at the left is learnt: with 2 cells beside it 48 of 256 tokens, rounded up to 64."""
    folder = tmp_path / "images" / "1_cat"
    folder.mkdir(parents=True)
    picture = np.full((256, 256, 4), 90, np.uint8)
    picture[..., 3] = 0
    picture[:, :32, 3] = 255
    for i in range(4):
        Image.fromarray(picture).save(folder / f"{i}.png")
    words = ["--train_data_dir", str(folder.parent), "--resolution", "256", "--alpha_mask", "--validation_split", "0.5"]
    words += ["--network_module", "networks.lora", "--pretrained_model_name_or_path", "nowhere.safetensors"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_data_loader_n_workers", "0", *drop]
    options = read_training(words, "sd3_train_network").options
    data = training_data.read(options, 64)
    assert len(data.validation) == 2
    plan, stores, family = training_data.make_plan(data, options, 1, 1), training_data.Stores(), Telling()
    trained = next(iter(training_data.load(data, options, plan, stores, family, 10)))
    held_back = validation_batches(data.configs, data.validation, first_index=2, limit=None, step=10)
    (validated, *_) = training_data.load_validation(data, options, held_back, 1, stores, family, 10)
    for batch in (trained, validated):
        assert (None if batch.kept_tokens is None else batch.kept_tokens.shape[1]) == num_kept
