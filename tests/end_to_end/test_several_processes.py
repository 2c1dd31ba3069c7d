"""Runs of several processes: they train together as one would with the larger batch, and one of them writes."""

from pathlib import Path

import pytest
import torch
from end_to_end.training_runs import (
    Family,
    Pictures,
    arguments,
    events_of,
    launch,
    metadata_of,
    save,
    subset,
    tensors_of,
    write_toml,
)


@pytest.fixture
def config(pictures, tmp_path) -> Path:
    """Write a config of two masked images: one batch of two an epoch."""
    return write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))


def test_two_processes_train_together_and_one_of_them_writes(family: Family, pictures, tmp_path):
    """Six pictures: two batches an epoch, of two pictures for each process and one."""
    for i in range(2):
        save(tmp_path / "images", f"more{i}", torch.full((64, 64, 3), 40 * i, dtype=torch.uint8).numpy(), "more")
    config = write_toml(
        tmp_path / "d.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks),
        subset(pictures.cutouts, alpha_mask=True),
        subset(tmp_path / "images"),
    )
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 1 --d 2\n")
    cache = ("--cache_latents", "--cache_latents_to_disk", "--cache_dir", tmp_path / "cache")
    previews = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_epochs", 1)
    more = (*cache, *previews, "--max_train_epochs", 2, "--save_every_n_epochs", 1, "--report")
    messages = launch(family, 2, arguments(family, tmp_path, config, *more), tmp_path)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["lora-000001.safetensors", "lora.safetensors"]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6
    assert len(events_of(tmp_path / "logs").Scalars("loss/current")) == 4
    assert messages.count("saved ") == 2
    assert messages.count(" masks: ") == 1
    assert len(list((out / "sample").iterdir())) == 4
    assert metadata_of(out / "lora.safetensors")["ss_num_batches_per_epoch"] == "2"
    assert any(tensor.any() for name, tensor in tensors_of(out / "lora.safetensors").items() if "lora_up" in name)


def test_two_processes_may_leave_weights_out_of_a_step(family: Family, config, tmp_path):
    """--clip_skip 2, or SDXL, leaves a text encoder's last layer out of every step, module dropout other modules."""
    more = ("--clip_skip", 2, "--network_args", "module_dropout=0.3", "--max_train_steps", 3)
    launch(family, 2, arguments(family, tmp_path, config, *more), tmp_path)
    trained = tensors_of(tmp_path / "out" / "lora.safetensors")
    unread, read = (trained[f"{layer}mlp_fc1.lora_up.weight"].any() for layer in family.last_layers)
    assert not unread
    assert read


def uneven(pictures: Pictures, folder: Path, batch_size: int) -> Path:
    """Write a config of eight pictures, one of them in a bucket of its own: there, one of two processes is idle."""
    for i in range(3):
        colour = torch.full((64, 64, 3), 40 * i, dtype=torch.uint8)
        save(folder / "images", f"square{i}", colour.numpy(), "more")
    colour = torch.full((64, 128, 3), 99, dtype=torch.uint8)
    save(folder / "images", "wide", colour.numpy(), "wide")
    return write_toml(
        folder / f"uneven{batch_size}.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks),
        subset(folder / "images", num_repeats=1),
        subset(pictures.regularisation, is_reg=True),
        batch_size=batch_size,
        resolution=[128, 128],  # at 64, the tiny model's innermost cell is normalised alone: its gradient is rounding
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=256,
        bucket_reso_steps=64,
    )


HELD = ("--mask_area_norm", 0.5, "--mask_prior_weight", 0.3, "--mask_prior_every", 2)
NOISES = ("--noise_offset", 0.1, "--multires_noise_iterations", 3, "--ip_noise_gamma", 0.1, "--min_snr_gamma", 5)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--cache_latents",), marks=pytest.mark.slow),
        ("--gradient_accumulation_steps", 2, *NOISES, *HELD),
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(more, family: Family, pictures, tmp_path):
    """The same images, noise and timesteps give the same weights and losses; batches need not divide evenly."""
    steps = ("--max_train_epochs", 2, "--prior_loss_weight", 0.5, "--optimizer_type", "SGD", *more)
    messages = launch(
        family, 2, arguments(family, tmp_path / "two", uneven(pictures, tmp_path, 2), *steps), tmp_path / "two"
    )
    assert "2 process(es)" in messages
    argv = arguments(family, tmp_path / "one", uneven(pictures, tmp_path, 4), *steps)
    assert family.run(*argv) == 0
    two, one = (tensors_of(tmp_path / name / "out" / "lora.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    largest = max(float((two[name].float() - one[name].float()).abs().max()) for name in one)
    moved = max(float(tensor.float().abs().max()) for name, tensor in one.items() if "lora_up" in name)
    assert largest < 1e-4 * moved
    for tag in (
        "loss/current",
        "loss/inside",
        "loss/outside",
        "mask/share",
        *(["loss/drift_outside"] * (HELD[0] in more)),
    ):
        curves = [
            [(event.step, event.value) for event in events_of(tmp_path / name / "logs").Scalars(tag)]
            for name in ("two", "one")
        ]
        assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
        rough = 1e-2 if tag == "loss/drift_outside" else 1e-6  # small differences of large numbers
        assert [value for _, value in curves[0]] == pytest.approx([value for _, value in curves[1]], rel=rough)
    numbers = [metadata_of(tmp_path / name / "out" / "lora.safetensors") for name in ("two", "one")]
    assert numbers[0]["ss_steps"] == numbers[1]["ss_steps"]
