"""Full fine-tuning from end to end: train_db.py trains, masks, saves and stops its text encoder as its guide says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from end_to_end.conftest import masks_and_alpha
from end_to_end.training_runs import (
    SD15,
    SD21_V,
    Family,
    Pictures,
    Trained,
    differing,
    events_of,
    subset,
    tensors_of,
    write_toml,
)
from safetensors.torch import load_file, save_file

from library.cli import main
from library.models.sd import Sd

METHOD = "library.training.full_model:FullModel"
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
STILL = ("--optimizer_args", "weight_decay=0")  # what has no gradient stays as it is to the bit

Full = Callable[..., Trained]


def words(family: Family, folder: Path, dataset_config: Path | None, *more: object) -> list[str]:
    """Return the command line of a short run."""
    argv: list[object] = ["--pretrained_model_name_or_path", family.checkpoint(), "--output_dir", folder / "out"]
    argv += ["--output_name", "lora", "--learning_rate", "1e-4", "--max_train_steps", 2, "--seed", 7]
    argv += ["--max_data_loader_n_workers", 0, "--logging_dir", folder / "logs"]
    argv += [f"--{switch}" for switch in family.switches]
    argv += [] if dataset_config is None else ["--dataset_config", dataset_config]
    return [str(word) for word in [*argv, *more]]


@pytest.fixture
def full(tmp_path: Path) -> Full:
    """Train a whole model in a folder of its own; the run must end well."""

    def run(dataset_config: Path | None, *more: object, name: str = "run", family: Family = SD15) -> Trained:
        argv = words(family, tmp_path / name, dataset_config, *more)
        assert main("train_db", family.place, argv, method=METHOD) == 0
        return Trained(tmp_path / name, tuple(argv))

    return run


@pytest.fixture
def config(pictures: Pictures, tmp_path: Path) -> Path:
    """Write a config with masks of both kinds."""
    return masks_and_alpha(tmp_path, pictures)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Return which parts of a model have changed: how the names begin."""
    names = differing(before, after)
    assert all(name.startswith((UNET, TEXT, VAE)) for name in names)
    return {part for part in (UNET, TEXT, VAE) if any(name.startswith(part) for name in names)}


def source(family: Family = SD15) -> dict[str, torch.Tensor]:
    """Return the tensors of the tiny model."""
    return load_file(family.checkpoint())


# ---- what learns --------------------------------------------------------------------------------------------------
def test_the_text_encoder_alone_may_learn(full: Full, config: Path) -> None:
    run = full(config, "--learning_rate", 0, "--learning_rate_te", "1e-4")
    assert changed(source(), run.tensors) == {TEXT}
    assert "lr/unet" not in events_of(run.folder / "logs").Tags()["scalars"]


def test_captions_encoded_before_training_are_saved_with_the_encoder_as_it_was(full: Full, config: Path) -> None:
    given = ("--stop_text_encoder_training", 0)
    plain = full(config, *given, name="plain")
    cached = full(config, *given, "--cache_text_encoder_outputs", name="cached")
    assert differing(plain.tensors, cached.tensors) == []


def test_the_text_encoder_has_a_rate_of_its_own(full: Full, config: Path) -> None:
    run = full(config, "--learning_rate_te", "1e-5")
    assert run.curve("lr/unet") == pytest.approx([1e-4] * 2)
    assert run.curve("lr/text_encoder") == pytest.approx([1e-5] * 2)
    faster = full(config, "--learning_rate_te", "1e-3", name="faster")
    moved = [max((t - source()[name]).abs().max() for name, t in each.tensors.items() if name.startswith(TEXT)
                 and t.is_floating_point()) for each in (run, faster)]  # fmt: skip
    assert moved[1] > 20 * moved[0]


def test_images_whose_output_is_preserved_have_no_loss_at_first(full: Full, pictures, tmp_path) -> None:
    own = subset(pictures.photos, **{"custom_attributes.diff_output_preservation": True})
    losses = full(write_toml(tmp_path / "d.toml", own), "--max_train_steps", 1).losses
    assert losses == pytest.approx([0], abs=1e-10)


# ---- masks --------------------------------------------------------------------------------------------------------
def test_what_is_masked_out_is_held_to_the_model_before_the_training(full: Full, pictures, tmp_path) -> None:
    """A copy of it is kept: nothing has moved in the first step, and a resumed run is held to the same model."""
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos, conditioning_data_dir=pictures.photo_masks))
    more = ("--mask_prior_weight", 1, "--max_train_steps", 3)
    whole = full(config, *more, "--save_every_n_steps", 2, "--save_state", name="whole")
    drift = whole.curve("loss/drift_outside")
    assert drift[0] < 1e-10 < drift[1]
    state = whole.folder / "out" / "lora-step00000002-state"
    resumed = full(config, *more, "--resume", state, name="resumed")
    assert resumed.curve("loss/drift_outside") == drift[2:]
    assert not differing(whole.tensors, resumed.tensors)


@pytest.mark.parametrize("switch", [(), ("--masked_loss",)], ids=["by the config", "by the option"])
def test_what_is_painted_black_teaches_nothing(switch, full: Full, pictures: Pictures, tmp_path: Path) -> None:
    config = write_toml(
        tmp_path / "d.toml", subset(pictures.photos, conditioning_data_dir=pictures.black_masks), batch_size=1
    )
    run = full(config, *switch, *STILL)
    assert changed(source(), run.tensors) == set()


def test_black_pixels_are_not_looked_at(full: Full, pictures: Pictures, tmp_path: Path) -> None:
    """Half of each picture is painted out: of its loss, half is left."""
    whole = write_toml(tmp_path / "whole.toml", subset(pictures.photos))
    half = write_toml(tmp_path / "half.toml", subset(pictures.photos, conditioning_data_dir=pictures.photo_masks))
    white, black = full(whole, name="white"), full(half, "--masked_loss", name="black")
    assert black.losses[0] == pytest.approx(0.5 * white.losses[0], rel=0.2)
    assert changed(white.tensors, black.tensors) == {UNET, TEXT}


def test_masks_work_beside_regularisation_images(full: Full, pictures: Pictures, tmp_path: Path) -> None:
    own = subset(pictures.cutouts, alpha_mask=True, class_tokens="shs cat")
    config = write_toml(tmp_path / "d.toml", own, subset(pictures.regularisation, is_reg=True, class_tokens="cat"))
    run = full(config, "--prior_loss_weight", 0.5, "--masked_loss")
    assert changed(source(), run.tensors) == {UNET, TEXT}


# ---- files --------------------------------------------------------------------------------------------------------
def test_a_saved_model_is_complete_and_trains_on(full: Full, config: Path) -> None:
    run = full(config)
    assert run.tensors.keys() == source().keys()
    assert {key.partition(".")[0] for key in run.metadata if key != "format"} == {"modelspec"}
    assert run.metadata["modelspec.architecture"] == "stable-diffusion-v1"
    again = full(config, "--pretrained_model_name_or_path", run.file, name="again")
    assert changed(run.tensors, again.tensors) == {UNET, TEXT}


def test_extra_tensors_of_the_source_come_through(full: Full, config: Path, tmp_path: Path) -> None:
    extra = {"model_ema.decay": torch.tensor(0.9999), "alphas_cumprod": torch.linspace(1, 0, 10)}
    save_file({**source(), **extra}, tmp_path / "source.safetensors")
    run = full(config, "--pretrained_model_name_or_path", tmp_path / "source.safetensors", "--save_precision", "fp16")
    assert all(torch.equal(run.tensors[name], tensor) for name, tensor in extra.items())
    assert run.tensors[f"{UNET}out.2.weight"].dtype == torch.float16


@pytest.mark.parametrize("form", [None, "ckpt", "diffusers", "diffusers_safetensors"])
def test_a_model_from_a_folder_is_saved_in_every_form(form, full: Full, config: Path) -> None:
    more = () if form is None else ("--save_model_as", form)
    run = full(config, "--pretrained_model_name_or_path", SD15.folder(), *more)
    path = run.folder / "out" / ("lora.ckpt" if form == "ckpt" else "lora")
    assert path.is_file() if form == "ckpt" else (path / "model_index.json").is_file()
    loaded, before = Sd().load(str(path), None, torch.float32), SD15.load()[1]
    assert differing(dict(before.denoiser.state_dict()), dict(loaded.denoiser.state_dict()))


def test_a_pickled_source_gives_a_pickled_model_unless_told_otherwise(full: Full, config: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": source(), "global_step": 1000, "epoch": 3}, tmp_path / "source.ckpt")
    given = ("--pretrained_model_name_or_path", tmp_path / "source.ckpt")
    pickled = full(config, *given, name="ckpt").folder / "out" / "lora.ckpt"
    assert torch.load(pickled, weights_only=True)["global_step"] == 1002
    assert full(config, *given, "--use_safetensors", name="safetensors").file.is_file()


def test_sd2_is_trained_with_its_velocity_and_written_whole(full: Full, config: Path) -> None:
    run = full(config, family=SD21_V)
    assert run.metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert {f"{TEXT}model.transformer.resblocks.{layer}.ln_1.weight" for layer in (22, 23)} <= run.tensors.keys()
    Sd(v2=True, v_parameterization=True).load(str(run.file), None, torch.float32)


# ---- memory and averages ------------------------------------------------------------------------------------------
def test_an_average_is_saved_beside_the_model(full: Full, config: Path) -> None:
    run = full(config, "--ema_decay", 0.5, "--save_ema", "--max_train_steps", 4, "--learning_rate", "1e-3")
    average = tensors_of(run.folder / "out" / "lora_ema.safetensors")
    assert average.keys() == run.tensors.keys()
    assert changed(run.tensors, average) == {UNET, TEXT}
    name = f"{UNET}out.2.weight"
    first, last, mean = (t[name] for t in (source(), run.tensors, average))
    assert (mean - first).abs().mean() < (last - first).abs().mean()


def test_weights_in_bf16_learn_steps_that_are_too_small_for_them(full: Full, config: Path) -> None:
    run = full(
        config, "--mixed_precision", "bf16", "--full_bf16", "--learning_rate", "1e-6", "--save_precision", "bf16"
    )
    moved = [name for name in differing({n: t.bfloat16() for n, t in source().items()}, run.tensors) if UNET in name]
    assert len(moved) > 100


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Adafactor"])
def test_steps_in_the_backward_pass_are_those_of_a_plain_run(optimizer, full: Full, config: Path) -> None:
    given = ("--optimizer_type", optimizer, "--max_grad_norm", 0)
    given += ("--optimizer_args", "relative_step=False", "scale_parameter=False") if optimizer == "Adafactor" else ()
    plain, fused = full(config, *given, name="plain"), full(config, *given, "--fused_backward_pass", name="fused")
    assert plain.losses == pytest.approx(fused.losses, rel=1e-5)


def test_validation_previews_and_a_report_work(full: Full, pictures: Pictures, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 5\n")
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos, validation_split=0.5, validation_seed=1))
    more = ("--validate_every_n_steps", 1, "--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 2)
    run = full(config, *more, "--cache_latents")
    assert len(run.curve("loss/validation/step_average")) == 2
    assert len(list((run.folder / "out" / "sample").glob("*.png"))) == 1
