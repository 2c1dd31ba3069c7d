"""Files that no run can go on from are found before there is a model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import CheckpointError
from networks import soundness

NAMES = ("lora_te_x.lora_down.weight", "lora_te_x.lora_up.weight", "lora_te_x.alpha")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_of_any_format_are_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(2, 2, dtype=dtype) for name in NAMES}
    save_file(tensors, tmp_path / "a.safetensors")
    soundness.check(str(tmp_path / "a.safetensors"), "--network_weights", ())
    tensors[NAMES[1]][1, 1] = float("inf")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"--network_weights .*a\.safetensors: lora_te_x\.lora_up\.weight holds"):
        soundness.check(str(tmp_path / "a.safetensors"), "--network_weights", ())


def test_whole_numbers_are_no_reason_to_refuse(tmp_path: Path) -> None:
    save_file({"lora_te_x.lora_up.weight": torch.ones(2, 2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    soundness.check(str(tmp_path / "a.safetensors"), "--base_weights", ())


@pytest.mark.parametrize("name", ["model.diffusion_model.out.2.weight", "joint_blocks.0.x_block.attn.qkv.weight"])
def test_a_whole_model_is_no_network(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is a whole model"):
        soundness.check(str(tmp_path / "a.safetensors"), "--network_weights", ())


def test_a_file_for_another_family_names_its_script(tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in NAMES}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"--base_weights .* is a thing\. Train it with thing\.py"):
        soundness.check(str(tmp_path / "a.safetensors"), "--base_weights", (("lora_te_", "a thing", "thing.py"),))
