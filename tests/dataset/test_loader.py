import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset.pictures import CUT, StubEncoder, sample_of, save_picture, settings_of
from PIL import Image

from library.dataset.config import SubsetConfig
from library.dataset.images import read_mask_weights, read_training_pixels
from library.dataset.latents import build_store
from library.dataset.loader import DrawnImages, LoaderSettings, make_loader
from library.dataset.plan import Draw
from library.errors import DataError
from library.masks import MaskSource, kept_tokens

SETTINGS = LoaderSettings(seed=1, max_train_steps=100, prior_loss_weight=0.25)


@pytest.fixture
def pictures(tmp_path):
    return [save_picture(tmp_path / "img" / f"{name}.png", seed) for seed, name in enumerate("abcd")]


def tokenize(captions):
    return torch.tensor([[len(caption), hash_of(caption)] for caption in captions])


def hash_of(caption):
    return sum(ord(letter) * (at + 1) for at, letter in enumerate(caption))


def draws_of(*indices, epoch=1, step=0):
    return tuple(Draw(index, 0, epoch, step) for index in indices)


def assert_same(one, other):
    for field in fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


def batches_of(dataset, plan, num_workers=0):
    loader = make_loader(dataset, plan, num_workers=num_workers, pin_memory=False)
    return list(loader)


def augmented_samples(pictures):
    subset = SubsetConfig(
        pictures[0].parent, flip_aug=True, random_crop=True, color_aug=True, shuffle_caption=True, alpha_mask=True
    )
    return [sample_of(path, captions=("a, b, c, d, e",), subset=subset) for path in pictures]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(pictures, num_workers):
    dataset = DrawnImages(augmented_samples(pictures), SETTINGS, tokenize=tokenize)
    plan = [draws_of(*pair, epoch=epoch) for epoch in (1, 2) for pair in ((0, 1), (2, 3), (1, 2), (3,), (0,))]
    here, there = batches_of(dataset, plan), batches_of(dataset, plan, num_workers)
    assert len(here) == len(there) == 10
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)


def test_processes_deal_the_images_of_a_batch_out_in_turn(pictures):
    samples = augmented_samples(pictures)
    whole = DrawnImages(samples, SETTINGS, tokenize=tokenize)[draws_of(0, 1, 2)]
    assert whole.share is None
    for index in range(2):
        dealt = replace(SETTINGS, process_index=index, num_processes=2)
        batch = DrawnImages(samples, dealt, tokenize=tokenize)[draws_of(0, 1, 2)]
        assert batch.names == whole.names[index::2]
        assert torch.equal(batch.images, whole.images[index::2])
        assert torch.equal(batch.masks, whole.masks[index::2])
        assert (batch.share.num_images, batch.share.is_idle) == (3, False)


def test_a_process_without_an_image_of_its_own_takes_part_with_the_first_one(pictures):
    dealt = replace(SETTINGS, process_index=1, num_processes=2)
    batch = DrawnImages(augmented_samples(pictures), dealt)[draws_of(2)]
    assert batch.names == (str(pictures[2]),)
    assert batch.share.is_idle


def test_a_plan_without_end_is_loaded_as_far_as_it_is_wanted(pictures):
    dataset = DrawnImages(augmented_samples(pictures), SETTINGS)
    for num_workers in (0, 1):
        loader = make_loader(dataset, repeat(draws_of(0, 1)), num_workers=num_workers, pin_memory=False)
        assert [batch.names for batch in islice(loader, 12)] == [(str(pictures[0]), str(pictures[1]))] * 12


def test_draws_differ_between_epochs_and_repeats(pictures):
    dataset = DrawnImages(augmented_samples(pictures), SETTINGS)
    drawn = [dataset[(Draw(0, again, epoch, 0),)] for epoch in (1, 2, 3) for again in (0, 1, 2)]
    assert len({batch.captions for batch in drawn}) > 4
    assert len({batch.images.sum().item() for batch in drawn}) > 4


def test_an_image_reaches_the_batch_as_its_bucket_shows_it(pictures):
    sample = sample_of(pictures[0])
    batch = DrawnImages([sample], SETTINGS)[draws_of(0)]
    assert batch.images.shape == (1, 3, 64, 64)
    assert batch.latents is None
    pixels = torch.from_numpy(read_training_pixels(sample)).permute(2, 0, 1)
    torch.testing.assert_close(batch.images[0], pixels / 127.5 - 1)
    assert batch.masks.shape == (1, 1, 8, 8)
    assert (batch.masks[0, 0].numpy() == read_mask_weights(sample)).all()


def test_tokens_are_those_of_the_captions(pictures):
    samples = [sample_of(path, captions=(f"{path.stem} cat",)) for path in pictures]
    batch = DrawnImages(samples, SETTINGS, tokenize=tokenize)[draws_of(2, 0)]
    assert batch.captions == ("c cat", "a cat")
    assert torch.equal(batch.tokens, tokenize(["c cat", "a cat"]))
    assert DrawnImages(samples, SETTINGS)[draws_of(2, 0)].tokens is None


def test_image_and_mask_are_drawn_with_one_transform(tmp_path):
    """A picture whose colour is its own alpha: wherever it is cut, the mask is the picture's mean by cells."""
    grey = np.random.default_rng(0).integers(0, 256, (80, 96), dtype=np.uint8)
    Image.fromarray(np.dstack((grey, grey, grey, grey))).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "mask.png")
    subset = SubsetConfig(tmp_path, flip_aug=True, random_crop=True)
    for mask in (MaskSource("alpha"), MaskSource("file", tmp_path / "mask.png")):
        dataset = DrawnImages([sample_of(tmp_path / "a.png", mask, subset=subset)], SETTINGS)
        for epoch in range(1, 20):
            batch = dataset[draws_of(0, epoch=epoch)]
            cells = torch.nn.functional.avg_pool2d(batch.images[:, :1] / 2 + 0.5, 8)
            torch.testing.assert_close(batch.masks, cells, rtol=0, atol=1e-6)


@pytest.mark.parametrize("to_disk", [True, False])
def test_caching_changes_neither_masks_nor_captions_nor_flips(pictures, tmp_path, to_disk):
    mask = save_picture(tmp_path / "masks" / "b.png", 9, 1)
    subset = SubsetConfig(pictures[0].parent, flip_aug=True, shuffle_caption=True)
    sources = [MaskSource("alpha"), MaskSource("file", mask), MaskSource("none"), MaskSource("alpha")]
    samples = [
        sample_of(path, source, subset=subset, captions=("a, b, c, d",))
        for path, source in zip(pictures, sources, strict=True)
    ]
    store = build_store(samples, settings_of(to_disk=to_disk, dtype=torch.float32), StubEncoder())
    cached = DrawnImages(samples, SETTINGS, tokenize=tokenize, store=store)
    decoded = DrawnImages(samples, SETTINGS, tokenize=tokenize)
    for epoch in range(1, 8):
        one, other = cached[draws_of(0, 1, 2, 3, epoch=epoch)], decoded[draws_of(0, 1, 2, 3, epoch=epoch)]
        assert one.images is None
        pooled = torch.nn.functional.avg_pool2d(other.images, 8)
        torch.testing.assert_close(one.latents[:, :3], pooled, rtol=0, atol=0.02)
        assert_same(replace(one, latents=None), replace(other, images=None))


def test_latents_in_memory_are_not_sent_to_workers(pictures):
    samples = [sample_of(path) for path in pictures]
    store = build_store(samples, settings_of(to_disk=False), StubEncoder())
    dataset = DrawnImages(samples, SETTINGS, store=store)
    assert make_loader(dataset, [], num_workers=4, pin_memory=False).num_workers == 0


def test_workers_read_the_cache_on_disk(pictures):
    samples = [sample_of(path) for path in pictures]
    store = build_store(samples, settings_of(), StubEncoder())
    dataset = DrawnImages(samples, SETTINGS, store=store)
    plan = [draws_of(0, 1), draws_of(2, 3)]
    for one, other in zip(batches_of(dataset, plan), batches_of(dataset, plan, 2), strict=True):
        assert_same(one, other)


def test_without_any_mask_a_batch_has_none(pictures):
    samples = [sample_of(path, MaskSource("none")) for path in pictures]
    assert DrawnImages(samples, SETTINGS)[draws_of(0, 1)].masks is None


def test_an_unmasked_image_beside_a_masked_one_weighs_one(pictures):
    samples = [sample_of(pictures[0], MaskSource("none")), sample_of(pictures[1])]
    masks = DrawnImages(samples, SETTINGS)[draws_of(0, 1)].masks
    assert (masks[0] == 1).all()
    assert (masks[1, 0].numpy() == read_mask_weights(samples[1])).all()


def test_regularisation_images_weigh_the_prior_loss_weight(pictures):
    samples = [sample_of(pictures[0]), sample_of(pictures[1], is_reg=True)]
    assert DrawnImages(samples, SETTINGS)[draws_of(0, 1)].weights.tolist() == [1.0, 0.25]


def test_size_conditioning_is_of_the_draw(pictures):
    subset = SubsetConfig(pictures[0].parent, flip_aug=True)
    transform = replace(CUT, crop=(2, 0))  # 13 pixels too wide: 2 left, 11 right
    dataset = DrawnImages([sample_of(pictures[0], subset=subset, transform=transform)], SETTINGS)
    seen = {tuple(dataset[draws_of(0, epoch=epoch)].crop_top_lefts[0].tolist()) for epoch in range(20)}
    assert seen == {(0, 2), (0, 11)}
    batch = dataset[draws_of(0)]
    assert batch.original_sizes.tolist() == [[80, 96]]
    assert batch.target_sizes.tolist() == [[64, 64]]
    assert batch.crop_top_lefts.dtype == torch.int64


def test_a_face_in_the_name_is_cut_out(tmp_path):
    path = save_picture(tmp_path / "cat_48_40_16_16.png")
    settings = replace(CUT, target=(32, 32), resized=(38, 32), crop=(3, 0))
    subset = SubsetConfig(tmp_path, face_crop_aug_range=(1.0, 1.5))
    dataset = DrawnImages([sample_of(path, subset=subset, transform=settings)], SETTINGS)
    crops = {tuple(dataset[draws_of(0, epoch=epoch)].crop_top_lefts[0].tolist()) for epoch in range(20)}
    assert all(top > 0 for top, _ in crops), "closer than what covers the bucket"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_ends_the_run_in_one_line(pictures, num_workers):
    pictures[1].write_bytes(b"gone wrong")
    dataset = DrawnImages([sample_of(path) for path in pictures], SETTINGS)
    plan = chain([draws_of(0)], repeat(draws_of(1)))
    loader = iter(make_loader(dataset, plan, num_workers=num_workers, pin_memory=False))
    assert next(loader).names == (str(pictures[0]),)
    with pytest.raises(DataError, match=r"b\.png: cannot be decoded") as raised:
        next(loader)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.name == "nt", reason="there, a signal ends a process at once")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_the_workers_at_work(pictures, number):
    """Ctrl-C reaches them too, but the run takes one step more before it saves, and needs its batch."""
    dataset = DrawnImages(augmented_samples(pictures), SETTINGS)
    loader = iter(make_loader(dataset, repeat(draws_of(0, 1)), num_workers=1, pin_memory=False))
    next(loader)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    assert len(list(islice(loader, 12))) == 12  # more than are loaded ahead


CRASH = """
import sys
from itertools import repeat
from pathlib import Path
from dataset.pictures import sample_of
from library.dataset.loader import DrawnImages, LoaderSettings, make_loader
from library.dataset.plan import Draw
draws = repeat((Draw(0, 0, 1, 0),))
dataset = DrawnImages([sample_of(Path(sys.argv[1]))], LoaderSettings(1, 100))
loader = make_loader(dataset, draws, num_workers=1, pin_memory=False)
batches = iter(loader)
next(batches)
raise MemoryError
"""


def test_workers_end_with_a_run_that_breaks_off(pictures):
    """They are deaf to the signal by which Python ends them, and it waited for them for ever."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, "-c", CRASH, str(pictures[0])]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "MemoryError" in ended.stderr


def test_images_whose_output_is_preserved_are_marked_in_the_batch(pictures):
    preserved = SubsetConfig(pictures[0].parent, diff_output_preservation=True)
    samples = [sample_of(pictures[0]), sample_of(pictures[1], subset=preserved)]
    mixed, none = batches_of(DrawnImages(samples, SETTINGS), [draws_of(0, 1), draws_of(0, 0)])
    assert mixed.preserved.tolist() == [False, True]
    assert none.preserved is None


WIDE = replace(CUT, source=(256, 256), resized=(256, 256), crop=(0, 0), target=(256, 256))  # 16 x 16 tokens


def half_masked(folder, **subset):
    """Return pictures that are learnt at the left, by a file; at the top, by their alpha channel; and as a whole."""
    left, top = (np.zeros((256, 256), dtype=np.uint8) for _ in range(2))
    left[:, :88], top[:80] = 255, 255
    path = save_picture(folder / "a.png", 1, 3, (256, 256))
    Image.fromarray(left).save(folder / "mask.png")
    with Image.open(save_picture(folder / "b.png", 2, 3, (256, 256))) as image:
        image.putalpha(Image.fromarray(top))
        image.save(folder / "b.png")
    settings = {"subset": SubsetConfig(folder, **subset), "transform": WIDE}
    by_file = sample_of(path, MaskSource("file", folder / "mask.png"), **settings)
    return [by_file, sample_of(folder / "b.png", **settings), sample_of(path, MaskSource("none"), **settings)]


def test_tokens_out_of_reach_are_left_out_of_the_batch(tmp_path):
    dataset = DrawnImages(half_masked(tmp_path), replace(SETTINGS, token_reach=1))
    kept = dataset[draws_of(0, 1)].kept_tokens
    left = [16 * row + column for row in range(16) for column in range(6)]  # 11 columns of cells, and one within reach
    top = list(range(16 * 6))  # 10 rows, and one within reach, which is half a token
    assert (kept.dtype, kept.shape) == (torch.int64, (2, 128))  # 96 are a multiple of 64 only with 32 more
    assert set(left) < set(kept[0].tolist())
    assert kept[1].tolist() == top + list(range(96, 128))  # the next nearest are the next rows


def test_an_image_without_mask_keeps_its_batch_whole(tmp_path):
    dataset = DrawnImages(half_masked(tmp_path), replace(SETTINGS, token_reach=1))
    assert dataset[draws_of(0, 2)].kept_tokens is None
    assert dataset[draws_of(2, 2)].kept_tokens is None  # no masks at all


def test_all_tokens_are_kept_unless_a_reach_is_given(tmp_path):
    assert DrawnImages(half_masked(tmp_path), SETTINGS)[draws_of(0, 1)].kept_tokens is None


def test_the_kept_tokens_are_those_of_the_mask_as_it_was_flipped_with_and_without_cache(tmp_path):
    samples = half_masked(tmp_path, flip_aug=True)
    settings = replace(SETTINGS, token_reach=1)
    store = build_store(samples, settings_of(to_disk=False), StubEncoder())
    fresh, cached = (DrawnImages(samples, settings, store=each) for each in (None, store))
    seen = set()
    for epoch in range(8):
        draws = draws_of(0, epoch=epoch)
        batch = fresh[draws]
        assert torch.equal(batch.kept_tokens, kept_tokens(batch.masks, 1))
        assert torch.equal(batch.kept_tokens, cached[draws].kept_tokens)
        seen.add(tuple(batch.kept_tokens[0].tolist()))
    assert {0 in each for each in seen} == {True, False}  # to the left, and to the right once flipped
