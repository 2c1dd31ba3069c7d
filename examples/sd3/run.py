"""A masked LoRA for SD3.5 on the example pictures, from the root of the repository.

python examples/sd3/run.py

Makes a small model in SD3.5-medium's true layout and trains on it twice, as one would train the real one: on the MMDiT
alone with everything cached, and on the MMDiT and both CLIP text encoders beside T5's cached text.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the project's folder is two levels up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.running import Example, run_all

MODEL = Path("examples/embedded_model/made/tiny-sd35-medium.safetensors")
EXAMPLE = Example(
    Path("examples/sd3"),
    "sd3_train_network.py",
    ("--weighting_scheme=sigma_sqrt", "--network_module=networks.lora_sd3", "--optimizer_type=AdamW"),
)
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


def commands(model: Path, output: Path, num_steps: int) -> list[list[str]]:
    """Return both commands: with the least memory, and with both CLIP text encoders."""
    return [
        EXAMPLE.training(
            model, output, "mmdit-only", num_steps, [*ON_LITTLE_MEMORY, f"--cache_dir={output.as_posix()}/cache"]
        ),
        EXAMPLE.training(model, output, "with-clip", num_steps, WITH_CLIP),
    ]


if __name__ == "__main__":
    sys.exit(run_all("examples/embedded_model/sd3.py", MODEL, commands(MODEL, OUTPUT, NUM_STEPS)))
