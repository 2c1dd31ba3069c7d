"""Preview pictures: when they are drawn, what is in them, and that training notices nothing of them."""

import random
import re
import warnings
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_sd15
from torch import nn

from library.errors import OptionError
from library.models.family import Parts
from library.models.sd import Sd
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.training.painting import Drawing, Painter, preview_family, random_states_kept, shortest
from library.training.prompts import SamplePrompt
from library.training.sampling import Sampler, check, file_stem
from library.training.schedulers import build_scheduler

pytestmark = pytest.mark.filterwarnings(  # diffusers' Euler schedulers with numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
CPU = torch.device("cpu")
CAT = SamplePrompt("a cat", width=64, height=64, sample_steps=3, seed=7)


@cache
def tiny() -> Parts:
    return Sd().load(str(tiny_sd15()), None, torch.float32)


def paint(prompt: SamplePrompt, sampler: str = "ddim", family: Sd | None = None, **drawing: object) -> np.ndarray:
    painter = Painter(family or Sd(), tiny(), CPU, Drawing(**drawing))
    with painter.ready():
        return np.asarray(painter.paint(prompt, sampler))


def sampler_of(
    folder: Path, lines: str = "a cat --w 64 --h 64 --s 2 --d 5", share: tuple = (0, 1), **options
) -> Sampler:
    """Return a sampler of the prompts in lines, with the tiny model."""
    prompts = folder / "prompts.txt"
    prompts.write_text(lines, encoding="utf-8")
    sampling = SamplingOptions(sample_prompts=str(prompts), **(options or {"sample_every_n_steps": 10}))
    saving = SavingOptions(output_dir=str(folder / "out"), output_name="lora")
    sampler = Sampler.from_options(check(sampling), sampling, saving, Sd(), tiny(), CPU, share)
    assert sampler is not None
    return sampler


# ---- what is in a picture ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_a_picture_equals_that_of_the_diffusers_pipeline(scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=tiny().vae,
            text_encoder=None,
            tokenizer=None,
            unet=tiny().denoiser,
            scheduler=build_scheduler("ddim"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
    family = Sd()
    with torch.no_grad():
        towards, away = family.encode_text(tiny(), family.tokenize(["a cat", "a dog"])).unsqueeze(1)
        expected = pipeline(
            prompt_embeds=towards,
            negative_prompt_embeds=away,
            guidance_scale=scale,
            num_inference_steps=4,
            width=72,
            height=64,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
    ours = paint(SamplePrompt("a cat", "a dog", 72, 64, 4, scale, seed=3))
    assert ours.shape == (64, 72, 3)
    assert np.abs(ours.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_a_seed_gives_one_picture_and_another_seed_another() -> None:
    assert np.array_equal(paint(CAT), paint(CAT))
    assert not np.array_equal(paint(CAT), paint(replace(CAT, seed=8)))


def test_a_prompt_without_a_seed_gives_another_picture_each_time() -> None:
    assert not np.array_equal(paint(replace(CAT, seed=None)), paint(replace(CAT, seed=None)))


def test_the_negative_prompt_counts_unless_guidance_is_off() -> None:
    other = replace(CAT, negative_prompt="a very ugly dog")
    assert not np.array_equal(paint(CAT), paint(other))
    assert np.array_equal(paint(replace(CAT, scale=1.0)), paint(replace(other, scale=1.0)))


def test_the_words_after_the_first_window_count() -> None:
    long = replace(CAT, prompt="cat, " * 40)
    assert not np.array_equal(paint(long), paint(replace(long, prompt=long.prompt + "a red dog on a green chair")))


def test_a_short_prompt_is_not_padded_to_three_windows() -> None:
    family = preview_family(Sd())
    empty = family.tokenize([""])
    assert empty.shape[1] == 3
    assert shortest(family.tokenize(["", "a cat"]), empty).shape[1] == 1
    assert shortest(family.tokenize(["", "cat, " * 40]), empty).shape[1] == 2
    assert shortest(family.tokenize(["cat, " * 90, ""]), empty).shape[1] == 3


def test_weights_in_a_prompt_count() -> None:
    assert not np.array_equal(paint(CAT), paint(replace(CAT, prompt="a (cat:1.4)")))


def test_clip_skip_counts() -> None:
    assert not np.array_equal(paint(CAT), paint(CAT, family=Sd(clip_skip=2)))


def test_samplers_differ() -> None:
    assert not np.array_equal(paint(CAT, "ddim"), paint(CAT, "euler_a"))


def test_the_prediction_type_counts() -> None:
    assert not np.array_equal(paint(CAT), paint(CAT, prediction_type="v_prediction"))


@dataclass(frozen=True)
class FlowSd(Sd):
    """The tiny model, taken for one that predicts the velocity of a flow."""

    prediction_type = "flow"

    def predict(self, parts, noisy, timesteps, text, batch):
        return super().predict(parts, noisy, timesteps, text, batch) + 0.1 * timesteps[:, None, None, None]


def test_a_flow_is_painted_by_eulers_method_with_guidance() -> None:
    family, prompt = FlowSd(), SamplePrompt("a cat", "a dog", 64, 64, 4, 3.0, seed=3)
    painter = Painter(family, tiny(), CPU, Drawing(prediction_type="flow"))
    with painter.ready():
        painted = painter._denoise(prompt, "ddim", torch.Generator().manual_seed(3))
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
        text = family.encode_text(tiny(), family.tokenize(["a dog", "a cat"]))
        scheduler = build_scheduler("ddim", "flow")
        scheduler.set_timesteps(4)
        timesteps = [*scheduler.timesteps, torch.tensor(0.0)]
        for here, there in pairwise(timesteps):
            away, towards = family.predict(tiny(), latents.expand(2, -1, -1, -1), here.expand(2), text, None).chunk(2)
            latents = latents + (there - here) / 1000 * (away + 3.0 * (towards - away))
    torch.testing.assert_close(painted, latents, rtol=1e-4, atol=1e-4)


def test_the_sampler_of_a_prompt_for_a_flow_is_told_to_be_idle_once(tmp_path: Path, caplog) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --ss euler\na dog --ss heun\na cow", encoding="utf-8")
    sampling = SamplingOptions(sample_prompts=str(prompts), sample_at_first=True)
    for prediction_type in ("epsilon", "flow"):
        drawing = Drawing(prediction_type=prediction_type)
        Sampler.from_options(check(sampling), sampling, SavingOptions(), Sd(), tiny(), CPU, drawing=drawing)
    assert len(caplog.records) == 1
    assert "--ss" in caplog.text


def test_the_family_says_what_is_predicted() -> None:
    assert [Sd().prediction_type, Sd(v_parameterization=True).prediction_type] == ["epsilon", "v_prediction"]


def test_half_precision_gives_nearly_the_same_picture() -> None:
    exact, half = paint(CAT).astype(int), paint(CAT, autocast_dtype=torch.bfloat16).astype(int)
    assert not np.array_equal(exact, half)
    assert np.abs(exact - half).mean() < 8


def test_a_broken_model_gives_a_black_picture_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    broken = Sd().load(str(tiny_sd15()), None, torch.float32)
    for parameter in broken.vae.parameters():
        parameter.data.fill_(torch.nan)
    painter = Painter(Sd(), broken, CPU, Drawing())
    with painter.ready():
        assert np.asarray(painter.paint(CAT, "ddim")).max() == 0
    assert "--no_half_vae" in caplog.text


# ---- what training notices -----------------------------------------------------------------------------------------
def test_training_draws_the_same_numbers_after_a_preview(tmp_path: Path) -> None:
    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]

    sampler = sampler_of(tmp_path, "a cat --w 64 --h 64 --s 2\na dog --w 64 --h 64 --s 2 --ss euler_a")
    for module in (torch, np.random):
        (module.manual_seed if module is torch else module.seed)(1)
    random.seed(1)
    expected = draw()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    sampler.sample(None, 10)
    assert draw() == expected


def test_random_states_are_restored_after_an_error() -> None:
    def fail() -> None:
        torch.rand(1)
        raise ValueError("broken off")

    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    with pytest.raises(ValueError, match="broken off"), random_states_kept():
        fail()
    assert torch.rand(1) == expected


def test_modules_are_in_evaluation_mode_while_painting_and_as_before_afterwards() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    network[1].eval()  # one part frozen, the rest training
    parts = tiny()
    parts.denoiser.train()
    with Painter(Sd(), parts, CPU, Drawing(modules=(network,))).ready():
        assert not any(module.training for module in (*network.modules(), *parts.denoiser.modules()))
        assert not torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == [True, True, False, False]
    assert parts.denoiser.training
    assert not parts.vae.training
    assert torch.is_grad_enabled()
    parts.denoiser.eval()


# ---- when, how many, under which names -----------------------------------------------------------------------------
def test_step_pictures_are_due_at_multiples(tmp_path: Path) -> None:
    sampler = sampler_of(tmp_path, sample_every_n_steps=3)
    assert [step for step in range(1, 10) if sampler.is_due(None, step)] == [3, 6, 9]
    assert sampler.is_due(1, 6)  # an epoch's end does not hide a step
    assert not sampler.is_due_at_start()


def test_epochs_beat_steps(tmp_path: Path) -> None:
    sampler = sampler_of(tmp_path, sample_every_n_steps=3, sample_every_n_epochs=2, sample_at_first=True)
    assert not sampler.is_due(None, 3)
    assert not sampler.is_due(1, 3)
    assert sampler.is_due(2, 7)
    assert sampler.is_due_at_start()


def test_at_first_alone_draws_once(tmp_path: Path) -> None:
    sampler = sampler_of(tmp_path, sample_at_first=True)
    assert sampler.is_due_at_start()
    assert not any(sampler.is_due(epoch, step) for epoch in (None, 1) for step in range(1, 5))


def test_step_pictures_have_the_documented_names(tmp_path: Path) -> None:
    sampler = sampler_of(tmp_path, "a cat --w 64 --h 72 --s 2 --d 5\na dog --w 64 --h 64 --s 2")
    paths = sampler.sample(3, 20)
    assert [path.parent for path in paths] == [tmp_path / "out" / "sample"] * 2
    assert re.fullmatch(r"lora_000020_00_\d{14}_5\.png", paths[0].name)
    assert re.fullmatch(r"lora_000020_01_\d{14}\.png", paths[1].name)
    with Image.open(paths[0]) as image:
        assert image.size == (64, 72)
        assert image.text["parameters"].startswith("a cat\nNegative prompt: \nSteps: 2")


def test_epoch_pictures_and_those_at_first_are_named_by_epoch(tmp_path: Path) -> None:
    by_epoch = sampler_of(tmp_path, sample_every_n_epochs=1).sample(3, 20)
    at_first = sampler_of(tmp_path, sample_at_first=True, sample_every_n_steps=20).sample(0, 0)
    assert by_epoch[0].name.startswith("lora_e000003_00_")
    assert at_first[0].name.startswith("lora_e000000_00_")


def test_a_run_without_a_name_has_pictures_without_one() -> None:
    assert re.fullmatch(r"e000002_01_\d{14}", file_stem(None, "e000002", 1, None))


def test_processes_share_the_prompts(tmp_path: Path) -> None:
    lines = "\n".join(f"cat {number} --w 64 --h 64 --s 1" for number in range(5))
    shares = [[index for index, _ in sampler_of(tmp_path, lines, (process, 2)).prompts] for process in range(2)]
    assert shares == [[0, 2, 4], [1, 3]]


def test_what_was_drawn_is_remembered_for_the_report(tmp_path: Path) -> None:
    sampler = sampler_of(tmp_path)
    sampler.sample(0, 0)
    sampler.sample(None, 10)
    assert [(sample.step, sample.epoch, sample.prompt.prompt) for sample in sampler.made] == [
        (0, 0, "a cat"),
        (10, None, "a cat"),
    ]


# ---- before a model is loaded --------------------------------------------------------------------------------------
def test_samples_without_prompts_are_refused() -> None:
    with pytest.raises(OptionError, match="--sample_prompts"):
        SamplingOptions(sample_every_n_steps=10)


def test_no_samples_are_asked_for_by_default() -> None:
    assert check(SamplingOptions()) == []


def test_prompts_without_a_time_are_not_read(tmp_path: Path) -> None:
    assert check(SamplingOptions(sample_prompts=str(tmp_path / "absent.txt"))) == []


def test_sides_of_a_prompt_become_multiples_of_what_the_model_takes(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat --w 1000 --h 72\na dog --w 64")
    sampling = SamplingOptions(sample_prompts=str(tmp_path / "p.txt"), sample_at_first=True)
    sizes = [(prompt.width, prompt.height) for prompt in check(sampling, 1024, 16)]
    assert sizes == [(992, 64), (64, 1024)]
    assert [(prompt.width, prompt.height) for prompt in check(sampling)] == [(1000, 72), (64, 512)]


def test_an_unknown_sampler_in_a_prompt_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog --ss eular")
    with pytest.raises(OptionError, match=r"p.txt: prompt 2: unknown sampler eular\. Did you mean euler\?"):
        check(SamplingOptions(sample_prompts=str(tmp_path / "p.txt"), sample_at_first=True))
