"""A masked LoRA for SDXL on the example pictures, from the root of the repository.

python examples/sdxl/run.py

Makes a small model in SDXL's true layout and trains on it twice, as one would train the real one: on the U-Net alone
with everything cached, which takes the least memory, and on the U-Net and both text encoders.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the project's folder is two levels up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.running import Example, run_all

MODEL = Path("examples/embedded_model/made/tiny-sdxl.safetensors")
EXAMPLE = Example(Path("examples/sdxl"), "sdxl_train_network.py", ("--network_module=networks.lora",))
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


def commands(model: Path, output: Path, num_steps: int) -> list[list[str]]:
    """Return both commands: with the least memory, and with the text encoders."""
    return [
        EXAMPLE.training(
            model, output, "unet-only", num_steps, [*ON_LITTLE_MEMORY, f"--cache_dir={output.as_posix()}/cache"]
        ),
        EXAMPLE.training(model, output, "with-text-encoders", num_steps, WITH_TEXT_ENCODERS),
    ]


if __name__ == "__main__":
    sys.exit(run_all("examples/embedded_model/sdxl.py", MODEL, commands(MODEL, OUTPUT, NUM_STEPS)))
