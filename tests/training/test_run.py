"""How a run is prepared: the order of its checks, its length, its seed, its number formats."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from library.errors import OptionError, UserError
from library.models.sd import Sd
from library.options import Options, read_training
from library.training import data as training_data
from library.training import reporting, run, trackers
from library.training.precision import Precision


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """Arguments of a run over two half-transparent pictures, with a checkpoint that does not exist."""
    folder = tmp_path / "images" / "1_cat"
    folder.mkdir(parents=True)
    for i in range(2):
        pixels = np.full((64, 64, 4), 50 * i, np.uint8)
        pixels[:, :, 3] = 51
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [
        "--train_data_dir", str(folder.parent), "--resolution", "64", "--output_dir", str(tmp_path / "out"),
        "--network_module", "networks.lora", "--pretrained_model_name_or_path", "nowhere.safetensors",
    ]  # fmt: skip


def options_of(argv: list[str], *more: str) -> Options:
    return read_training([*argv, *more], "train_network").options


# ---- checks ----------------------------------------------------------------------------------------------------


def test_checking_needs_no_checkpoint(argv) -> None:
    checked = run.check(options_of(argv), Sd())
    assert checked.method.module.__name__ == "networks.lora"
    assert len(checked.data.samples) == 2
    assert checked.tracker_names == ()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--network_module", "networks.lore"], "networks.lore"),
        (["--optimizer_type", "Adam2"], "Adam2"),
        (["--optimizer_args", "betas=1"], "betas"),
        (["--lr_scheduler", "cosin"], "cosin"),
        (["--lr_scheduler_args", "cycles=3"], "cycles"),
        (["--output_name", "a/b"], "output_name"),
        (["--masked_loss"], "masked_loss"),
        (["--cache_latents", "--random_crop"], "random_crop"),
    ],
)
def test_every_part_is_asked_before_a_model_is_loaded(more, message, argv) -> None:
    with pytest.raises(UserError, match=message):
        run.check(options_of(argv, *more), Sd())


def test_masks_in_the_data_let_masked_loss_pass(argv) -> None:
    checked = run.check(options_of(argv, "--masked_loss", "--alpha_mask"), Sd())
    assert {sample.mask.kind for sample in checked.data.samples} == {"alpha"}


# ---- length and seed -------------------------------------------------------------------------------------------


def test_max_train_epochs_decides_the_length_where_it_is_given() -> None:
    training = Options().training
    assert run.total_steps(replace(training, max_train_steps=7), steps_per_epoch=3) == 7
    assert run.total_steps(replace(training, max_train_steps=7, max_train_epochs=5), steps_per_epoch=3) == 15


def test_a_given_seed_is_the_seed() -> None:
    assert run.common_seed(0) == 0
    assert run.common_seed(2**32 - 1) == 2**32 - 1


def test_without_a_seed_one_is_drawn_that_torch_takes_and_that_differs() -> None:
    torch.manual_seed(0)
    seeds = []
    for _ in range(3):
        torch.manual_seed(0)  # whatever was seeded before must not decide it
        seeds.append(run.common_seed(None))
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


# ---- number formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixed", "full", "no_half_vae", "frozen", "trained", "vae"),
    [
        ("no", False, False, torch.float32, torch.float32, torch.float32),
        ("bf16", False, False, torch.bfloat16, torch.float32, torch.bfloat16),
        ("bf16", False, True, torch.bfloat16, torch.float32, torch.float32),
        ("bf16", True, False, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_options_decide_the_formats(mixed, full, no_half_vae, frozen, trained, vae) -> None:
    formats = Precision.of(mixed, full_fp16=False, full_bf16=full, no_half_vae=no_half_vae)
    assert (formats.frozen, formats.trained, formats.vae, formats.mixed) == (frozen, trained, vae, mixed)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(OptionError, match="needs a GPU"):
        Precision.of("fp16", full_fp16=False, full_bf16=False, no_half_vae=False)


def test_each_accelerator_has_the_precision_of_its_run(argv) -> None:
    for precision in ("bf16", "no", "bf16"):
        options = options_of(argv, "--mixed_precision", precision)
        assert run.make_accelerator(options, run.check(options, Sd()), Sd()).mixed_precision == precision


def test_what_several_processes_do_is_passed_on_to_accelerate(argv) -> None:
    more = ("--ddp_timeout", "7", "--ddp_gradient_as_bucket_view", "--ddp_static_graph")
    for given, timeout in ((more, timedelta(minutes=7)), ((), None)):
        options = options_of(argv, *given)
        accelerator = run.make_accelerator(options, run.check(options, Sd()), Sd())
        assert accelerator.ddp_handler.gradient_as_bucket_view == bool(given)
        assert accelerator.ddp_handler.static_graph == bool(given)
        assert (accelerator.init_handler and accelerator.init_handler.timeout) == timeout


# ---- what is told ----------------------------------------------------------------------------------------------


def test_the_mean_weight_is_the_same_from_files_and_from_a_cache(argv) -> None:
    options = options_of(argv, "--alpha_mask", "--cache_latents")
    data = training_data.read(options, 64)

    class Grey:
        """Encodes every picture as grey; masks do not go through it."""

        name = "sd"
        latent_space = Sd.latent_space

        def encode_images(self, parts, images, noise):
            """Return zeros."""
            return torch.zeros_like(noise)

    from library.models.family import Parts

    parts = Parts(torch.nn.Identity(), (), torch.nn.Linear(1, 1))
    encode = training_data.encoder(Grey(), lambda: parts)
    store = training_data.cache(data, options.caching, "sd", encode, torch.float32, "vae", Accelerator(cpu=True))
    assert reporting.mean_share(reporting.shares_of(data, None)) == pytest.approx(0.2)
    assert reporting.mean_share(reporting.shares_of(data, store)) == pytest.approx(0.2)


def test_the_mean_weight_of_no_masks_is_none(argv) -> None:
    assert reporting.mean_share(reporting.shares_of(training_data.read(options_of(argv), 64), None)) is None


def test_a_dataset_is_shown_without_a_model(argv, tmp_path, caplog) -> None:
    with caplog.at_level("INFO"):
        run.train(options_of(argv, "--debug_dataset", "--alpha_mask"), Sd())
    assert "masks: 2 of 2 images (2 alpha), mean weight 0.20" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last-masks.png"]


def test_a_logging_folder_alone_means_tensorboard(argv, tmp_path) -> None:
    assert trackers.wanted(options_of(argv).logging) == ()
    logging = options_of(argv, "--logging_dir", str(tmp_path / "logs"), "--log_prefix", "x-").logging
    assert trackers.wanted(logging) == ("tensorboard",)
    folder = trackers.log_dir(logging)
    assert folder is not None
    assert folder.parent == tmp_path / "logs"
    assert folder.name.startswith("x-20")


def test_the_prompts_are_read_once(argv, tmp_path, caplog) -> None:
    """Their warnings would be told twice."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --g 3 --w 64 --h 64 --s 1\n", encoding="utf-8")
    more = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "5"]
    assert [prompt.prompt for prompt in run.check(options_of(argv, *more), Sd()).prompts] == ["a cat"]
    assert caplog.text.count("is for other models") == 1
