"""sdxl_train.py: SDXL itself learns, the U-Net alone or with its text encoders, and is saved as a whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from end_to_end.training_runs import Trained, differing, metadata_of, subset, tensors_of, write_toml

from library.cli import main
from library.models.sdxl import Sdxl
from tests.tiny_models import tiny_sdxl, tiny_sdxl_folder

UNET, TEXTS = "model.diffusion_model.", ("conditioner.embedders.0.", "conditioner.embedders.1.")
VAE = "first_stage_model."
Run = Callable[..., Trained]


def argv_of(folder: Path, dataset: Path, *more: object) -> list[str]:
    """Return the command line of two steps."""
    argv: list[object] = ["--pretrained_model_name_or_path", tiny_sdxl(), "--dataset_config", dataset, "--seed", 7]
    argv += ["--output_dir", folder / "out", "--output_name", "lora", "--max_data_loader_n_workers", 0]
    argv += ["--learning_rate", "1e-4", "--max_train_steps", 2, "--logging_dir", folder / "logs"]
    return [str(argument) for argument in [*argv, *more]]


def sdxl_train(*argv: object) -> int:
    """Return the exit code of the script, in this process."""
    arguments = [str(argument) for argument in argv]
    return main("sdxl_train", "library.models.sdxl:Sdxl", arguments, method="library.training.full_model:FullModel")


@pytest.fixture
def config(pictures, tmp_path) -> Path:
    return write_toml(tmp_path / "dataset.toml", subset(pictures.photos))


@pytest.fixture
def train(config, tmp_path) -> Run:
    """Train, which must end well."""

    def run(*more: object, name: str = "run", dataset: Path | None = None) -> Trained:
        argv = argv_of(tmp_path / name, dataset or config, *more)
        assert sdxl_train(*argv) == 0
        return Trained(tmp_path / name, tuple(argv))

    return run


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return tensors_of(tiny_sdxl())


def learnt(run: Trained, source: dict[str, torch.Tensor]) -> set[str]:
    """Return how the names begin of what has changed."""
    changed = differing(source, run.tensors)
    parts = (UNET, *TEXTS, VAE)
    assert all(name.startswith(parts) for name in changed)
    return {part for part in parts for name in changed if name.startswith(part)}


# ---- what learns ---------------------------------------------------------------------------------------------
def test_the_unet_alone_learns_unless_told_otherwise(train, source):
    run = train()
    assert run.tensors.keys() == source.keys()
    assert learnt(run, source) == {UNET}
    assert all(loss > 0 for loss in run.losses)


@pytest.mark.parametrize(
    ("rates", "parts"),
    [
        ((), {UNET, *TEXTS}),
        (("--learning_rate_te1", 0), {UNET, TEXTS[1]}),
        (("--learning_rate_te2", 0), {UNET, TEXTS[0]}),
        (("--learning_rate", 0, "--learning_rate_te1", "1e-4", "--learning_rate_te2", 0), {TEXTS[0]}),
    ],
    ids=["both", "not the first", "not the second", "the first alone"],
)
def test_text_encoders_learn_where_that_is_asked_for(train, source, rates, parts):
    run = train("--train_text_encoder", *rates)
    assert run.tensors.keys() == source.keys()
    assert learnt(run, source) == parts


def test_each_text_encoder_and_each_block_has_its_rate(train, source):
    """Blocks at 0 stay as they are: here all but the first of the way down and the output."""
    rates = ["0", "1e-4", *["0"] * 20, "2e-4"]
    rates_of_text = ("--learning_rate_te1", "1e-5", "--learning_rate_te2", "2e-5")
    run = train("--train_text_encoder", *rates_of_text, "--block_lr", ",".join(rates))
    changed = {name.removeprefix(UNET) for name in differing(source, run.tensors) if name.startswith(UNET)}
    assert {".".join(name.split(".")[:2]) if name.startswith("input") else "out" for name in changed} == {
        "input_blocks.0",
        "out",
    }
    assert all(name.startswith(("input_blocks.0.", "out.")) for name in changed)
    assert run.curve("lr/unet_block22") == pytest.approx([2e-4] * 2)
    assert run.curve("lr/text_encoder1") == pytest.approx([1e-5] * 2)
    assert run.curve("lr/text_encoder2") == pytest.approx([2e-5] * 2)


# ---- files ---------------------------------------------------------------------------------------------------
def test_a_saved_model_is_trained_further(train, source):
    first = train(name="first")
    second = train("--pretrained_model_name_or_path", first.file, name="second")
    assert second.tensors.keys() == source.keys()
    assert learnt(second, first.tensors) == {UNET}
    family = Sdxl()
    parts = family.load(str(second.file), None, torch.float32)
    for name, tensor in family.whole_pieces(parts, family.kept(str(second.file))).items():
        assert torch.equal(torch.cat(tensor) if len(tensor) > 1 else tensor[0], second.tensors[name]), name
    assert second.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_a_folder_is_saved_as_a_folder(train):
    run = train("--pretrained_model_name_or_path", tiny_sdxl_folder(), "--save_precision", "fp16")
    family = Sdxl()
    before, after = (family.load(str(at), None, torch.float16) for at in (tiny_sdxl_folder(), run.folder / "out/lora"))
    assert differing(before.denoiser.state_dict(), after.denoiser.state_dict())
    for one, other in zip(before.text_encoders, after.text_encoders, strict=True):
        assert not differing(one.state_dict(), other.state_dict())


# ---- masks ---------------------------------------------------------------------------------------------------
def test_black_pixels_add_no_gradient(train, source, pictures, tmp_path):
    """Nothing but weight decay moves a weight, so that without it the model stays as it was."""
    black = subset(pictures.photos, conditioning_data_dir=str(pictures.black_masks))
    dataset = write_toml(tmp_path / "black.toml", black)
    still = ("--masked_loss", "--optimizer_args", "weight_decay=0")
    run = train(*still, "--train_text_encoder", dataset=dataset)
    assert learnt(run, source) == set()


# ---- caches, averages, states --------------------------------------------------------------------------------
def test_cached_text_trains_the_same_model(train):
    plain, cached = train(name="plain"), train("--cache_text_encoder_outputs", name="cached")
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cached.tensors.keys() == plain.tensors.keys()
    for name in TEXTS:
        assert not [n for n in differing(plain.tensors, cached.tensors) if n.startswith(name)]


def test_a_resumed_run_ends_in_the_whole_ones_model_and_average(train):
    more = ("--train_text_encoder", "--learning_rate_te1", 0, "--ema_decay", 0.9, "--save_ema")
    whole = train(*more, "--save_every_n_steps", 1, "--save_state", name="whole")
    again = train(*more, "--resume", whole.folder / "out" / "lora-step00000001-state", name="again")
    assert not differing(whole.tensors, again.tensors)
    averages = [tensors_of(run.folder / "out" / "lora_ema.safetensors") for run in (whole, again)]
    assert not differing(*averages)
    assert differing(whole.tensors, averages[0])
    assert "modelspec.architecture" in metadata_of(whole.folder / "out" / "lora_ema.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--full_bf16", "--mixed_precision", "bf16", "--gradient_checkpointing", "--train_text_encoder"),
        ("--fused_backward_pass", "--max_grad_norm", 0),
        ("--fused_optimizer_groups", 4, "--train_text_encoder"),
        ("--weighted_captions", "--max_token_length", 150),
        ("--cache_latents", "--cache_text_encoder_outputs_to_disk", "--v_parameterization"),
    ],
    ids=lambda more: more[0],
)
def test_options_of_the_other_scripts_work_with_it(train, source, more):
    assert UNET in learnt(train(*more), source)
