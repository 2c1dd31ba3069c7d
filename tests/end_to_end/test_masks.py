"""What masks do to a run: the ways to give them, their weight in the loss, and that a cache changes none of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end.training_runs import GREY, ROOT, Family, Pictures, Trained, arguments, half, save, subset, write_toml

from library.options import read_training
from library.training import data as training_data

STILL = ("--learning_rate", "1e-12", "--max_train_steps", 2)  # so slow that every step sees the first step's weights
WEIGHT = GREY / 255


def scaled(losses: list[float], factor: float = WEIGHT) -> object:
    return pytest.approx([factor * loss for loss in losses], rel=1e-5)


@pytest.fixture(scope="module")
def unmasked(family: Family, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of the photos without masks."""
    folder = tmp_path_factory.mktemp("unmasked")
    argv = arguments(family, folder, write_toml(folder / "plain.toml", subset(pictures.photos)), *STILL)
    assert family.run(*argv) == 0
    return Trained(folder, tuple(argv)).losses


# ---- ways to give a mask ---------------------------------------------------------------------------------------


def test_a_mask_image_weighs_the_loss(train, pictures, tmp_path, unmasked):
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos, conditioning_data_dir=pictures.grey_masks))
    assert train(config, "--masked_loss", *STILL).losses == scaled(unmasked)


def test_mask_images_named_in_the_config_count_without_masked_loss(train, pictures, tmp_path, unmasked):
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos, conditioning_data_dir=pictures.grey_masks))
    assert train(config, *STILL).losses == scaled(unmasked)


def test_masks_are_given_on_the_command_line_for_the_folder_scheme(train, pictures, tmp_path, unmasked):
    for path in pictures.photos.iterdir():
        (tmp_path / "scheme" / "1_zundamon").mkdir(parents=True, exist_ok=True)
        (tmp_path / "scheme" / "1_zundamon" / path.name).write_bytes(path.read_bytes())
    folders = ["--train_data_dir", tmp_path / "scheme", "--conditioning_data_dir", pictures.grey_masks]
    sizes = ["--resolution", "64,64", "--train_batch_size", 2, "--caption_extension", ".txt"]
    assert train(None, *folders, *sizes, "--masked_loss", *STILL).losses == scaled(unmasked)


@pytest.mark.parametrize("more", [(), ("--masked_loss",)], ids=["alone", "with masked_loss"])
def test_alpha_mask_in_the_subset_is_enough_to_mask_the_loss(more, train, pictures, tmp_path, unmasked):
    config = write_toml(tmp_path / "d.toml", subset(pictures.veils, alpha_mask=True))
    assert train(config, *more, *STILL).losses == scaled(unmasked)


def test_alpha_mask_on_the_command_line_is_enough_to_mask_the_loss(train, pictures, tmp_path, unmasked):
    config = write_toml(tmp_path / "d.toml", subset(pictures.veils))
    assert train(config, "--alpha_mask", *STILL).losses == scaled(unmasked)


def test_transparency_is_not_looked_at_unless_asked(train, pictures, tmp_path, unmasked):
    assert train(write_toml(tmp_path / "d.toml", subset(pictures.veils)), *STILL).losses == unmasked


def test_a_mask_image_beats_transparency(train, pictures, tmp_path, unmasked):
    save(tmp_path / "masks", "veil0", np.full((64, 64), 102, np.uint8))
    save(tmp_path / "masks", "veil1", np.full((64, 64), 102, np.uint8))
    keys = {"conditioning_data_dir": tmp_path / "masks", "alpha_mask": True}
    config = write_toml(tmp_path / "d.toml", subset(pictures.veils, **keys))
    assert train(config, *STILL).losses == scaled(unmasked, 0.4)


def test_both_kinds_of_mask_may_share_a_batch(train, pictures, tmp_path):
    """Images with a mask file, with alpha, and with nothing: the loss is the sum of what each mask does alone."""

    def losses(name, photo_keys, veil_keys):
        subsets = [subset(pictures.photos, **photo_keys), subset(pictures.veils, **veil_keys)]
        config = write_toml(tmp_path / f"{name}.toml", *subsets, subset(pictures.regularisation), batch_size=6)
        return np.array(train(config, *STILL, "--max_train_steps", 1, name=name).losses)

    files, alpha = {"conditioning_data_dir": pictures.photo_masks}, {"alpha_mask": True}
    none, only_files, only_alpha, both = (
        losses("none", {}, {}), losses("files", files, {}), losses("alpha", {}, alpha), losses("both", files, alpha)
    )  # fmt: skip
    assert (only_files < none).all()
    assert (only_alpha < none).all()
    np.testing.assert_allclose(both - none, (only_files - none) + (only_alpha - none), rtol=1e-4)


@pytest.mark.parametrize("name", ["masks", "alpha", "both", "regularisation"])
def test_the_examples_configs_train(name, train, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ROOT / "examples" / "masked_lora" / f"dataset_{name}.toml"
    run = train(config, "--masked_loss", "--max_train_steps", 1)
    assert 0 < run.losses[0] < 1


def test_masked_loss_without_any_mask_is_an_error(family: Family, pictures, tmp_path, capsys):
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos))
    assert family.run(*arguments(family, tmp_path, config, "--masked_loss")) == 2
    error = capsys.readouterr().err
    assert "--masked_loss" in error
    assert "conditioning_data_dir" in error
    assert "alpha_mask" in error


# ---- what a mask does ------------------------------------------------------------------------------------------


def test_a_mask_and_its_opposite_share_the_loss_of_the_whole_picture(train, pictures, tmp_path, unmasked):
    for name in ("photo0", "photo1"):
        save(tmp_path / "opposite", name, 255 - half())
    left, right = (
        train(write_toml(tmp_path / f"{name}.toml", subset(pictures.photos, conditioning_data_dir=folder)), *STILL,
              name=name).losses
        for name, folder in (("left", pictures.photo_masks), ("right", tmp_path / "opposite"))
    )  # fmt: skip
    assert left != pytest.approx(right, rel=1e-2)
    assert [one + other for one, other in zip(left, right, strict=True)] == pytest.approx(unmasked, rel=1e-5)


def test_black_masks_leave_nothing_to_learn(train, pictures, tmp_path):
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos, conditioning_data_dir=pictures.black_masks))
    run = train(config, "--masked_loss")
    assert run.losses == [0, 0]
    ups = {name: tensor for name, tensor in run.tensors.items() if "lora_up" in name}
    assert ups
    assert not any(tensor.any() for tensor in ups.values())


def test_masks_with_regularisation_images_train_both(train, pictures, tmp_path):
    """Batches of one: the images with black masks add nothing, the regularisation images add their weight."""
    masked = subset(pictures.photos, conditioning_data_dir=pictures.black_masks)
    config = write_toml(
        tmp_path / "d.toml", masked, subset(pictures.regularisation, is_reg=True, num_repeats=1), batch_size=1
    )
    steps = ("--learning_rate", "1e-12", "--max_train_steps", 4)
    whole = train(config, *steps, name="whole").losses
    halved = train(config, *steps, "--prior_loss_weight", 0.5, name="halved").losses
    assert sorted(loss > 0 for loss in whole) == [False, False, True, True]
    assert halved == pytest.approx([0.5 * loss for loss in whole], rel=1e-5)


def test_regularisation_images_may_have_masks_of_their_own(train, pictures, tmp_path):
    regularisation = subset(pictures.regularisation, is_reg=True)
    plain = write_toml(tmp_path / "plain.toml", subset(pictures.cutouts, alpha_mask=True), regularisation)
    for name in ("reg0", "reg1"):
        save(tmp_path / "masks", name, half())
    masked = {**regularisation, "conditioning_data_dir": tmp_path / "masks"}
    config = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True), masked)
    assert sum(train(config, *STILL).losses) < sum(train(plain, *STILL, name="plain").losses)


# ---- caches ----------------------------------------------------------------------------------------------------

CACHES = {
    "none": (),
    "memory": ("--cache_latents",),
    "disk": ("--cache_latents", "--cache_latents_to_disk"),
}


@pytest.fixture
def mixture(pictures: Pictures, tmp_path: Path) -> Path:
    """Write a config with all kinds of masks, buckets, flips and regularisation images."""
    save(tmp_path / "wide", "wide", np.random.default_rng(0).integers(0, 256, (90, 170, 4), dtype=np.uint8), "wide")
    return write_toml(
        tmp_path / "mixture.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks, flip_aug=True),
        subset(pictures.cutouts, alpha_mask=True),
        subset(tmp_path / "wide", alpha_mask=True, flip_aug=True, num_repeats=2),
        subset(pictures.regularisation, is_reg=True),
        resolution=[128, 64],
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=128,
    )


def masks_of(family: Family, argv: list[str], num_batches: int) -> list[torch.Tensor | None]:
    """Return the masks of a run's first batches, read as training reads them."""
    options = read_training(argv, family.script).options
    made, parts = family.load()
    data = training_data.read(options, made.bucket_step_multiple)
    plan = training_data.make_plan(data, options, 7, 1)
    stores = training_data.Stores()
    if options.caching.cache_latents:
        from accelerate import Accelerator

        encode = training_data.encoder(made, lambda: parts)
        accelerator = Accelerator(cpu=True)
        found = training_data.cache(data, options.caching, made.name, encode, torch.float32, "vae", accelerator)
        stores = training_data.Stores(found)
    batches = iter(training_data.load(data, options, plan, stores, made, num_batches))
    return [next(batches).masks for _ in range(num_batches)]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_cache_gives_the_masks_of_the_files(cache, family: Family, mixture, tmp_path):
    argv = arguments(family, tmp_path, mixture, "--cache_dir", tmp_path / "cache")
    decoded = masks_of(family, argv, 8)
    cached = masks_of(family, [*argv, *CACHES[cache]], 8)
    assert len({tuple(mask.shape[2:]) for mask in decoded if mask is not None}) == 2
    for one, other in zip(decoded, cached, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_cache_on_disk_trains_the_same_network_as_one_in_memory(train, mixture, tmp_path):
    disk = (*CACHES["disk"], "--cache_dir", tmp_path / "cache")
    in_memory = train(mixture, *CACHES["memory"], "--max_train_steps", 4, name="memory").tensors
    filled = train(mixture, *disk, "--max_train_steps", 4, name="filled").tensors
    read = train(mixture, *disk, "--max_train_steps", 4, name="read").tensors
    assert all(torch.equal(in_memory[name], filled[name]) for name in in_memory)
    assert all(torch.equal(in_memory[name], read[name]) for name in in_memory)


def test_switching_a_mask_on_and_off_takes_effect_with_a_cache_on_disk(train, pictures, tmp_path):
    def losses(name: str, **keys: object) -> list[float]:
        config = write_toml(tmp_path / f"{name}.toml", subset(pictures.veils, **keys))
        return train(config, *CACHES["disk"], "--cache_dir", tmp_path / "cache", *STILL, name=name).losses

    off = losses("off")
    assert losses("on", alpha_mask=True) == scaled(off)
    assert losses("off again") == off


def test_a_cache_lies_beside_the_images_unless_told_otherwise(train, pictures, tmp_path):
    for i in range(2):
        save(tmp_path / "images", f"image{i}", np.dstack([np.full((64, 64, 3), 90, np.uint8), half()]), "grey")
    train(write_toml(tmp_path / "d.toml", subset(tmp_path / "images", alpha_mask=True)), *CACHES["disk"])
    beside = {path.name.partition(".")[0] for path in (tmp_path / "images").iterdir() if path.suffix == ".safetensors"}
    assert {name[:6] for name in beside} == {"image0", "image1"}


def test_one_line_says_what_the_masks_do(train, mixture, tmp_path):
    log = tmp_path / "log.txt"
    train(mixture, "--masked_loss", "--max_train_steps", 1, "--console_log_file", log)
    (line,) = [line for line in log.read_text().splitlines() if " masks: " in line]
    assert "5 of 7 images (2 files, 3 alpha)" in line
    assert "white" in line
    assert "mean weight 0.5" in line
