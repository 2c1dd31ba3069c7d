import pytest
import torch
from safetensors.torch import save_file

from library.errors import CheckpointError
from library.models.checkpoint import open_tensors
from library.models.scaled_weights import FACTORS, Unscaled

WEIGHT = torch.linspace(-400, 400, 24).reshape(6, 4).to(torch.float8_e4m3fn)
BIAS = torch.arange(6.0).half()


def unscaled(tmp_path, **more):
    save_file({"layer.weight": WEIGHT, "layer.bias": BIAS, **more}, tmp_path / "model.safetensors")
    return Unscaled(open_tensors(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_weight_is_multiplied_by_its_factor(tmp_path, name, shape):
    file = unscaled(tmp_path, **{f"layer.{name}": torch.full(shape, 0.25)})
    assert torch.equal(file.read("layer.weight"), WEIGHT.float() * 0.25)
    assert torch.equal(file.rows("layer.weight", 2, 4), WEIGHT[2:4].float() * 0.25)


def test_what_has_no_factor_is_as_it_is_in_the_file(tmp_path):
    file = unscaled(tmp_path, **{"layer.scale_weight": torch.tensor(0.25), "other.weight": WEIGHT.clone()})
    for name, wanted in (("layer.bias", BIAS), ("other.weight", WEIGHT)):
        assert file.read(name).dtype == wanted.dtype
        assert torch.equal(file.read(name).float(), wanted.float())


def test_factors_and_their_like_are_no_tensors_of_the_model(tmp_path):
    marks = {"scaled_fp8": torch.zeros(2), "layer.scale_input": torch.ones(()), "layer.weight_scale": torch.ones(())}
    assert dict(unscaled(tmp_path, **marks).shapes) == {"layer.weight": (6, 4), "layer.bias": (6,)}


def test_a_weight_with_many_factors_is_refused(tmp_path):
    file = unscaled(tmp_path, **{"layer.weight_scale": torch.ones(6)})
    with pytest.raises(CheckpointError, match=r"layer.weight_scale is \[6\], expected one number") as refusal:
        file.read("layer.weight")
    assert "\n" not in str(refusal.value)
