"""Whole runs of SD3.5 whose blocks take turns on the device, and that leave out tokens far from what is learnt."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from end_to_end.training_runs import SD35M, Pictures, Trained, arguments, differing, picture, save, subset, write_toml
from PIL import Image

Sd3 = Callable[..., Trained]
ALL = ("--gradient_checkpointing", "--validation_split", 0.5, "--validate_every_n_steps", 1)


@pytest.fixture
def sd3(tmp_path: Path) -> Sd3:
    """Return a function that trains SD3.5 medium, which must end well."""

    def run(config: Path, *more: object, name: str) -> Trained:
        argv = arguments(SD35M, tmp_path / name, config, *more)
        assert SD35M.run(*argv) == 0
        return Trained(tmp_path / name, tuple(argv))

    return run


@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("--mixed_precision", "bf16", "--fp8_base"), marks=pytest.mark.slow)],
    ids=["float32", "float8"],
)
def test_a_run_whose_blocks_take_turns_is_the_plain_run(
    more: tuple[str, ...], sd3: Sd3, pictures: Pictures, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With previews and validation between the steps. The tiny model has four blocks.

    Weights that are mapped from a file lie at any address, and with some of them a CPU's matrix product adds up in
    another order: so they are read.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    config = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True), batch_size=1)
    options = (*ALL, *more, "--sample_prompts", prompts, "--sample_every_n_steps", 1, "--disable_mmap_load_safetensors")
    plain = sd3(config, *options, name="plain")
    swapped = sd3(config, *options, "--blocks_to_swap", 32, name="swapped")
    assert "--blocks_to_swap 32 is too much for this model, which has 4 blocks: 2 are swapped" in capfd.readouterr().err
    assert swapped.losses == plain.losses
    assert swapped.curve("loss/validation/step_average") == plain.curve("loss/validation/step_average")
    assert not differing(swapped.tensors, plain.tensors)
    drawn, again = ([each.read_bytes() for each in sorted(run.folder.rglob("*.png"))] for run in (plain, swapped))
    assert len(drawn) >= 2
    assert drawn == again


@pytest.mark.parametrize("cache", [(), ("--cache_latents",)], ids=["no cache", "cache"])
def test_tokens_far_from_what_is_learnt_are_left_out(cache: tuple[str, ...], sd3: Sd3, tmp_path: Path) -> None:
    """Of 256 tokens 64 are kept. With a reach over all of the picture, the run is the plain one."""
    for index in range(2):
        colours = np.asarray(Image.fromarray(picture(index)).resize((256, 256)))
        alpha = np.zeros((256, 256), np.uint8)
        alpha[96:160, 96:160] = 255
        save(tmp_path / "images", str(index), np.dstack([colours, alpha]), "a cat")
    config = write_toml(tmp_path / "d.toml", subset(tmp_path / "images", alpha_mask=True), resolution=256)
    plain = sd3(config, *cache, name="plain")
    whole = sd3(config, *cache, "--mask_token_drop", 32, name="whole")
    less = sd3(config, *cache, "--mask_token_drop", 2, name="less")
    assert not differing(whole.tensors, plain.tensors)
    assert len(differing(less.tensors, plain.tensors)) > 50
    assert less.losses != plain.losses
    assert less.losses == pytest.approx(plain.losses, rel=0.5)  # of the same cells, which lack their surroundings
