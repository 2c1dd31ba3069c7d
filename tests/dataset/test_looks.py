"""Looks of a sample: what is masked out is filled, in the cache and without it, and a changed mask is noticed."""

import json
import logging
import os
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from dataset.pictures import StubEncoder, sample_of, save_picture, settings_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.dataset import contact_sheet, mask_shares
from library.dataset.config import SubsetConfig
from library.dataset.geometry import Transform
from library.dataset.images import read_mask_weights, read_training_pixels
from library.dataset.latents import build_store
from library.dataset.loader import DrawnImages, LoaderSettings
from library.dataset.looks import looks_of
from library.dataset.plan import Draw
from library.masks import PLAIN, MaskShape, MaskSource, to_array

SETTINGS = LoaderSettings(seed=1, max_train_steps=100)
FILLS = ("extend", "mean", "noise")


@pytest.fixture
def encoder():
    return StubEncoder()


def soft_mask(seed=5):
    """Return a mask (80, 96) uint8 of which about half is black, in large patches with soft edges."""
    coarse = np.random.default_rng(seed).integers(-255, 256, (4, 5)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((96, 80), Image.Resampling.BILINEAR)).clip(0, 255).astype(np.uint8)


def with_alpha(path, *, hidden=0, mask=None):
    """Write a picture whose colours depend on `hidden` where its alpha is 0, and nowhere else."""
    alpha = soft_mask() if mask is None else mask
    learnt, other = (np.random.default_rng(seed).integers(0, 256, (80, 96, 3), dtype=np.uint8) for seed in (0, hidden))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.dstack((np.where(alpha[..., None] > 0, learnt, other), alpha))).save(path)
    return path


def filled(path, *fills, mask=None, **settings):
    """Return a sample whose subset has these fills."""
    subset = SubsetConfig(path.parent, mask_fill=fills or ("keep",), **settings)
    return sample_of(path, mask or MaskSource("alpha"), subset=subset)


def latents_of(store, index=0, **which):
    return store.get(index, flip=False, **which)[0]


def drawn(sample, store=None, **changes):
    """Return batches of one sample in 60 epochs."""
    dataset = DrawnImages([sample], replace(SETTINGS, **changes), store=store)
    return [dataset[(Draw(0, 0, epoch, 0),)] for epoch in range(60)]


# ---- which looks there are -------------------------------------------------------------------------------------


def test_each_fill_is_a_look_and_noises_are_told_apart(tmp_path):
    looks = looks_of(filled(tmp_path / "a.png", "noise", "mean", "noise", "mean", "keep"))
    assert [look.fill.name for look in looks] == ["noise", "mean", "noise1", "mean", ""]


def test_an_image_without_a_mask_is_not_filled(tmp_path, encoder):
    sample = filled(with_alpha(tmp_path / "a.png"), "extend", "noise", mask=MaskSource("none"))
    assert [look.fill.is_keep for look in looks_of(sample)] == [True]
    assert (read_training_pixels(sample) == read_training_pixels(replace(sample, subset=SubsetConfig(tmp_path)))).all()


@pytest.mark.parametrize("to_disk", [True, False])
def test_draws_take_the_looks_alike_with_and_without_a_cache(tmp_path, encoder, to_disk):
    sample = filled(with_alpha(tmp_path / "a.png"), "extend", "noise", "noise", flip_aug=True)
    store = build_store([sample], settings_of(to_disk=to_disk, dtype=torch.float32), encoder)
    seen = Counter()
    for cached, decoded in zip(drawn(sample, store), drawn(sample), strict=True):
        pooled = torch.nn.functional.avg_pool2d(decoded.images, 8)
        torch.testing.assert_close(cached.latents[:, :3], pooled, rtol=0, atol=0.02)
        assert torch.equal(cached.masks, decoded.masks)
        seen[tuple(float(side.double().sum()) for side in decoded.images.chunk(2, dim=-1))] += 1
    assert len(seen) == 6, "three looks, each also mirrored"
    assert min(seen.values()) > 2


def test_a_fill_that_is_named_twice_is_drawn_twice_as_often(tmp_path):
    batches = drawn(filled(with_alpha(tmp_path / "a.png"), "mean", "mean", "extend"))
    counts = Counter(float(batch.images.double().sum()) for batch in batches)
    assert len(counts) == 2
    assert 30 < max(counts.values()) < 50


# ---- what is masked out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [*FILLS, "keep"])
@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_what_is_masked_out_changes_no_bit_of_a_batch_unless_kept(tmp_path, encoder, fill, cache):
    """Hidden colours under transparency, with all that moves a picture: random cuts without a cache, mirrored."""
    batches = []
    for hidden in (1, 2):
        path = with_alpha(tmp_path / str(hidden) / "img" / "a.png", hidden=hidden)
        moved = {"flip_aug": True} | ({"random_crop": True, "color_aug": True} if cache == "none" else {})
        sample = filled(path, fill, **moved)
        store = None if cache == "none" else build_store([sample], settings_of(to_disk=cache == "disk"), encoder)
        batches.append(drawn(sample, store))
    given = [each.images if cache == "none" else each.latents for each in batches[0]]
    other = [each.images if cache == "none" else each.latents for each in batches[1]]
    assert all(torch.equal(*pair) for pair in zip(given, other, strict=True)) == (fill != "keep")
    assert all(torch.equal(one.masks, two.masks) for one, two in zip(*batches, strict=True))


@pytest.mark.parametrize("factor", [2, 0.5, 1])
def test_a_mask_file_may_be_a_rescaled_copy(tmp_path, factor):
    """White left of column 48 of 96: right of it is filled, to the pixel."""
    pixels = np.full((80, 96, 3), 200, np.uint8)
    pixels[:, 48:] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mask = np.zeros((int(80 * factor), int(96 * factor)), np.uint8)
    mask[:, : mask.shape[1] // 2] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    sample = filled(tmp_path / "a.png", "extend", mask=MaskSource("file", tmp_path / "m.png"))
    assert (read_training_pixels(sample) == 200).all()


def test_noise_is_the_same_whatever_format_the_picture_is_saved_in(tmp_path, encoder):
    """A JPEG, and a PNG of its pixels with others where they are masked out."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    pixels, mask = np.asarray(Image.open(tmp_path / "a.jpg")), soft_mask()
    Image.fromarray(np.where(mask[..., None] > 0, pixels, 255 - pixels)).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    source = MaskSource("file", tmp_path / "m.png")
    samples = [filled(tmp_path / name, "noise", mask=source) for name in ("a.jpg", "a.png")]
    store = build_store(samples, settings_of(), encoder)
    assert torch.equal(latents_of(store, 0), latents_of(store, 1))


@pytest.mark.parametrize(("fills", "named"), [(("mean",), ", fill: mean"), (("mean", "keep"), ", fill: mean, keep")])
def test_the_contact_sheet_shows_and_names_what_is_filled(tmp_path, monkeypatch, fills, named):
    pixels, mask = np.full((80, 96, 3), 200, np.uint8), np.zeros((80, 96), np.uint8)
    pixels[:, 48:] = 0
    mask[:, :48] = 255
    Image.fromarray(np.dstack((pixels, mask))).save(tmp_path / "a.png")
    texts = []
    wrapped = contact_sheet.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        contact_sheet.ImageDraw.ImageDraw,
        "text",
        lambda self, place, text, *more: (texts.append(text), wrapped(self, place, text, *more))[1],
    )
    cell = contact_sheet.cells([filled(tmp_path / "a.png", *fills, mask_weight_min=0.5)]).popitem()[1]
    shown = np.asarray(cell)[: contact_sheet.SIDE, : contact_sheet.SIDE]
    assert (shown == 200).all()
    assert f"75% is learnt, mask: alpha channel{named}" in texts, "a half of all, and the least weight of the rest"


def test_noise_is_as_strong_in_a_picture_that_is_reduced(tmp_path):
    strengths = []
    for factor in (1, 5):
        rng = np.random.default_rng(0)
        pixels = rng.integers(90, 166, (64 * factor, 64 * factor, 3), dtype=np.uint8)
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[:, : 16 * factor] = 255
        Image.fromarray(np.dstack((pixels, mask))).save(tmp_path / "a.png")
        size = (64 * factor, 64 * factor)
        sample = replace(filled(tmp_path / "a.png", "noise"), transform=Transform(size, (64, 64), (0, 0), (64, 64)))
        strengths.append(read_training_pixels(sample)[:, 17:].std())
    assert strengths[1] == pytest.approx(strengths[0], rel=0.1)


# ---- the cache -------------------------------------------------------------------------------------------------


def test_memory_and_disk_hold_the_same_looks(tmp_path, encoder):
    sample = filled(with_alpha(tmp_path / "a.png"), *FILLS, flip_aug=True)
    on_disk, in_memory = (build_store([sample], settings_of(to_disk=each), encoder) for each in (True, False))
    for look in range(3):
        for flip in (False, True):
            (one, mask), (two, other) = (store.get(0, flip=flip, look=look) for store in (on_disk, in_memory))
            assert torch.equal(one, two)
            assert (mask == other).all()
    (there,), (here,) = (mask_shares.stored([sample], each) for each in (on_disk, in_memory))
    (decoded,) = mask_shares.decoded([sample])
    assert there.share == here.share == pytest.approx(decoded.share)


def test_each_fill_keeps_its_entries_so_that_switching_back_encodes_nothing(tmp_path, encoder):
    path = with_alpha(tmp_path / "a.png")
    for fills, expected in ((("keep",), 1), (("extend",), 1), (("noise", "noise"), 2), (("noise", "extend"), 0)):
        build_store([filled(path, *fills)], settings_of(), encoder)
        assert encoder.taken() == expected
    build_store([filled(path)], settings_of(), encoder)
    assert encoder.taken() == 0
    names = {each.name for each in tmp_path.glob("*.safetensors")}
    assert names == {f"a.png_64x64_sd{tag}.safetensors" for tag in ("", "~extend", "~noise", "~noise1")}


def test_an_unchecked_cache_gives_each_look_its_own_entry(tmp_path, encoder):
    sample = filled(with_alpha(tmp_path / "a.png"), *FILLS)
    checked = build_store([sample], settings_of(), encoder)
    encoder.taken()
    unchecked = build_store([sample], settings_of(skip_check=True), encoder)
    assert encoder.taken() == 0
    kept = [latents_of(checked, look=look) for look in range(3)]
    assert [torch.equal(latents_of(unchecked, look=look), kept[look]) for look in range(3)] == [True] * 3
    assert not torch.equal(kept[0], kept[1])


def file_masked(tmp_path, *fills, shape=PLAIN, **settings):
    path = tmp_path / "a.png"
    if not path.exists():
        save_picture(path, 0, 3)
        Image.fromarray(soft_mask()).save(tmp_path / "m.png")
    return filled(path, *fills, mask=MaskSource("file", tmp_path / "m.png", shape), **settings)


SHAPES = [
    MaskShape(invert=True),
    MaskShape(erode=2.0),
    MaskShape(dilate=2.0),
    MaskShape(feather=2.0),
    MaskShape(labels=(("255", 0.5),)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.in_words())
def test_another_shape_renews_only_the_mask_and_without_a_change_nothing(tmp_path, encoder, caplog, shape):
    before = latents_of(build_store([file_masked(tmp_path)], settings_of(), encoder))
    caplog.set_level(logging.INFO)
    sample = file_masked(tmp_path, shape=shape)
    for expected in ("0 entries up to date, 1 masks changed", "1 entries up to date, 0 masks changed"):
        store = build_store([sample], settings_of(), encoder)
        assert caplog.messages[-1] == f"latents: {expected}, 0 encoded"
        latents, mask = store.get(0, flip=False)
        assert torch.equal(latents, before)
        assert (to_array(mask) == read_mask_weights(sample)).all()
        assert (to_array(mask) != read_mask_weights(file_masked(tmp_path))).any()


@pytest.mark.parametrize("fill", FILLS)
def test_with_a_fill_another_shape_encodes_again(tmp_path, encoder, fill):
    build_store([file_masked(tmp_path, fill)], settings_of(), encoder)
    encoder.taken()
    for shape in SHAPES:
        for expected in (1, 0):
            build_store([file_masked(tmp_path, fill, shape=shape)], settings_of(), encoder)
            assert encoder.taken() == expected


def test_with_a_fill_an_edited_mask_encodes_again(tmp_path, encoder):
    sample = file_masked(tmp_path, "mean")
    before = latents_of(build_store([sample], settings_of(), encoder))
    Image.fromarray(soft_mask(6)).save(tmp_path / "m.png")
    os.utime(tmp_path / "m.png", ns=(5, 5))
    encoder.taken()
    store = build_store([sample], settings_of(), encoder)
    assert encoder.taken() == 1
    assert not torch.equal(latents_of(store), before)
    assert (to_array(store.get(0, flip=False)[1]) == read_mask_weights(sample)).all()


def test_with_a_fill_another_kind_of_mask_encodes_again(tmp_path, encoder):
    path = with_alpha(tmp_path / "a.png")
    Image.fromarray(soft_mask(6)).save(tmp_path / "m.png")
    build_store([filled(path, "mean")], settings_of(), encoder)
    encoder.taken()
    build_store([filled(path, "mean", mask=MaskSource("file", tmp_path / "m.png"))], settings_of(), encoder)
    assert encoder.taken() == 1


def test_noise_of_another_name_encodes_again_and_other_fills_do_not(tmp_path, encoder):
    for fill, expected in (("noise", 1), ("extend", 0)):
        path = with_alpha(tmp_path / fill / "a.png")
        build_store([filled(path, fill)], settings_of(), encoder)
        path.parent.rename(tmp_path / f"{fill} renamed")
        encoder.taken()
        build_store([filled(tmp_path / f"{fill} renamed" / "a.png", fill)], settings_of(), encoder)
        assert encoder.taken() == expected


def test_settings_of_weights_encode_nothing(tmp_path, encoder):
    build_store([file_masked(tmp_path)], settings_of(), encoder)
    encoder.taken()
    for name in ("mask_weight_min", "unmasked_probability", "mask_area_norm", "mask_prior_weight"):
        store = build_store([file_masked(tmp_path, **{name: 0.5})], settings_of(), encoder)
        assert encoder.taken() == 0
        assert (to_array(store.get(0, flip=False)[1]) == read_mask_weights(file_masked(tmp_path))).all()


def test_an_entry_of_a_plain_run_is_written_as_it_was_before_there_were_fills(tmp_path, encoder):
    """So entries of either age are fresh for either program; the fields are those of format 1."""
    build_store([file_masked(tmp_path)], settings_of(), encoder)
    data = (tmp_path / "a.png_64x64_sd.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    written = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fingerprint"])
    assert set(written) == {"image", "transform", "vae", "dtype", "mask_kind", "mask", "format"}
    assert written["format"] == 1
    encoder.taken()
    build_store([file_masked(tmp_path)], settings_of(), encoder)
    assert encoder.taken() == 0


# ---- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_cached", [True, False])
def test_no_cell_weighs_less_than_the_least_weight(tmp_path, encoder, is_cached):
    sample = file_masked(tmp_path, mask_weight_min=0.25)
    store = build_store([sample], settings_of(), encoder) if is_cached else None
    weights = drawn(sample, store)[0].masks[0, 0].numpy()
    assert (weights == np.maximum(read_mask_weights(sample), np.float32(0.25))).all()
    assert 0.25 in weights


def test_an_image_without_a_mask_weighs_one_beside_one_with_a_least_weight(tmp_path):
    samples = [file_masked(tmp_path, mask_weight_min=0.25), file_masked(tmp_path, mask_weight_min=0.25)]
    samples[1] = replace(samples[1], mask=MaskSource("none"))
    masks = DrawnImages(samples, SETTINGS)[(Draw(0, 0, 1, 0), Draw(1, 0, 1, 0))].masks
    assert masks[0].min() == 0.25
    assert (masks[1] == 1).all()


@pytest.mark.parametrize("is_cached", [True, False])
def test_some_draws_are_shown_without_their_mask(tmp_path, encoder, is_cached):
    sample = file_masked(tmp_path, unmasked_probability=0.3)
    store = build_store([sample], settings_of(), encoder) if is_cached else None
    masks = [batch.masks for batch in drawn(sample, store)]
    assert 8 < sum(mask is None for mask in masks) < 30
    assert all((mask[0, 0].numpy() == read_mask_weights(sample)).all() for mask in masks if mask is not None)
    held_back = replace(sample, is_validation=True)
    assert all(batch.masks is not None for batch in drawn(held_back, store))


def test_a_draw_without_its_mask_leaves_the_other_draws_as_they_are(tmp_path):
    moved = {"flip_aug": True, "random_crop": True, "color_aug": True}
    plain, half = (drawn(file_masked(tmp_path, unmasked_probability=p, **moved)) for p in (0.0, 0.5))
    assert all(torch.equal(one.images, two.images) for one, two in zip(plain, half, strict=True))


# ---- everything ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mask=st.sampled_from(["soft", "black", "white", "one pixel"]),
    fills=st.lists(st.sampled_from([*FILLS, "keep"]), min_size=1, max_size=3),
    shape=st.builds(
        MaskShape,
        labels=st.sampled_from([(), (("0", 0.5), ("other", 1.0)), (("255", 0.0),)]),
        invert=st.booleans(),
        erode=st.sampled_from([0.0, 1.5, 200.0]),
        dilate=st.sampled_from([0.0, 1.5, 200.0]),
        feather=st.sampled_from([0.0, 0.1, 3.0, 500.0]),
    ),
    weights=st.fixed_dictionaries(
        {"mask_weight_min": st.sampled_from([0.0, 0.1, 1.0]), "unmasked_probability": st.sampled_from([0.0, 0.5, 1.0])}
    ),
    flip=st.booleans(),
    is_cached=st.booleans(),
)
def test_no_combination_gives_nan_or_leaves_the_range(tmp_path, mask, fills, shape, weights, flip, is_cached):
    path, file = tmp_path / "a.png", tmp_path / "m.png"
    if not path.exists():
        save_picture(path, 0, 3)
    pixels = {"soft": soft_mask(), "black": np.zeros((80, 96), np.uint8), "white": np.full((80, 96), 255, np.uint8)}
    pixels["one pixel"] = pixels["black"].copy()
    pixels["one pixel"][40, 50] = 255
    Image.fromarray(pixels[mask]).save(file)
    sample = filled(path, *fills, mask=MaskSource("file", file, shape), flip_aug=flip, **weights)
    store = build_store([sample], settings_of(to_disk=False), StubEncoder()) if is_cached else None
    for epoch in range(3):
        batch = DrawnImages([sample], SETTINGS, store=store)[(Draw(0, 0, epoch, 0),)]
        values = batch.latents if is_cached else batch.images
        assert values.isfinite().all()
        assert values.abs().max() <= 1.01
        if batch.masks is not None:
            assert batch.masks.isfinite().all()
            assert batch.masks.min() >= weights["mask_weight_min"] - 1e-6
            assert batch.masks.max() <= 1
