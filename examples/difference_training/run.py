"""Difference training on the example pictures, both ways, from the root of the repository.

python examples/difference_training/run.py

A base LoRA learns the frame and the print of the example photos. Then a difference LoRA learns the cat from a photo
that has them too, on top of the base LoRA: once with --base_weights, once on a model that the base LoRA was merged
into. The two difference LoRAs are the same, which is checked in the end.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

HERE = Path(__file__).resolve().parent
PHOTOS, MASKS = ROOT / "examples" / "data" / "photos", ROOT / "examples" / "data" / "photos_mask"
SUBJECT = "cat"
MODEL = Path("examples/embedded_model/made/tiny-sd.safetensors")
OUTPUT = Path("output/difference_training")
NUM_STEPS = 20


def prepare(output: Path) -> None:
    """Copy the photos with the cat and those without it into folders of their own, and turn the masks round."""
    from PIL import Image, ImageOps

    for folder in ("style", "style_masks", "subject"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for photo in sorted(PHOTOS.glob("*.jpg")):
        folder = output / ("subject" if photo.stem == SUBJECT else "style")
        for file in (photo, photo.with_suffix(".txt")):
            shutil.copyfile(file, folder / file.name)
        if photo.stem != SUBJECT:
            with Image.open(MASKS / f"{photo.stem}.png") as mask:
                ImageOps.invert(mask.convert("L")).save(output / "style_masks" / f"{photo.stem}.png")
    for name in ("dataset_base.toml", "dataset_difference.toml"):
        text = (HERE / name).read_text(encoding="utf-8")
        text = text.replace(OUTPUT.as_posix(), output.as_posix())
        (output / name).write_text(text, encoding="utf-8")


def training(model: Path, dataset: str, name: str, output: Path, num_steps: int) -> list[str]:
    """Return train_network.py and its options."""
    return [
        "train_network.py",
        f"--pretrained_model_name_or_path={model.as_posix()}",
        f"--dataset_config={(output / dataset).as_posix()}",
        "--network_module=networks.lora",
        "--network_dim=8",
        "--network_alpha=8",
        "--optimizer_type=AdamW",
        "--learning_rate=1e-3",
        f"--max_train_steps={num_steps}",
        "--max_data_loader_n_workers=0",
        "--seed=1",
        "--sdpa",
        f"--output_dir={output.as_posix()}",
        f"--output_name={name}",
    ]


def commands(model: Path, output: Path, num_steps: int) -> list[list[str]]:
    """Return the four commands: the base LoRA, the difference LoRA one way, the merged model, and the other way."""
    base, merged = output / "base.safetensors", output / "merged-model.safetensors"
    return [
        [*training(model, "dataset_base.toml", "base", output, num_steps), "--masked_loss"],
        [
            *training(model, "dataset_difference.toml", "difference", output, num_steps),
            f"--base_weights={base.as_posix()}",
        ],
        [
            "networks/merge_lora.py",
            f"--sd_model={model.as_posix()}",
            f"--models={base.as_posix()}",
            "--ratios=1",
            "--save_precision=float",
            f"--save_to={merged.as_posix()}",
        ],
        training(merged, "dataset_difference.toml", "difference-on-merged-model", output, num_steps),
    ]


def largest_difference(output: Path) -> float:
    """Return the largest difference between the tensors of the two difference LoRAs."""
    from safetensors.torch import load_file

    one, other = (load_file(output / f"{name}.safetensors") for name in ("difference", "difference-on-merged-model"))
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main() -> int:
    """Run it all and return the exit code."""
    if not (ROOT / MODEL).is_file():
        (ROOT / MODEL).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "examples/embedded_model/make.py", str(MODEL)], cwd=ROOT, check=True)
    prepare(ROOT / OUTPUT)
    for command in commands(MODEL, OUTPUT, NUM_STEPS):
        print(f"python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    print(f"The two difference LoRAs differ by {largest_difference(ROOT / OUTPUT):g} at most.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
