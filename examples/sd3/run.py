"""A masked LoRA for SD3.5 on the example pictures, from the root of the repository.

python examples/sd3/run.py

Makes a small model in SD3.5-medium's true layout and trains on it twice, as one would train the real one: on the MMDiT
alone with everything cached, and on the MMDiT and both CLIP text encoders beside T5's cached text.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path("examples/embedded_model/made/tiny-sd35-medium.safetensors")
DATASET = Path("examples/sd3/dataset.toml")
PROMPTS = Path("examples/sd3/prompts.txt")
OUTPUT = Path("output/sd3")
NUM_STEPS = 16

# What spares memory on a GPU. Text that is encoded before training cannot be trained.
ON_LITTLE_MEMORY = (
    "--network_train_unet_only",
    "--cache_text_encoder_outputs_to_disk",
    "--cache_latents_to_disk",
    "--gradient_checkpointing",
    "--blocks_to_swap=1",
)
WITH_CLIP = (
    "--unet_lr=1e-3",
    "--text_encoder_lr=1e-4",
    "--cache_text_encoder_outputs",  # T5's alone, as CLIP is trained
    "--t5_dropout_rate=0.1",
    "--save_clip",
)


def training(model: Path, output: Path, name: str, num_steps: int, more: Sequence[str]) -> list[str]:
    """Return sd3_train_network.py and its options."""
    return [
        "sd3_train_network.py",
        f"--pretrained_model_name_or_path={model.as_posix()}",
        f"--dataset_config={DATASET.as_posix()}",
        "--masked_loss",
        "--cache_latents",
        "--weighting_scheme=sigma_sqrt",
        "--network_module=networks.lora_sd3",
        "--network_dim=8",
        "--network_alpha=8",
        "--learning_rate=1e-3",
        "--optimizer_type=AdamW",
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
    """Return both commands: with the least memory, and with both CLIP text encoders."""
    return [
        training(model, output, "mmdit-only", num_steps, [*ON_LITTLE_MEMORY, f"--cache_dir={output.as_posix()}/cache"]),
        training(model, output, "with-clip", num_steps, WITH_CLIP),
    ]


def main() -> int:
    """Run it all and return the exit code."""
    if not (ROOT / MODEL).is_file():
        (ROOT / MODEL).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "examples/embedded_model/sd3.py", str(MODEL)], cwd=ROOT, check=True)
    for command in commands(MODEL, OUTPUT, NUM_STEPS):
        print(f"python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
