import json

import pytest
import torch
from torch.nn import functional as F

from examples.embedded_model import make
from library.models.checkpoint import open_tensors
from library.models.sd import Sd
from tests.models.reference import base_keys
from tests.tiny_models import SD15, tiny_sd15, tiny_sd21


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make.write(tmp_path_factory.mktemp("embedded") / "model.safetensors")


@pytest.fixture(scope="module")
def parts(checkpoint):
    return Sd().load(str(checkpoint), None, torch.float32)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_has_the_names_and_dimensions_of_a_real_checkpoint(checkpoint):
    for path, architecture in ((checkpoint, "sd15"), (tiny_sd15(), "sd15"), (tiny_sd21(), "sd21")):
        shapes = open_tensors(path).shapes
        expected = {name: len(shape) for name, shape in base_keys(architecture).items()}
        assert {name: len(shape) for name, shape in shapes.items()} == expected


def test_it_is_small(checkpoint):
    assert checkpoint.stat().st_size < 22e6


def test_the_seed_alone_decides_the_file(tmp_path):
    torch.manual_seed(5)
    again = make.write(tmp_path / "again.safetensors", precision="float", size=SD15)
    other = make.write(tmp_path / "other.safetensors", seed=1, precision="float", size=SD15)
    assert again.read_bytes() == tiny_sd15().read_bytes()
    assert other.read_bytes() != tiny_sd15().read_bytes()


def test_making_it_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make.build(size=SD15)
    assert torch.equal(torch.rand(4), expected)


@torch.no_grad()
def test_its_vae_brings_back_the_mean_colour_of_every_cell(parts):
    images = F.interpolate(draw(2, 3, 8, 8).tanh(), scale_factor=8, mode="bilinear")
    decoded = parts.vae.decode(Sd().encode_images(parts, images)).sample
    assert (F.avg_pool2d(decoded, 8) - F.avg_pool2d(images, 8)).abs().mean() < 0.02
    assert decoded.abs().max() < 1.2


@torch.no_grad()
def test_its_latents_have_the_size_that_the_unet_expects(parts):
    images = F.interpolate(draw(8, 3, 4, 4).tanh(), size=64, mode="bilinear")
    latents = Sd().latent_space.normalise(Sd().encode_images(parts, images))
    assert 0.5 < latents.std() < 2


@torch.no_grad()
def test_its_unet_takes_its_input_for_noise_and_adds_something_of_its_own(parts):
    noisy = draw(4, 4, 8, 8)
    text = Sd().encode_text(parts, Sd().tokenize(["a cat"] * 4))
    output = Sd().predict(parts, noisy, torch.tensor([5, 300, 700, 999]), text, None)
    assert 0.8 < output.std() < 1.2
    assert 0.02 < (output - noisy).std() < 0.3


@torch.no_grad()
def test_it_trains_on_a_single_picture_of_64_pixels(parts):
    # one cell at the U-Net's depth: torch refuses a group norm over a single number
    text = Sd().encode_text(parts, Sd().tokenize(["a cat"]))
    latents = Sd().encode_images(parts, draw(1, 3, 64, 64))
    assert Sd().predict(parts, latents, torch.tensor([9]), text, None).isfinite().all()


def test_the_command_writes_a_file_and_a_folder(tmp_path, monkeypatch, capsys):
    arguments = ["make.py", str(tmp_path / "m.safetensors"), "--precision", "fp16", "--diffusers", str(tmp_path / "d")]
    monkeypatch.setattr("sys.argv", arguments)
    make.main()
    assert "m.safetensors" in capsys.readouterr().out
    index = json.loads((tmp_path / "d" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {path.name for path in (tmp_path / "d" / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    identities = {Sd().vae_identity(str(tmp_path / name), None) for name in ("m.safetensors", "d")}
    assert len(identities) == 1
