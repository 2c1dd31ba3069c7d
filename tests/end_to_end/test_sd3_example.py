"""The example of SD3.5: the MMDiT alone on little memory, and the MMDiT with CLIP beside T5's cached text."""

import re

import pytest
from end_to_end.training_runs import SD35M, differing, tensors_of

from examples.sd3 import run

NUM_STEPS = 2

pytestmark = pytest.mark.slow


def kinds(names):
    """Return what the modules of a file are of: "lora_unet", "lora_te1", "lora_te2"."""
    return {"_".join(name.split("_")[:2]) for name in names}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder that the example leaves behind."""
    folder = tmp_path_factory.mktemp("sd3")
    for script, *argv in run.commands(SD35M.checkpoint(), folder, NUM_STEPS):
        assert script == f"{SD35M.script}.py"
        assert SD35M.run(*argv) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "trained"),
    [("mmdit-only", {"lora_unet"}), ("with-clip", {"lora_unet", "lora_te1", "lora_te2"})],
)
def test_a_file_holds_what_was_trained(output, name, trained):
    changed = {
        key for key, tensor in tensors_of(output / f"{name}.safetensors").items() if "lora_up" in key and tensor.any()
    }
    assert kinds(changed) == trained


def test_the_text_encoders_that_were_trained_are_saved_beside_their_network(output):
    saved = {path.name for path in output.glob("*_clip_*.safetensors")}
    assert saved == {"with-clip_clip_l.safetensors", "with-clip_clip_g.safetensors"}


def test_a_second_run_needs_no_text_encoder_and_is_the_same(output, capfd):
    """What they made is found in the cache; masks of both kinds are used in either run."""
    command = run.commands(SD35M.checkpoint(), output, NUM_STEPS)[0]
    before = tensors_of(output / "mmdit-only.safetensors")
    assert SD35M.run(*command[1:]) == 0
    assert not differing(tensors_of(output / "mmdit-only.safetensors"), before)
    told = capfd.readouterr().err
    assert re.search(r"text: \d+ entries up to date, 0 encoded", told)
    assert re.search(r"latents: 14 entries up to date, 0 masks changed, 0 encoded", told)
    assert "masks: 14 of 14 images (6 files, 8 alpha)" in told
