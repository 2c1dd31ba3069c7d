"""How pictures become latents before training, in batches of --vae_batch_size; which tokens batches leave out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from library.dataset.plan import validation_batches
from library.models.family import Parts
from library.models.sd import Sd
from library.options import Options, read_training
from library.training import data as training_data


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
