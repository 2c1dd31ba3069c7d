"""The example of SDXL: the U-Net alone on little memory, and the U-Net with both text encoders."""

import re

import pytest
from end_to_end.training_runs import SDXL, differing, tensors_of

from examples.sdxl import run

NUM_STEPS = 2

pytestmark = pytest.mark.slow


def kinds(names):
    """Return what the modules of a file are of: "lora_unet", "lora_te1", "lora_te2"."""
    return {"_".join(name.split("_")[:2]) for name in names}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder that the example leaves behind."""
    folder = tmp_path_factory.mktemp("sdxl")
    for script, *argv in run.commands(SDXL.checkpoint(), folder, NUM_STEPS):
        assert script == f"{SDXL.script}.py"
        assert SDXL.run(*argv) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "trained"),
    [("unet-only", {"lora_unet"}), ("with-text-encoders", {"lora_unet", "lora_te1", "lora_te2"})],
)
def test_a_file_holds_what_was_trained(output, name, trained):
    changed = {
        key for key, tensor in tensors_of(output / f"{name}.safetensors").items() if "lora_up" in key and tensor.any()
    }
    assert kinds(changed) == trained


def test_a_second_run_needs_no_text_encoder_and_is_the_same(output, capfd):
    """What they made is found in the cache; masks of both kinds are used in either run."""
    command = run.commands(SDXL.checkpoint(), output, NUM_STEPS)[0]
    before = tensors_of(output / "unet-only.safetensors")
    assert SDXL.run(*command[1:]) == 0
    assert not differing(tensors_of(output / "unet-only.safetensors"), before)
    told = capfd.readouterr().err
    assert re.search(r"text: \d+ entries up to date, 0 encoded", told)
    assert re.search(r"latents: 14 entries up to date, 0 masks changed, 0 encoded", told)
    assert "masks: 14 of 14 images (6 files, 8 alpha)" in told
