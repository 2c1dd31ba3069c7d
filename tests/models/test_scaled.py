import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import CheckpointError
from library.models import sd3_text, t5
from library.models.checkpoint import open_tensors
from library.models.scaled import unscaled
from library.models.sd3 import Sd3
from tests.models.sd3_text_encoders import t5_encoder, write_encoder
from tests.tiny_models import tiny_sd3

TOKENS = torch.tensor([[3, 9, 1202, 13, 3, 9, 1712, 1, 0, 0]])
UNSCALED = ("embed", "shared", "bias", "vae")
NAMES = ["scale_weight", "weight_scale"]


def write_scaled(stored, folder, name, shape=()):
    """Write linear layers as float8, scaled to its range; return the file, and one with the numbers that it means."""
    written, meant = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for key, tensor in stored.items():
        if tensor.dim() != 2 or not key.endswith("weight") or any(part in key for part in UNSCALED):
            written[key] = meant[key] = tensor
            continue
        scale = tensor.abs().max() / 448
        written[key] = (tensor / scale).to(torch.float8_e4m3fn)
        written[key.removesuffix("weight") + name] = scale.reshape(shape)
        written[key.removesuffix("weight") + "scale_input"] = torch.ones(())
        meant[key] = written[key].float() * scale
    save_file(written, folder / "scaled.safetensors")
    save_file(meant, folder / "meant.safetensors")
    return open_tensors(folder / "scaled.safetensors"), open_tensors(folder / "meant.safetensors")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_encoder(t5_encoder(), tmp_path_factory.mktemp("scaled") / "t5.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_scaled_t5_computes_what_its_numbers_mean(name, shape, path, tmp_path):
    scaled, meant = write_scaled(load_file(path), tmp_path, name, shape)
    states = [t5.encode(sd3_text.build(file, 2, torch.float32), TOKENS) for file in (scaled, meant)]
    assert torch.equal(*states)


def test_rows_and_shapes_are_those_of_a_file_without_scales(path, tmp_path):
    scaled, meant = write_scaled(load_file(path), tmp_path, NAMES[0])
    found = unscaled(scaled)
    assert found.shapes == meant.shapes
    for name in meant.shapes:
        assert torch.equal(found.rows(name, 1, 3), meant.rows(name, 1, 3)), name
    assert sd3_text.fingerprint(scaled, 2) == sd3_text.fingerprint(meant, 2)


def test_a_file_without_scales_is_left_as_it_is(path):
    file = open_tensors(path)
    assert unscaled(file) is file


@pytest.mark.parametrize(("name", "shape"), [("weight_scale_inv", (2, 2)), ("weight_scale", (8,))])
def test_several_scales_for_one_weight_are_refused(name, shape, tmp_path):
    save_file({"a.weight": torch.ones(8, 8), f"a.{name}": torch.ones(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"a\.{name} holds several scales for one weight"):
        unscaled(open_tensors(tmp_path / "a.safetensors"))


@torch.no_grad()
def test_a_whole_model_in_scaled_float8_is_what_its_numbers_mean(tmp_path):
    scaled, meant = write_scaled(load_file(tiny_sd3("medium")), tmp_path, NAMES[0])
    found, expected = (
        Sd3(checkpoint=str(file.path)).load(str(file.path), None, torch.float32) for file in (scaled, meant)
    )
    models = zip((found.denoiser, *found.text_encoders), (expected.denoiser, *expected.text_encoders), strict=True)
    for model, other in models:
        theirs = other.state_dict()
        assert len(theirs) > 20
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
