"""A masked LoRA for SDXL on the example pictures, from the root of the repository.

python examples/sdxl/run.py

Makes a small model in SDXL's true layout and trains on it twice, as one would train the real one: on the U-Net alone
with everything cached, which takes the least memory, and on the U-Net and both text encoders.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path("examples/embedded_model/made/tiny-sdxl.safetensors")
DATASET = Path("examples/sdxl/dataset.toml")
PROMPTS = Path("examples/sdxl/prompts.txt")
OUTPUT = Path("output/sdxl")
NUM_STEPS = 20

# What spares memory on a GPU. Text that is encoded before training cannot be trained.
ON_LITTLE_MEMORY = (
    "--network_train_unet_only",
    "--cache_text_encoder_outputs",
    "--cache_text_encoder_outputs_to_disk",
    "--cache_latents_to_disk",
    "--gradient_checkpointing",
    "--optimizer_type=Adafactor",
    "--optimizer_args",
    "relative_step=False",
    "scale_parameter=False",
    "warmup_init=False",
    "--max_grad_norm=0",
)
WITH_TEXT_ENCODERS = (
    "--unet_lr=1e-3",
    "--text_encoder_lr1=1e-4",
    "--text_encoder_lr2=1e-4",
    "--optimizer_type=AdamW",
)


def training(model: Path, output: Path, name: str, num_steps: int, more: Sequence[str]) -> list[str]:
    """Return sdxl_train_network.py and its options."""
    return [
        "sdxl_train_network.py",
        f"--pretrained_model_name_or_path={model.as_posix()}",
        f"--dataset_config={DATASET.as_posix()}",
        "--masked_loss",
        "--cache_latents",
        "--network_module=networks.lora",
        "--network_dim=8",
        "--network_alpha=8",
        "--learning_rate=1e-3",
        f"--max_train_steps={num_steps}",
        "--max_data_loader_n_workers=0",
        "--mixed_precision=bf16",
        "--seed=1",
        "--sdpa",
        f"--sample_prompts={PROMPTS.as_posix()}",
        f"--sample_every_n_steps={num_steps}",
        f"--output_dir={output.as_posix()}",
        f"--output_name={name}",
        "--report",
        *more,
    ]


def commands(model: Path, output: Path, num_steps: int) -> list[list[str]]:
    """Return both commands: with the least memory, and with the text encoders."""
    return [
        training(model, output, "unet-only", num_steps, [*ON_LITTLE_MEMORY, f"--cache_dir={output.as_posix()}/cache"]),
        training(model, output, "with-text-encoders", num_steps, WITH_TEXT_ENCODERS),
    ]


def main() -> int:
    """Run it all and return the exit code."""
    if not (ROOT / MODEL).is_file():
        (ROOT / MODEL).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "examples/embedded_model/sdxl.py", str(MODEL)], cwd=ROOT, check=True)
    for command in commands(MODEL, OUTPUT, NUM_STEPS):
        print(f"python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
