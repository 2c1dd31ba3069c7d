import errno
import logging
import os
import shutil
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from dataset.pictures import CUT, StubEncoder, sample_of, save_picture, settings_of
from PIL import Image

from library.dataset import mask_shares
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.images import read_mask_weights
from library.dataset.latents import build_store, check_cache_folders, refuse_uncacheable
from library.errors import DataError, OptionError
from library.masks import MaskSource, to_array


@pytest.fixture
def encoder():
    return StubEncoder()


@pytest.fixture
def pictures(tmp_path):
    return [save_picture(tmp_path / "img" / f"{name}.png", seed) for seed, name in enumerate("abc")]


@pytest.fixture
def masks(tmp_path):
    return [save_picture(tmp_path / "masks" / f"{name}.png", 10 + seed, 1) for seed, name in enumerate("abc")]


def entries_of(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def with_files(pictures, masks):
    return [sample_of(picture, MaskSource("file", mask)) for picture, mask in zip(pictures, masks, strict=True)]


def latents_of(store, count):
    return torch.stack([store.get(index, flip=False)[0] for index in range(count)])


@pytest.mark.parametrize("to_disk", [True, False])
def test_masks_of_the_store_are_those_read_without_it(pictures, masks, encoder, to_disk):
    samples = [
        sample_of(pictures[0]),
        *with_files(pictures[1:2], masks[1:2]),
        sample_of(pictures[2], MaskSource("none")),
    ]
    store = build_store(samples, settings_of(to_disk=to_disk), encoder)
    for index, sample in enumerate(samples):
        latents, mask = store.get(index, flip=False)
        assert latents.shape == (4, 8, 8)
        assert latents.dtype == torch.float16
        weights = read_mask_weights(sample)
        assert (mask is None) == (weights is None)
        if mask is not None:
            assert (to_array(mask) == weights).all()


def test_memory_and_disk_hold_the_same(pictures, encoder):
    samples = [sample_of(picture, subset=SubsetConfig(picture.parent, flip_aug=True)) for picture in pictures]
    on_disk = build_store(samples, settings_of(), encoder)
    in_memory = build_store(samples, settings_of(to_disk=False), encoder)
    assert in_memory.is_in_memory
    assert not on_disk.is_in_memory
    for index in range(3):
        for flip in (False, True):
            (latents, mask), (kept, kept_mask) = (store.get(index, flip=flip) for store in (on_disk, in_memory))
            assert torch.equal(latents, kept)
            assert (mask == kept_mask).all()


@pytest.mark.parametrize("to_disk", [True, False])
def test_a_flip_mirrors_latents_and_mask(pictures, encoder, to_disk):
    sample = sample_of(pictures[0], subset=SubsetConfig(pictures[0].parent, flip_aug=True))
    store = build_store([sample], settings_of(to_disk=to_disk, dtype=torch.float32), encoder)
    latents, mask = store.get(0, flip=False)
    mirrored, mirrored_mask = store.get(0, flip=True)
    torch.testing.assert_close(mirrored, latents.flip(-1), rtol=0, atol=0.02)  # but for the noise
    assert not torch.equal(mirrored, latents.flip(-1)), "noise of its own"
    assert (mirrored_mask == mask[:, ::-1]).all()
    flipped = replace(sample, transform=replace(CUT, flip=True))
    assert (to_array(mirrored_mask) == read_mask_weights(flipped)).all()


def test_a_second_start_encodes_nothing(pictures, encoder, caplog):
    samples = [sample_of(picture) for picture in pictures]
    first = latents_of(build_store(samples, settings_of(), encoder), 3)
    assert encoder.taken() == 3
    caplog.set_level(logging.INFO)
    second = latents_of(build_store(samples, settings_of(), encoder), 3)
    assert encoder.taken() == 0
    assert torch.equal(first, second)
    assert caplog.messages == ["latents: 3 entries up to date, 0 masks changed, 0 encoded"]


def test_a_mask_switch_encodes_nothing(pictures, masks, encoder, caplog):
    by_kind = {
        "alpha": [sample_of(picture) for picture in pictures],
        "none": [sample_of(picture, MaskSource("none")) for picture in pictures],
        "file": with_files(pictures, masks),
    }
    first = latents_of(build_store(by_kind["none"], settings_of(), encoder), 3)
    assert encoder.taken() == 3
    caplog.set_level(logging.INFO)
    for kind in ("alpha", "file", "none", "file", "alpha", "none"):
        samples = by_kind[kind]
        store = build_store(samples, settings_of(), encoder)
        assert caplog.messages[-1] == "latents: 0 entries up to date, 3 masks changed, 0 encoded"
        assert torch.equal(latents_of(store, 3), first)
        for index, sample in enumerate(samples):
            mask, weights = store.get(index, flip=False)[1], read_mask_weights(sample)
            assert mask is None if weights is None else (to_array(mask) == weights).all()
    assert encoder.taken() == 0


def test_an_edited_mask_renews_only_that_mask(pictures, masks, encoder, caplog):
    samples = with_files(pictures, masks)
    build_store(samples, settings_of(), encoder)
    encoder.taken()
    save_picture(masks[1], 99, 1)
    os.utime(masks[1], ns=(5, 5))
    caplog.set_level(logging.INFO)
    store = build_store(samples, settings_of(), encoder)
    assert encoder.taken() == 0
    assert caplog.messages == ["latents: 2 entries up to date, 1 masks changed, 0 encoded"]
    assert (to_array(store.get(1, flip=False)[1]) == read_mask_weights(samples[1])).all()


def test_mirrored_latents_survive_a_new_mask(pictures, encoder):
    flipping = SubsetConfig(pictures[0].parent, flip_aug=True)
    before = build_store([sample_of(pictures[0], subset=flipping)], settings_of(), encoder).get(0, flip=True)[0]
    encoder.taken()
    unmasked = sample_of(pictures[0], MaskSource("none"), subset=flipping)
    after = build_store([unmasked], settings_of(), encoder).get(0, flip=True)[0]
    assert encoder.taken() == 0
    assert torch.equal(before, after)


def test_an_edited_image_encodes_only_that_image(pictures, encoder):
    samples = [sample_of(picture) for picture in pictures]
    build_store(samples, settings_of(), encoder)
    encoder.taken()
    save_picture(pictures[2], 77)
    os.utime(pictures[2], ns=(5, 5))
    store = build_store(samples, settings_of(), encoder)
    assert encoder.taken() == 1
    assert (to_array(store.get(2, flip=False)[1]) == read_mask_weights(samples[2])).all()


@pytest.mark.parametrize(
    "change",
    [
        {"transform": replace(CUT, crop=(0, 0))},
        {"transform": replace(CUT, resized=(96, 80))},
        {"transform": replace(CUT, interpolation="nearest")},
        {"transform": replace(CUT, target=(72, 64), crop=(2, 0))},
    ],
)
def test_another_cut_encodes_again(pictures, encoder, change):
    build_store([sample_of(pictures[0])], settings_of(), encoder)
    encoder.taken()
    changed = sample_of(pictures[0], **change)
    store = build_store([changed], settings_of(), encoder)
    assert encoder.taken() == 1
    width, height = changed.transform.target
    assert store.get(0, flip=False)[0].shape == (4, height // 8, width // 8)


@pytest.mark.parametrize("change", [{"vae": "another"}, {"dtype": torch.float32}, {"family": "sdxl"}])
def test_another_vae_encodes_again(pictures, encoder, change):
    samples = [sample_of(picture) for picture in pictures]
    build_store(samples, settings_of(), encoder)
    encoder.taken()
    build_store(samples, settings_of(**change), encoder)
    assert encoder.taken() == 3


def test_flip_aug_switched_on_encodes_again(pictures, encoder):
    build_store([sample_of(pictures[0])], settings_of(), encoder)
    encoder.taken()
    flipping = sample_of(pictures[0], subset=SubsetConfig(pictures[0].parent, flip_aug=True))
    build_store([flipping], settings_of(), encoder)
    assert encoder.taken() == 2
    build_store([sample_of(pictures[0])], settings_of(), encoder)
    assert encoder.taken() == 0


def test_a_damaged_entry_is_made_again_with_a_warning(pictures, encoder, caplog):
    samples = [sample_of(picture) for picture in pictures]
    first = latents_of(build_store(samples, settings_of(), encoder), 3)
    encoder.taken()
    damaged = pictures[1].parent / entries_of(pictures[1].parent)[1]
    damaged.write_bytes(damaged.read_bytes()[:200])
    caplog.set_level(logging.WARNING)
    again = latents_of(build_store(samples, settings_of(), encoder), 3)
    assert encoder.taken() == 1
    assert torch.equal(first, again)
    assert caplog.messages == [f"{damaged}: the cache entry is damaged and is made again"]


def test_a_copied_dataset_with_its_cache_is_fresh_and_noted(pictures, masks, encoder, tmp_path):
    build_store(with_files(pictures, masks), settings_of(), encoder)
    encoder.taken()
    for folder in ("img", "masks"):
        shutil.copytree(tmp_path / folder, tmp_path / "copy" / folder, copy_function=shutil.copyfile)
    copied = with_files(
        *([tmp_path / "copy" / path.parent.name / path.name for path in paths] for paths in (pictures, masks))
    )
    store = build_store(copied, settings_of(), encoder)
    assert encoder.taken() == 0
    assert (to_array(store.get(0, flip=False)[1]) == read_mask_weights(copied[0])).all()
    for path in (*pictures, *masks):
        path.unlink()
    for sample in copied:  # other pictures under the times that were noted: nobody looks inside
        status = sample.path.stat()
        sample.path.write_bytes(bytes(status.st_size))
        os.utime(sample.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    build_store(copied, settings_of(), encoder)
    assert encoder.taken() == 0


def test_a_cache_made_again_is_the_same(pictures, encoder):
    samples = [sample_of(picture) for picture in pictures]
    first = latents_of(build_store(samples, settings_of(), encoder), 3)
    for path in pictures[0].parent.glob("*.safetensors"):
        path.unlink()
    again = latents_of(build_store(samples, settings_of(batch_size=3), encoder), 3)
    assert torch.equal(first, again)


def test_images_that_differ_in_their_extension_do_not_share_an_entry(tmp_path, encoder):
    paths = [save_picture(tmp_path / name, seed) for seed, name in enumerate(("a.png", "a.webp"))]
    build_store([sample_of(path) for path in paths], settings_of(), encoder)
    assert entries_of(tmp_path) == ["a.png_64x64_sd.safetensors", "a.webp_64x64_sd.safetensors"]


def test_one_image_with_two_masks_has_two_entries(pictures, masks, encoder):
    samples = [sample_of(pictures[0]), sample_of(pictures[0], MaskSource("file", masks[0])), sample_of(pictures[0])]
    store = build_store(samples, settings_of(), encoder)
    assert entries_of(pictures[0].parent) == ["a.png_64x64_sd.safetensors", "a.png_64x64_sd~1.safetensors"]
    for index, sample in enumerate(samples):
        assert (to_array(store.get(index, flip=False)[1]) == read_mask_weights(sample)).all()
    encoder.taken()
    build_store(samples, settings_of(), encoder)
    assert encoder.taken() == 0


def test_a_cache_folder_leaves_the_images_folder_alone(pictures, encoder, tmp_path):
    other = save_picture(tmp_path / "other" / "img" / "a.png", 50)
    samples = [sample_of(path) for path in (*pictures, other)]
    build_store(samples, settings_of(cache_dir=tmp_path / "cache"), encoder)
    assert entries_of(tmp_path / "img") == entries_of(tmp_path / "other") == []
    assert len(entries_of(tmp_path / "cache")) == 4
    encoder.taken()
    build_store(samples, settings_of(cache_dir=tmp_path / "cache"), encoder)
    assert encoder.taken() == 0


def test_several_processes_share_the_work(pictures, encoder):
    samples = [sample_of(picture) for picture in pictures]
    waited = []
    for index in (0, 1):
        settings = settings_of(process_index=index, num_processes=2)
        build_store(samples, settings, encoder, wait=lambda: waited.append(encoder.num_encoded))
    assert waited == [2, 3]  # after each process's part
    assert len(entries_of(pictures[0].parent)) == 3


def test_each_process_looks_at_its_own_entries_and_tells_of_all(pictures, encoder, caplog):
    caplog.set_level(logging.INFO)
    samples = [sample_of(picture) for picture in pictures]
    build_store(samples, settings_of(), encoder)
    save_picture(pictures[1], 70)
    told = []

    def total(counts):
        told.append(counts)
        return [10 * count for count in counts]

    encoder.taken()
    build_store(samples, settings_of(process_index=0, num_processes=2), encoder, total=total)
    assert encoder.taken() == 0, "the changed picture is the other process's"
    assert told == [[2, 0, 0]]
    assert caplog.messages[-1] == "latents: 20 entries up to date, 0 masks changed, 0 encoded"


def test_an_unchecked_cache_is_not_opened(pictures, encoder, caplog):
    caplog.set_level(logging.INFO)
    samples = [sample_of(picture) for picture in pictures]
    build_store(samples, settings_of(), encoder)
    encoder.taken()
    save_picture(pictures[0], 70)
    (pictures[1].parent / entries_of(pictures[1].parent)[1]).unlink()
    build_store(samples, settings_of(skip_check=True), encoder)
    assert encoder.taken() == 1, "only the entry that is not there"
    assert caplog.messages[-1] == "latents: 2 entries taken unchecked, 0 masks changed, 1 encoded"


def test_an_unchecked_cache_without_the_wanted_mask_is_refused_when_it_is_read(pictures, encoder):
    build_store([sample_of(pictures[0], MaskSource("none"))], settings_of(), encoder)
    store = build_store([sample_of(pictures[0])], settings_of(skip_check=True), encoder)
    with pytest.raises(DataError, match="--skip_cache_check"):
        store.get(0, flip=False)


def test_an_image_without_alpha_in_an_alpha_subset_has_no_mask(tmp_path, encoder):
    path = save_picture(tmp_path / "a.png", channels=3)
    store = build_store([sample_of(path)], settings_of(), encoder)
    assert store.get(0, flip=False)[1] is None


def test_exif_orientation_turns_what_is_cached(tmp_path, encoder):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.ascontiguousarray(pixels[::-1, ::-1])).save(tmp_path / "b.png", exif=exif)
    store = build_store([sample_of(tmp_path / name) for name in ("a.png", "b.png")], settings_of(), encoder)
    torch.testing.assert_close(store.get(0, flip=False)[0], store.get(1, flip=False)[0], rtol=0, atol=0.02)


def test_nan_latents_are_never_cached(pictures):
    def broken(images, seeds):
        return torch.full((len(seeds), 4, 8, 8), float("nan"))

    with pytest.raises(DataError, match=r"a\.png.*--no_half_vae"):
        build_store([sample_of(pictures[0])], settings_of(), broken)
    assert entries_of(pictures[0].parent) == []


@pytest.mark.parametrize("name", ["color_aug", "random_crop"])
def test_augmentation_that_changes_pixels_is_refused_with_caching(tmp_path, name):
    config = DatasetConfig((64, 64), (SubsetConfig(tmp_path), SubsetConfig(tmp_path / "b", **{name: True})))
    with pytest.raises(OptionError, match=f"--cache_latents: {name} is on for .*b,"):
        refuse_uncacheable([config])


def test_flips_are_welcome_with_caching(tmp_path):
    refuse_uncacheable([DatasetConfig((64, 64), (SubsetConfig(tmp_path, flip_aug=True),))])


@pytest.mark.parametrize("to_disk", [True, False])
def test_the_share_of_each_masked_image_is_told_once_from_files_and_from_the_cache(pictures, encoder, to_disk):
    samples = [sample_of(pictures[0]), sample_of(pictures[0]), sample_of(pictures[1])]
    samples.append(sample_of(pictures[2], MaskSource("none")))
    expected = [read_mask_weights(samples[index]).mean() for index in (0, 2)]
    assert [each.share for each in mask_shares.decoded(samples)] == pytest.approx(expected, abs=1e-6)
    store = build_store(samples, settings_of(to_disk=to_disk), encoder)
    assert [each.share for each in mask_shares.stored(samples, store)] == pytest.approx(expected, abs=1e-6)


def test_without_masks_there_are_no_shares(pictures, encoder):
    samples = [sample_of(pictures[0], MaskSource("none"))]
    assert mask_shares.decoded(samples) == []
    assert mask_shares.stored(samples, build_store(samples, settings_of(), encoder)) == []


def read_only(monkeypatch):
    """Let the system refuse new files, as on a drive that is mounted read-only."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def test_a_place_where_missing_entries_cannot_be_written_is_found_early(pictures, monkeypatch):
    read_only(monkeypatch)
    with pytest.raises(DataError, match=r"img: the latent cache cannot be written there \(Read-only.*--cache_dir"):
        check_cache_folders([sample_of(picture) for picture in pictures], "sd", None)


def test_a_read_only_folder_that_has_all_entries_will_do(pictures, encoder, monkeypatch):
    samples = [sample_of(picture) for picture in pictures]
    build_store(samples, settings_of(), encoder)
    read_only(monkeypatch)
    check_cache_folders(samples, settings_of().family, None)


def test_looking_whether_a_cache_can_be_written_leaves_nothing(pictures, tmp_path):
    check_cache_folders([sample_of(picture) for picture in pictures], "sd", tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()
