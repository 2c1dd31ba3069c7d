"""Runs with the frozen weights in float8."""

from pathlib import Path

import pytest
import torch
from end_to_end.conftest import Train
from end_to_end.training_runs import Pictures, Trained, differing, events_of, subset, write_toml
from safetensors.torch import save_file

from library.models import float8
from library.models.family import Parts
from library.training.assembly import Setting

HALF = ("--mixed_precision", "bf16")


@pytest.fixture
def config(tmp_path: Path, pictures: Pictures) -> Path:
    return write_toml(tmp_path / "data.toml", subset(pictures.photos, conditioning_data_dir=pictures.photo_masks))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Parts]:
    """The models of every run in the test, in their order, as they were after it."""
    from library.training import loading

    seen: list[Parts] = []
    settle = loading.settle_weights

    def watched(setting: Setting, parts: Parts) -> None:
        settle(setting, parts)
        seen.append(parts)

    monkeypatch.setattr(loading, "settle_weights", watched)
    return seen


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    """Return the formats of the weights of a model's layers, without those of a network."""
    return {layer.weight.dtype for layer in model.modules() if isinstance(layer, torch.nn.Linear)}


def test_a_lora_learns_on_float8_nearly_what_it_learns_on_bf16(train: Train, config: Path) -> None:
    """The file is of the usual names, formats and shapes: what is trained is never in float8."""
    small, plain = (train(config, *HALF, *more, name=f"run{len(more)}") for more in (["--fp8_base"], []))
    assert {name: (t.shape, t.dtype) for name, t in small.tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in plain.tensors.items()
    }
    assert differing(small.tensors, plain.tensors)
    assert small.losses == pytest.approx(plain.losses, rel=0.05)
    assert (small.metadata["ss_fp8_base"], plain.metadata["ss_fp8_base"]) == ("True", "False")


def test_fp8_base_stores_text_encoders_too_and_fp8_base_unet_the_unet_alone(
    train: Train, config: Path, loaded: list[Parts]
) -> None:
    for number, flags in enumerate((["--fp8_base"], ["--fp8_base_unet"], ["--fp8_base", "--fp8_base_unet"])):
        train(config, *HALF, *flags, "--max_train_steps", 1, name=f"run{number}")
    kept = [(dtypes(parts.denoiser), dtypes(parts.text_encoders[0])) for parts in loaded]
    small, half = {torch.float8_e4m3fn}, {torch.bfloat16}
    assert kept == [(small, small), (small, half), (small, half)]


@pytest.mark.slow
def test_previews_validation_checkpointing_and_resuming_work_on_float8(
    train: Train, config: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    more = ("--fp8_base", "--sample_prompts", prompts, "--sample_every_n_steps", 2, "--gradient_checkpointing")
    more += ("--validation_split", 0.5, "--validation_seed", 1, "--validate_every_n_steps", 2, "--max_train_steps", 4)
    whole = train(config, *HALF, *more, "--save_state", "--save_every_n_steps", 2, name="whole")
    assert len(list((whole.folder / "out" / "sample").glob("*.png"))) == 2
    assert events_of(whole.folder / "logs").Scalars("loss/validation/step_average")
    state = whole.folder / "out" / "lora-step00000002-state"
    resumed: Trained = train(config, *HALF, *more, "--resume", state, name="resumed")
    assert not differing(whole.tensors, resumed.tensors)


def test_base_weights_are_merged_before_the_weights_are_rounded(
    train: Train, config: Path, loaded: list[Parts], plain_run: Trained, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    torch.manual_seed(0)
    made = {name: t if name.endswith("alpha") else torch.randn_like(t) * 0.1 for name, t in plain_run.tensors.items()}
    save_file(made, base)
    for name, more in (("small", ["--fp8_base"]), ("plain", [])):
        train(config, *HALF, *more, "--base_weights", base, "--max_train_steps", 1, name=name)
    small, plain = ({n: p for n, p in parts.denoiser.named_parameters() if "lora" not in n} for parts in loaded)
    stored = [name for name, weight in small.items() if weight.dtype == torch.float8_e4m3fn]
    assert stored
    for name in stored:
        assert torch.equal(small[name].float(), float8.rounded(plain[name]).float()), name
