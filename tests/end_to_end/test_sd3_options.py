"""Options that only SD3 has take effect in whole runs, each given alone; those that it has no use for have none."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end.training_runs import SD35M, Pictures, Trained, arguments, differing, subset, write_toml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd3_apart

from library.options.reference import IGNORED_BY_SCRIPT

KIND = "5-medium"
NORMAL, MODE = ("--weighting_scheme", "logit_normal"), ("--weighting_scheme", "mode")
CLIP_LAYERS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
LEARNT = {"clip_l": CLIP_LAYERS, "clip_g": CLIP_LAYERS, "t5xxl": set()}  # by default T5 is left as it is
HUBER = ("--loss_type", "huber")

# the option under test with its value, and what it needs beside it
EFFECTS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "t5xxl_max_token_length": (("--t5xxl_max_token_length", 77), ()),
    "t5xxl_dtype": (("--t5xxl_dtype", "bf16"), ()),
    "apply_lg_attn_mask": (("--apply_lg_attn_mask",), ()),
    "apply_t5_attn_mask": (("--apply_t5_attn_mask",), ()),
    "clip_l_dropout_rate": (("--clip_l_dropout_rate", 1), ()),
    "clip_g_dropout_rate": (("--clip_g_dropout_rate", 1), ()),
    "t5_dropout_rate": (("--t5_dropout_rate", 1), ()),
    "pos_emb_random_crop_rate": (("--pos_emb_random_crop_rate", 1), ()),
    "enable_scaled_pos_embed": (("--enable_scaled_pos_embed",), ()),
    "weighting_scheme": (("--weighting_scheme", "cosmap"), ()),
    "logit_mean": (("--logit_mean", 2), NORMAL),
    "logit_std": (("--logit_std", 0.1), NORMAL),
    "mode_scale": (("--mode_scale", -0.5), MODE),
    "training_shift": (("--training_shift", 3), ()),
    "min_timestep": (("--min_timestep", 990), ()),
    "huber_schedule": (("--huber_schedule", "exponential"), HUBER),
}
IDLE = (
    *("--v2", "--v_parameterization", "--clip_skip", 2, "--max_token_length", 225, "--noise_offset", 0.5),
    *("--noise_offset_random_strength", "--adaptive_noise_scale", 0.5, "--multires_noise_iterations", 4),
    *("--multires_noise_discount", 0.8, "--ip_noise_gamma", 0.3, "--ip_noise_gamma_random_strength"),
    *("--zero_terminal_snr", "--min_snr_gamma", 1, "--scale_v_pred_loss_like_noise_pred", "--v_pred_like_loss", 0.5),
    *("--debiased_estimation_loss", "--sample_sampler", "heun", "--xformers"),
)


@pytest.fixture(scope="module")
def first_step(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Return a function that trains SD3.5 for one step, which must end well; the same arguments give the same run."""
    folder = tmp_path_factory.mktemp("sd3")
    masked = subset(pictures.photos, conditioning_data_dir=str(pictures.photo_masks))
    config = write_toml(folder / "d.toml", masked)

    @cache
    def run(*more: object) -> Trained:
        place = tmp_path_factory.mktemp("run")
        argv = arguments(SD35M, place, config, "--max_train_steps", 1, *more)
        assert SD35M.run(*argv) == 0
        return Trained(place, tuple(argv))

    return run


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_of_sd3_changes_the_loss(name: str, first_step: Callable[..., Trained]) -> None:
    given, beside = EFFECTS[name]
    assert f"--{name}" == given[0]
    assert abs(first_step(*beside, *given).losses[0] / first_step(*beside).losses[0] - 1) > 1e-6


def test_options_that_sd3_has_no_use_for_change_nothing(first_step: Callable[..., Trained]) -> None:
    assert {word.removeprefix("--") for word in IDLE if str(word).startswith("--")} == set(
        IGNORED_BY_SCRIPT["sd3_train_network"]
    )
    idle, plain = first_step(*IDLE), first_step()
    assert idle.losses == plain.losses
    assert not differing(idle.tensors, plain.tensors)
    assert idle.metadata["ss_noise_offset"] == "None"


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5xxl"])
def test_a_text_encoders_own_file_is_used_in_place_of_the_models(
    name: str, first_step: Callable[..., Trained], tmp_path: Path
) -> None:
    file = tiny_sd3_apart(KIND) / f"{name}.safetensors"
    same = first_step(f"--{name}", file)
    assert same.losses == first_step().losses
    weights = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in load_file(file).items()}
    save_file(weights, tmp_path / "other.safetensors")
    other = first_step(f"--{name}", tmp_path / "other.safetensors")
    assert abs(other.losses[0] / same.losses[0] - 1) > 1e-6


@pytest.mark.slow
def test_what_lies_far_from_the_mask_is_not_computed(pictures: Pictures, tmp_path: Path) -> None:
    masked = subset(pictures.photos, conditioning_data_dir=str(pictures.photo_masks))
    config = write_toml(tmp_path / "d.toml", masked, resolution=256)  # 256 tokens, of which half are learnt

    def loss(*more: object) -> float:
        folder = tmp_path / "-".join(("run", *map(str, more)))
        argv = arguments(SD35M, folder, config, "--max_train_steps", 1, *more)
        assert SD35M.run(*argv) == 0
        return Trained(folder, tuple(argv)).losses[0]

    whole, half = loss(), loss("--mask_token_drop", 0)
    assert loss("--mask_token_drop", 32) == whole  # the other half is 16 cells wide
    assert half == pytest.approx(whole, rel=0.2)
    assert half != whole


def test_t5_may_be_on_the_cpu(first_step: Callable[..., Trained]) -> None:
    assert first_step("--t5xxl_device", "cpu").losses == first_step().losses


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 32])
def test_blocks_that_are_swapped_train_the_same_to_the_bit(number: int, first_step: Callable[..., Trained]) -> None:
    swapped, plain = first_step("--blocks_to_swap", number), first_step()
    assert swapped.losses == plain.losses
    assert not differing(swapped.tensors, plain.tensors)


@pytest.mark.slow
def test_a_file_that_is_not_mapped_trains_the_same(first_step: Callable[..., Trained]) -> None:
    assert first_step("--disable_mmap_load_safetensors").losses == first_step().losses


def test_a_preview_whose_sides_the_model_cannot_take_is_a_little_smaller(
    first_step: Callable[..., Trained], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a cat --w 72 --h 104 --s 2 --l 1 --ss heun")
    run = first_step("--sample_prompts", tmp_path / "p.txt", "--sample_at_first", "--mixed_precision", "bf16")
    (picture,) = (run.folder / "out" / "sample").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (64, 96)


@pytest.mark.parametrize(("option", "names"), [("--save_clip", ("clip_g", "clip_l")), ("--save_t5xxl", ("t5xxl",))])
def test_text_encoders_are_saved_beside_the_network_with_what_they_learnt(
    option: str, names: tuple[str, ...], first_step: Callable[..., Trained]
) -> None:
    run = first_step(option)
    saved = sorted(path for path in run.file.parent.glob("*.safetensors") if path != run.file)
    assert [path.stem for path in saved] == [f"lora_{name}" for name in names]
    for name, path in zip(names, saved, strict=True):
        before, after = load_file(tiny_sd3_apart(KIND) / f"{name}.safetensors"), load_file(path)
        assert set(after) == set(before)
        assert {key.rpartition(".")[0].rpartition(".")[2] for key in differing(after, before)} == LEARNT[name]
