"""Runs whose processes share out what is trained: FSDP and DeepSpeed give what plain processes give."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from end_to_end.training_runs import (
    ROOT,
    Family,
    arguments,
    differing,
    environment,
    subset,
    tensors_of,
    write_toml,
)

TIMEOUT_S = 500
STEPS = ("--max_train_steps", 3, "--optimizer_type", "SGD", "--save_every_n_steps", 1)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as accelerate launch has it
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
DEEPSPEED = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"
)


@pytest.fixture
def config(pictures, tmp_path) -> Path:
    """Write a config of four masked images."""
    return write_toml(
        tmp_path / "d.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks),
        subset(pictures.cutouts, alpha_mask=True),
    )


def launch(family: Family, argv: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    """Train with two processes on the CPU."""
    scripts = [str(Path(__file__).with_name("shared_on_cpu.py")), str(ROOT / f"{family.script}.py")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, *(scripts if variables else scripts[1:]), *argv],
        capture_output=True,
        text=True,
        env={**environment(folder), **variables},
        timeout=TIMEOUT_S,
        check=False,
    )


def files_of(family: Family, config: Path, folder: Path, variables: dict[str, str], *more: object) -> dict[str, dict]:
    """Train with two processes; return the tensors of each file that was saved, by name."""
    done = launch(family, arguments(family, folder, config, *STEPS, *more), folder, variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.name: tensors_of(path) for path in sorted((folder / "out").glob("*.safetensors"))}


@pytest.mark.slow
def test_fsdp_saves_the_same_files_as_plain_processes(family: Family, config, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    between = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 1, "--validation_split", 0.3)
    between += ("--validate_every_n_steps", 1, "--clip_skip", 2, "--mask_prior_weight", 0.5, "--mask_prior_every", 2)
    plain = files_of(family, config, tmp_path / "plain", {}, *between)
    shared = files_of(family, config, tmp_path / "shared", FSDP, *between)
    assert len(plain) == 3
    assert not [name for name in plain if differing(plain[name], shared[name])]
    assert len(list((tmp_path / "shared" / "out" / "sample").iterdir())) == 3


@pytest.mark.slow
def test_what_is_promised_to_ddp_leaves_the_files_as_they_are(family: Family, config, tmp_path):
    accumulated = ("--gradient_accumulation_steps", 2)
    promises = ("--ddp_static_graph", "--ddp_gradient_as_bucket_view", "--ddp_timeout", 5)
    plain = files_of(family, config, tmp_path / "plain", {}, *accumulated)
    promised = files_of(family, config, tmp_path / "promised", {}, *accumulated, *promises)
    assert not [name for name in plain if differing(plain[name], promised[name])]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_saves_the_same_files_as_plain_processes(stage, family: Family, config, tmp_path):
    accumulated = ("--gradient_accumulation_steps", 2, "--max_grad_norm", 0)
    plain = files_of(family, config, tmp_path / "plain", {}, *accumulated)
    more = ("--deepspeed", "--zero_stage", stage)
    shared = files_of(family, config, tmp_path / "shared", DEEPSPEED, *accumulated, *more)
    assert not [name for name in plain if differing(plain[name], shared[name])]
