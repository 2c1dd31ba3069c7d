"""Options whose arithmetic is tested elsewhere take effect in whole runs: each is given alone, and something moves."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end.training_runs import Family, Trained, arguments, subset, write_toml
from safetensors.torch import load_file, save_file

from library.options.reference import IGNORED_BY_SCRIPT

HUBER = ("--loss_type", "huber")
OFFSET = ("--noise_offset", 0.5)
OCTAVES = ("--multires_noise_iterations", 4)
PERTURBED = ("--ip_noise_gamma", 0.3)
VELOCITY = ("--v_parameterization",)

# the option under test with its value, and what it needs beside it
NOISE_AND_LOSS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "noise_offset": (OFFSET, ()),
    "noise_offset_random_strength": (("--noise_offset_random_strength",), OFFSET),
    "adaptive_noise_scale": (("--adaptive_noise_scale", 0.5), OFFSET),
    "multires_noise_iterations": (OCTAVES, ()),
    "multires_noise_discount": (("--multires_noise_discount", 0.9), OCTAVES),
    "ip_noise_gamma": (PERTURBED, ()),
    "ip_noise_gamma_random_strength": (("--ip_noise_gamma_random_strength",), PERTURBED),
    "zero_terminal_snr": (("--zero_terminal_snr",), VELOCITY),
    "min_timestep": (("--min_timestep", 990), ()),
    "max_timestep": (("--max_timestep", 10), ()),
    "v_parameterization": (VELOCITY, ()),
    "loss_type": (HUBER, ()),
    "huber_schedule": (("--huber_schedule", "constant"), HUBER),
    "huber_c": (("--huber_c", 0.5), HUBER),
    "huber_scale": (("--huber_scale", 3), HUBER),
    "min_snr_gamma": (("--min_snr_gamma", 1), ("--max_timestep", 200)),
    "scale_v_pred_loss_like_noise_pred": (("--scale_v_pred_loss_like_noise_pred",), VELOCITY),
    "v_pred_like_loss": (("--v_pred_like_loss", 0.5), ()),
    "debiased_estimation_loss": (("--debiased_estimation_loss",), ()),
}


@pytest.fixture(scope="module")
def first_loss(family: Family, pictures, tmp_path_factory) -> Callable[..., float]:
    """Return the loss of the first step of a run with these arguments."""
    folder = tmp_path_factory.mktemp("losses")
    config = write_toml(folder / "d.toml", subset(pictures.photos))

    @cache
    def loss(*more: object) -> float:
        place = tmp_path_factory.mktemp("run")
        argv = arguments(family, place, config, "--max_train_steps", 1, *more)
        assert family.run(*argv) == 0
        return Trained(place, tuple(argv)).losses[0]

    return loss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOISE_AND_LOSS)
def test_an_option_of_noise_or_loss_changes_the_loss(
    name: str, family: Family, first_loss: Callable[..., float]
) -> None:
    given, beside = NOISE_AND_LOSS[name]
    assert f"--{name}" == given[0]
    if name in IGNORED_BY_SCRIPT.get(family.script, {}):
        assert first_loss(*beside, *given) == first_loss(*beside)
    else:
        assert abs(first_loss(*beside, *given) / first_loss(*beside) - 1) > 1e-4


# ---- the size of a step ----------------------------------------------------------------------------------------
# A plain descent of one step: up starts at 0, so that it is the rate times the gradient, and down has none yet.

DESCENT = ("--optimizer_type", "SGD", "--max_train_steps", 1, "--max_grad_norm", 0)


@pytest.fixture
def config(pictures, tmp_path: Path) -> Path:
    """Write a config of two images: one batch of two an epoch."""
    return write_toml(tmp_path / "d.toml", subset(pictures.photos))


def ups(run: Trained, part: str = "") -> torch.Tensor:
    """Return all up weights of the U-Net ("lora_unet"), the text encoder ("lora_te") or both in one row."""
    return torch.cat([run.tensors[n].flatten() for n in sorted(run.tensors) if "lora_up" in n and n.startswith(part)])


def test_the_learning_rate_is_that_of_the_step(train, config) -> None:
    one = train(config, *DESCENT, "--learning_rate", 0.5, name="one")
    two = train(config, *DESCENT, "--learning_rate", 1, name="two")
    torch.testing.assert_close(ups(two), 2 * ups(one))


def test_each_part_has_the_rate_that_is_given_for_it(train, config) -> None:
    same = train(config, *DESCENT, "--learning_rate", 1, name="same")
    rates = ("--unet_lr", 2, "--text_encoder_lr", 3)
    own = train(config, *DESCENT, "--learning_rate", 1, *rates, name="own")
    torch.testing.assert_close(ups(own, "lora_unet"), 2 * ups(same, "lora_unet"))
    torch.testing.assert_close(ups(own, "lora_te"), 3 * ups(same, "lora_te"))
    assert ups(same, "lora_te").any()
    assert (own.curve("lr/unet"), own.curve("lr/textencoder")) == ([2.0], [3.0])


def test_the_gradient_is_clipped_to_its_norm(train, config) -> None:
    whole = train(config, *DESCENT, "--learning_rate", 1, name="whole")
    clipped = train(config, *DESCENT, "--learning_rate", 1, "--max_grad_norm", 1e-3, name="clipped")
    assert float(ups(whole).norm()) > 2e-3
    torch.testing.assert_close(ups(clipped), ups(whole) * (1e-3 / ups(whole).norm()), rtol=1e-3, atol=1e-9)


def test_arguments_of_the_optimizer_reach_it(train, config) -> None:
    two_steps = ("--optimizer_type", "SGD", "--learning_rate", 1)
    plain = train(config, *two_steps, name="plain")
    heavy = train(config, *two_steps, "--optimizer_args", "momentum=0.9", name="heavy")
    assert not torch.equal(ups(heavy), ups(plain))
    assert heavy.metadata["ss_optimizer"] == "torch.optim.sgd.SGD(momentum=0.9)"


@pytest.mark.parametrize(
    ("option", "optimizer"),
    [
        ("--use_8bit_adam", "bitsandbytes.optim.adamw.AdamW8bit"),
        ("--use_lion_optimizer", "lion_pytorch.lion_pytorch.Lion"),
    ],
)
def test_an_old_switch_trains_with_its_optimizer(option: str, optimizer: str, train, config) -> None:
    pytest.importorskip(optimizer.partition(".")[0])
    assert train(config, option).metadata["ss_optimizer"].partition("(")[0] == optimizer


def test_the_rate_follows_the_schedule(train, config) -> None:
    curve = ("--lr_scheduler", "polynomial", "--lr_scheduler_power", 2, "--lr_warmup_steps", 2)
    run = train(config, "--max_train_steps", 6, "--learning_rate", 1e-3, *curve)
    # two steps up, then (steps left / 4) squared; as in sd-scripts the curve shows the rate of the next step
    expected = [0.5, 1, 0.75**2, 0.5**2, 0.25**2, 0]
    assert [rate / 1e-3 for rate in run.curve("lr/unet")] == pytest.approx(expected, abs=1e-3)


# ---- the base model --------------------------------------------------------------------------------------------


def test_the_vae_given_encodes_the_pictures(first_loss, family: Family, tmp_path: Path) -> None:
    """The base model's own VAE in a file changes nothing, another does."""
    tensors = {name: t for name, t in load_file(family.checkpoint()).items() if name.startswith("first_stage_model.")}
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, own)
    save_file(
        {name: 1.5 * t if "quant_conv" in name or "encoder.conv_out" in name else t for name, t in tensors.items()},
        other,
    )
    little_noise = ("--max_timestep", 10)  # else the loss is nearly that of the noise alone
    assert first_loss(*little_noise, "--vae", own) == first_loss(*little_noise)
    assert abs(first_loss(*little_noise, "--vae", other) / first_loss(*little_noise) - 1) > 1e-3


@pytest.mark.parametrize(("more", "dtype"), [((), torch.bfloat16), (("--no_half_vae",), torch.float32)])
def test_the_vae_computes_in_half_precision_unless_it_must_not(more, dtype, train, config, monkeypatch) -> None:
    from diffusers import AutoencoderKL

    seen: set[torch.dtype] = set()
    encode = AutoencoderKL.encode

    def noted(vae: AutoencoderKL, images: torch.Tensor, *others: Any, **settings: Any) -> Any:
        seen.update((vae.dtype, images.dtype))
        return encode(vae, images, *others, **settings)

    monkeypatch.setattr(AutoencoderKL, "encode", noted)
    train(config, "--max_train_steps", 1, "--mixed_precision", "bf16", *more)
    assert seen == {dtype}


# ---- what is always done ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    ["sdpa", "highvram", "lowram", "persistent_data_loader_workers", "skip_until_initial_step", "mem_eff_attn"],
)
def test_an_option_about_speed_or_memory_alone_leaves_the_loss_as_it_is(option: str, first_loss) -> None:
    assert first_loss(f"--{option}", "--cache_latents") == first_loss("--cache_latents")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of the processes that are started."""
    from multiprocessing.process import BaseProcess

    started, start = [], BaseProcess.start

    def noted(process: BaseProcess) -> None:
        start(process)
        started.append(process.name)

    monkeypatch.setattr(BaseProcess, "start", noted)
    return started


def test_loader_processes_are_as_many_as_asked_and_live_as_long_as_the_run(train, config, processes) -> None:
    train(config, "--max_data_loader_n_workers", 1, "--max_train_epochs", 3)
    assert len(processes) == 1


def test_without_loader_processes_none_is_started(train, config, processes) -> None:
    train(config, "--max_data_loader_n_workers", 0)
    assert processes == []


@pytest.mark.parametrize(("more", "moves"), [((), 1), (("--lowram",), 0)])
def test_the_vae_leaves_the_gpu_after_caching_unless_memory_is_low(
    more, moves, train, config, monkeypatch, tmp_path: Path
) -> None:
    """It waits for the previews; without them it is let go."""
    from diffusers import AutoencoderKL

    places: list[str] = []
    move = AutoencoderKL.to

    def noted(vae: AutoencoderKL, *where: Any, **how: Any) -> AutoencoderKL:
        places.extend(place for place in where if isinstance(place, str))  # the run's own device is no text
        return move(vae, *where, **how)

    monkeypatch.setattr(AutoencoderKL, "to", noted)
    train(config, "--cache_latents", "--max_train_steps", 1, *more, name="plain")
    assert places == []
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    previews = ("--sample_prompts", prompts, "--sample_every_n_epochs", 9)
    train(config, "--cache_latents", "--max_train_steps", 1, *previews, *more, name="previews")
    assert places == ["cpu"] * moves


def test_gpu_memory_is_not_given_back_while_latents_are_cached(train, config, monkeypatch) -> None:
    """What --highvram asks for in sd-scripts."""
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    train(config, "--cache_latents", "--max_train_steps", 1)
    assert emptied == []


# ---- caches ----------------------------------------------------------------------------------------------------


def test_a_cache_that_is_not_to_be_checked_is_taken_as_it_is(train, pictures, tmp_path: Path) -> None:
    import shutil

    images = tmp_path / "images"
    shutil.copytree(pictures.photos, images)
    config = write_toml(tmp_path / "d.toml", subset(images))
    cached = ("--cache_latents_to_disk", "--max_train_steps", 1)
    before = train(config, *cached, name="before").losses
    for number in range(2):
        shutil.copy(pictures.regularisation / f"reg{number}.png", images / f"photo{number}.png")
    assert train(config, *cached, "--skip_cache_check", name="unchecked").losses == before
    assert train(config, *cached, name="checked").losses != before


@pytest.mark.parametrize(("size", "batches"), [(1, [1, 1]), (2, [2])])
def test_the_vae_takes_vae_batch_size_pictures_at_a_time_in_training_too(
    size: int, batches: list[int], train, config, monkeypatch
) -> None:
    from diffusers import AutoencoderKL

    seen: list[int] = []
    encode = AutoencoderKL.encode

    def noted(vae: AutoencoderKL, images: torch.Tensor, *more: Any, **settings: Any) -> Any:
        seen.append(len(images))
        return encode(vae, images, *more, **settings)

    monkeypatch.setattr(AutoencoderKL, "encode", noted)
    train(config, "--max_train_steps", 1, "--vae_batch_size", size)
    assert seen == batches


# ---- what is saved ---------------------------------------------------------------------------------------------


def test_a_ratio_spreads_the_files_over_the_run(train, config) -> None:
    run = train(config, "--max_train_epochs", 6, "--save_n_epoch_ratio", 3)
    assert run.names() == ["lora-000002.safetensors", "lora-000004.safetensors", "lora.safetensors"]


def test_states_of_epochs_have_a_rotation_of_their_own(train, config) -> None:
    every = ("--max_train_epochs", 4, "--save_every_n_epochs", 1, "--save_state")
    run = train(config, *every, "--save_last_n_epochs", 3, "--save_last_n_epochs_state", 1)
    assert run.names() == [f"lora-{epoch:06d}.safetensors" for epoch in (1, 2, 3)] + ["lora.safetensors"]
    assert run.names("*-state") == ["lora-000003-state", "lora-state"]


# ---- trackers --------------------------------------------------------------------------------------------------


def test_the_trackers_folder_has_prefix_time_and_name(train, config) -> None:
    run = train(config, "--max_train_steps", 1, "--log_prefix", "fairy-", "--log_tracker_name", "green")
    (folder,) = (run.folder / "logs").iterdir()
    assert folder.name.startswith("fairy-20")
    assert [path.name for path in folder.iterdir()] == ["green"]


def test_without_a_name_the_tracker_is_called_as_in_sd_scripts(train, config) -> None:
    run = train(config, "--max_train_steps", 1, "--log_with", "tensorboard")
    (folder,) = (run.folder / "logs").iterdir()
    assert [path.name for path in folder.iterdir()] == ["network_train"]


def test_settings_of_a_tracker_come_from_its_file(train, config, tmp_path: Path) -> None:
    settings = tmp_path / "trackers.toml"
    settings.write_text('[tensorboard]\nfilename_suffix = ".green"\n', encoding="utf-8")
    run = train(config, "--max_train_steps", 1, "--log_tracker_config", settings)
    assert [path.suffix for path in (run.folder / "logs").rglob("events.out.tfevents.*")] == [".green"]


def test_the_options_go_to_the_tracker_when_asked_without_paths(train, config) -> None:
    silent = train(config, "--max_train_steps", 1, name="silent")
    telling = train(config, "--max_train_steps", 1, "--log_config", name="telling")
    assert not list((silent.folder / "logs").rglob("hparams.yml"))
    (file,) = (telling.folder / "logs").rglob("hparams.yml")
    written = file.read_text(encoding="utf-8")
    assert "learning_rate: 0.001" in written
    assert str(config) not in written


# ---- previews --------------------------------------------------------------------------------------------------


def test_the_sampler_of_the_option_paints_prompts_that_name_none(train, config, tmp_path: Path, family: Family) -> None:
    family.skip_unless_taken("--sample_sampler", idle=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 5\n", encoding="utf-8")
    painted = set()
    for sampler in ("ddim", "dpmsolver++"):
        more = ("--sample_prompts", prompts, "--sample_at_first", "--sample_sampler", sampler)
        run = train(config, "--max_train_steps", 1, *more, name=sampler)
        (file,) = (run.folder / "out" / "sample").iterdir()
        painted.add(file.read_bytes())
    assert len(painted) == 2
