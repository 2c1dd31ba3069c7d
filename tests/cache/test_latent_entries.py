import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from library.cache import latents as entries
from library.cache.entries import dtype_name, remove_abandoned
from library.cache.latents import (
    CachedLatents,
    Fingerprint,
    State,
    Wanted,
    entry_path,
    judge,
    read,
    read_latents,
    read_mask,
)
from library.errors import DataError
from library.masks import MaskSource

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def cached_of(dtype=torch.float16, side=16, *, flipped=False, mask=True):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, side, side, generator=generator).to(dtype)
    sums = np.random.default_rng(0).integers(0, 16321, (side, side)).astype(np.uint16)
    return CachedLatents(first, second if flipped else None, sums if mask else None)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(b"what a picture holds")
    return path


@pytest.fixture
def mask_file(tmp_path):
    path = tmp_path / "masks" / "cat.png"
    path.parent.mkdir()
    path.write_bytes(b"what a mask holds")
    return path


def wanted_of(image, mask_file=None, **changes):
    mask = MaskSource("none") if mask_file is None else MaskSource("file", mask_file)
    return replace(Wanted(image, mask, "64x64", "vae", torch.float16, needs_flipped=False), **changes)


def write(path, wanted, cached=None):
    mask = None if wanted.mask.path is None else entries.read_stamped(wanted.mask.path)[1]
    made_of = Fingerprint(
        image=entries.read_stamped(wanted.image)[1],
        transform=wanted.transform,
        vae=wanted.vae,
        dtype=dtype_name(wanted.dtype),
        mask_kind=wanted.mask.kind,
        mask=mask,
    )
    entries.write(path, cached or cached_of(mask=mask is not None), made_of)


@pytest.fixture
def entry(image, mask_file):
    path = entry_path(image, (128, 128), "sd", None)
    write(path, wanted_of(image, mask_file))
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, image, dtype):
    cached = cached_of(dtype, flipped=True)
    write(tmp_path / "e.safetensors", wanted_of(image, image, dtype=dtype), cached)
    latents, mask = read(tmp_path / "e.safetensors", flip=False, mask_kind="file")
    mirrored, _ = read(tmp_path / "e.safetensors", flip=True, mask_kind="file")
    assert np.array_equal(read_mask(tmp_path / "e.safetensors", "file"), mask)
    assert latents.dtype == dtype
    assert torch.equal(latents, cached.latents)
    assert torch.equal(mirrored, cached.flipped)
    assert mask.dtype == np.uint16
    assert (mask == cached.mask).all()
    both = read_latents(tmp_path / "e.safetensors")
    assert torch.equal(both.latents, cached.latents)
    assert torch.equal(both.flipped, cached.flipped)


def test_an_entry_is_a_safetensors_file_that_others_can_read(entry):
    with safe_open(entry, "pt") as file:
        assert sorted(file.keys()) == ["latents", "mask"]
        assert file.get_tensor("latents").shape == (4, 16, 16)
        assert file.get_tensor("mask").dtype == torch.uint16
        assert json.loads(file.metadata()["fingerprint"])["vae"] == "vae"


def test_an_entry_of_1024_pixels_is_small(tmp_path, image):
    path = tmp_path / "e.safetensors"
    write(path, wanted_of(image, image), cached_of(side=128))
    assert path.stat().st_size < 170_000


def test_names_keep_extension_size_and_family_apart():
    names = {
        entry_path(Path("a") / image, size, family, None, variant).name
        for image in ("cat.png", "cat.webp")
        for size in ((64, 128), (128, 64))
        for family in ("sd", "sdxl")
        for variant in (0, 1)
    }
    assert len(names) == 16
    assert "cat.png_64x128_sd.safetensors" in names
    assert "cat.png_64x128_sd~1.safetensors" in names


@pytest.mark.parametrize("letter", ["n", "\u732b"])
def test_pictures_with_the_longest_names_have_entries_of_their_own(tmp_path, letter):
    stem = letter * (250 // len(letter.encode()))
    images = [tmp_path / f"{stem}{number}.png" for number in (1, 2)]
    for cache_dir in (None, tmp_path / "cache"):
        paths = [entry_path(image, (1024, 1024), "sdxl", cache_dir) for image in images]
        assert len(set(paths)) == 2
        for image, path in zip(images, paths, strict=True):
            image.touch()
            write(path, wanted_of(image))
            assert judge(path, wanted_of(image)).state is State.FRESH


def test_a_cache_folder_keeps_folders_of_the_same_name_apart(tmp_path):
    first = entry_path(tmp_path / "a" / "img" / "cat.png", (64, 64), "sd", tmp_path / "cache")
    second = entry_path(tmp_path / "b" / "img" / "cat.png", (64, 64), "sd", tmp_path / "cache")
    assert first != second
    assert first.parents[1] == second.parents[1] == tmp_path / "cache"
    assert first == entry_path(tmp_path / "a" / "x" / ".." / "img" / "cat.png", (64, 64), "sd", tmp_path / "cache")


def test_an_entry_that_fits_is_fresh(entry, image, mask_file):
    assert judge(entry, wanted_of(image, mask_file)).state is State.FRESH


def test_an_absent_entry_is_missing(tmp_path, image):
    assert judge(tmp_path / "no.safetensors", wanted_of(image)).state is State.MISSING


@pytest.mark.parametrize(
    "change", [{"transform": "64x72"}, {"vae": "another"}, {"dtype": torch.float32}, {"needs_flipped": True}]
)
def test_what_latents_depend_on_makes_them_stale(entry, image, mask_file, change):
    assert judge(entry, wanted_of(image, mask_file, **change)).state is State.STALE


def test_an_entry_with_mirrored_latents_serves_a_run_without(tmp_path, image):
    write(tmp_path / "e.safetensors", wanted_of(image), cached_of(flipped=True, mask=False))
    for needs_flipped in (True, False):
        verdict = judge(tmp_path / "e.safetensors", wanted_of(image, needs_flipped=needs_flipped))
        assert verdict.state is State.FRESH


@pytest.mark.parametrize("content", [b"something else", b"what a picture HOLDS"])
def test_an_edited_image_makes_latents_stale(entry, image, mask_file, content):
    image.write_bytes(content)
    os.utime(image, ns=(1, 1))
    assert judge(entry, wanted_of(image, mask_file)).state is State.STALE


@pytest.mark.parametrize("content", [b"something else", b"what a mask HOLDS"])
def test_an_edited_mask_makes_only_the_mask_stale(entry, image, mask_file, content):
    mask_file.write_bytes(content)
    os.utime(mask_file, ns=(1, 1))
    assert judge(entry, wanted_of(image, mask_file)).state is State.MASK_STALE


@pytest.mark.parametrize("mask", [MaskSource("none"), MaskSource("alpha")])
def test_another_kind_of_mask_makes_only_the_mask_stale(entry, image, mask):
    assert judge(entry, wanted_of(image, mask=mask)).state is State.MASK_STALE


def test_another_mask_of_the_same_time_and_size_is_noticed(entry, image, mask_file, tmp_path):
    other = tmp_path / "others" / "cat.png"
    other.parent.mkdir()
    other.write_bytes(b"what a mask HOLDS")
    status = mask_file.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert judge(entry, wanted_of(image, other)).state is State.MASK_STALE


def test_copied_files_are_fresh_by_their_contents(entry, image, mask_file):
    os.utime(image, ns=(1, 1))
    os.utime(mask_file, ns=(2, 2))
    verdict = judge(entry, wanted_of(image, mask_file))
    assert verdict.state is State.FRESH
    assert verdict.is_restamped
    assert verdict.fingerprint.image.mtime_ns == 1
    assert verdict.fingerprint.mask.mtime_ns == 2


def test_unchanged_files_are_not_opened(entry, image, mask_file):
    status = image.stat()
    image.write_bytes(b"WHAT A PICTURE HOLDS")  # of the same size, given the same time again
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert judge(entry, wanted_of(image, mask_file)).state is State.FRESH


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_an_entry_cut_short_is_damaged(entry, image, mask_file, keep):
    entry.write_bytes(entry.read_bytes()[:keep])
    assert judge(entry, wanted_of(image, mask_file)).state is State.DAMAGED


@pytest.mark.parametrize(
    "header", [b"[]", b"{}", b"{not json", b'{"latents": 3}', b'{"__metadata__": {}, "latents": {"dtype": "F16"}}']
)
def test_a_foreign_file_is_a_damaged_entry(entry, image, mask_file, header):
    entry.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert judge(entry, wanted_of(image, mask_file)).state is State.DAMAGED


def test_reading_a_damaged_entry_names_it(entry):
    entry.write_bytes(entry.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"cat\.png_128x128_sd\.safetensors: the cache entry cannot be used"):
        read(entry, flip=False, mask_kind="file")


def test_an_entry_without_the_wanted_mask_is_refused(tmp_path, image):
    write(tmp_path / "e.safetensors", wanted_of(image))
    with pytest.raises(DataError, match=r"its mask is from 'none', wanted is 'alpha'.*skip_cache_check"):
        read(tmp_path / "e.safetensors", flip=False, mask_kind="alpha")


def test_a_mask_that_is_not_wanted_is_not_read(entry):
    assert read(entry, flip=False, mask_kind="none")[1] is None


def test_a_write_that_fails_leaves_the_old_entry_and_nothing_else(entry, image, mask_file, monkeypatch):
    before, names = entry.read_bytes(), sorted(entry.parent.iterdir())

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(DataError, match=r"No space left on device.*--cache_dir"):
        write(entry, wanted_of(image, mask_file))
    assert entry.read_bytes() == before
    assert sorted(entry.parent.iterdir()) == names


def test_what_a_killed_run_left_is_no_entry_and_is_removed_later(entry, image, mask_file):
    left = entry.with_name(f".{entry.stem}.4711.part{entry.suffix}")
    left.write_bytes(b"half")
    remove_abandoned(entry.parent)
    assert left.exists(), "another run may be writing it"
    assert judge(entry, wanted_of(image, mask_file)).state is State.FRESH
    os.utime(left, (time.time() - 7200, time.time() - 7200))
    remove_abandoned(entry.parent)
    assert not left.exists()
    assert entry.exists()
