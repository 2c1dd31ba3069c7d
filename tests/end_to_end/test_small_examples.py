"""The examples of SDXL and SD3.5: the denoiser alone on little memory, and with text encoders."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from end_to_end.training_runs import SD35M, SDXL, Family, differing, tensors_of

from examples.sd3 import run as sd3
from examples.sdxl import run as sdxl

NUM_STEPS = 2

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Example:
    """An example, the names of its two networks, and which text encoders it saves."""

    family: Family
    run: ModuleType
    alone: str
    together: str
    saved: tuple[str, ...] = ()


EXAMPLES = (
    Example(SDXL, sdxl, "unet-only", "with-text-encoders"),
    Example(SD35M, sd3, "mmdit-only", "with-clip", ("with-clip_clip_g.safetensors", "with-clip_clip_l.safetensors")),
)


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda example: example.family.script)
def example(request) -> Example:
    """Each example in turn."""
    return request.param


@pytest.fixture(scope="module")
def output(example: Example, tmp_path_factory) -> Path:
    """The folder that the example leaves behind."""
    folder = tmp_path_factory.mktemp(example.family.script)
    for script, *argv in example.run.commands(example.family.checkpoint(), folder, NUM_STEPS):
        assert script == f"{example.family.script}.py"
        assert example.family.run(*argv) == 0
    return folder


def kinds(file: Path) -> set[str]:
    """Return what the modules of a file that were trained are of: "lora_unet", "lora_te1", "lora_te2"."""
    changed = {key for key, tensor in tensors_of(file).items() if "lora_up" in key and tensor.any()}
    return {"_".join(name.split("_")[:2]) for name in changed}


def test_a_file_holds_what_was_trained(example: Example, output: Path):
    assert kinds(output / f"{example.alone}.safetensors") == {"lora_unet"}
    assert kinds(output / f"{example.together}.safetensors") == {"lora_unet", "lora_te1", "lora_te2"}


def test_text_encoders_are_saved_beside_their_network_where_that_is_asked_for(example: Example, output: Path):
    assert sorted(path.name for path in output.glob("*_clip_*.safetensors")) == sorted(example.saved)


def test_a_second_run_needs_no_text_encoder_and_is_the_same(example: Example, output: Path, capfd):
    """What they made is found in the cache; masks of both kinds are used in either run."""
    command = example.run.commands(example.family.checkpoint(), output, NUM_STEPS)[0]
    before = tensors_of(output / f"{example.alone}.safetensors")
    assert example.family.run(*command[1:]) == 0
    assert not differing(tensors_of(output / f"{example.alone}.safetensors"), before)
    told = capfd.readouterr().err
    assert re.search(r"text: \d+ entries up to date, 0 encoded", told)
    assert re.search(r"latents: 14 entries up to date, 0 masks changed, 0 encoded", told)
    assert "masks: 14 of 14 images (6 files, 8 alpha)" in told
