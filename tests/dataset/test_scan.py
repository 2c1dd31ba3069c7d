import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset import files, pairing
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.files import Header, read_header
from library.dataset.images import ORIENTATION, read_image
from library.dataset.problems import log_warnings, raise_errors
from library.dataset.scan import Sample, Scan, check_masked_loss, scan
from library.errors import DataError, OptionError
from library.masks import MaskSource


def save(path: Path, size=(96, 64), mode="RGB", orientation=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    Image.new(mode, size).save(path, **options)
    return path


def scan_of(*subsets: SubsetConfig, **dataset) -> Scan:
    return scan([DatasetConfig((64, 64), subsets, **dataset)])


@pytest.fixture
def images(tmp_path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def masks(tmp_path) -> Path:
    return tmp_path / "masks"


def with_class(folder: Path, **options) -> SubsetConfig:
    return SubsetConfig(folder, class_tokens="cat", **options)


def names(samples) -> list[str]:
    return [sample.path.name for sample in samples]


def messages(found: Scan, severity: str) -> list[str]:
    return [problem.message for problem in found.problems if problem.severity == severity]


# Files and headers


def test_images_of_all_known_formats_are_found_sorted_by_name(images):
    for name in ("b.png", "a.JPG", "d.webp", "c.jpeg", "e.BMP"):
        save(images / name)
    save(images / "within" / "g.png")
    (images / "notes.txt").touch()
    (images / "folder.png").mkdir()
    assert [path.name for path in files.list_images(images)] == [
        "a.JPG",
        "b.png",
        "c.jpeg",
        "d.webp",
        "e.BMP",
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_the_size_in_a_header_is_that_of_the_picture_as_seen(images, name, orientation):
    path = save(images / name, (96, 64), orientation=orientation)
    header = read_header(path)
    assert header.orientation == orientation
    assert header.size == ((64, 96) if orientation > 4 else (96, 64))
    assert header.size == read_image(path, want_alpha=False).rgb.shape[1::-1]


def test_exif_behind_the_pixels_of_a_png_is_found(images):
    data = save(images / "a.png", orientation=6).read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    (images / "b.png").write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    assert read_header(images / "b.png") == Header((64, 96), 6, False)


@pytest.mark.parametrize(
    ("mode", "has_alpha"), [("RGBA", True), ("LA", True), ("RGB", False), ("L", False), ("P", False), ("1", False)]
)
def test_a_header_says_whether_there_is_alpha(images, mode, has_alpha):
    path = save(images / "a.png", mode=mode)
    assert read_header(path).has_alpha is has_alpha
    assert (read_image(path, want_alpha=True).alpha is not None) is has_alpha


def test_a_palette_with_a_transparent_colour_has_alpha(images):
    images.mkdir()
    Image.new("P", (8, 8)).save(images / "a.png", transparency=0)
    assert read_header(images / "a.png").has_alpha


def test_headers_alone_are_read(images):
    for name in ("a.png", "b.jpg"):
        data = bytearray(save(images / name, (512, 512)).read_bytes())
        middle = data.index(b"IDAT") + 4 if name == "a.png" else len(data) // 2
        data[middle : middle + 20] = bytes(20)
        (images / name).write_bytes(data)
    found = scan_of(with_class(images))
    assert names(found.samples) == ["a.png", "b.jpg"]
    assert not found.problems


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_file_that_is_cut_short_is_an_error(images, name):
    data = save(images / name, (512, 512)).read_bytes()
    (images / name).write_bytes(data[: len(data) // 2])
    found = scan_of(with_class(images))
    assert not found.samples
    (message,) = messages(found, "error")
    assert f"{name}: cannot be read as an image" in message


def test_floating_point_pixels_are_an_error_of_the_headers(images):
    save(images / "a.tif", mode="F").rename(images / "a.png")
    found = scan_of(with_class(images))
    assert messages(found, "error") == [
        f"{images / 'a.png'}: has floating-point pixels. Save it with 8 or 16 bits a channel."
    ]


def test_bytes_behind_the_end_of_a_jpeg_are_no_harm(images):
    path = save(images / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(100_000))
    assert read_header(path).size == (96, 64)


def test_what_macos_puts_beside_files_is_no_image(images):
    save(images / "a.png")
    (images / "._a.png").write_bytes(b"\0\5\x16\7Mac OS X")
    assert files.list_images(images) == [images / "a.png"]


def test_a_file_that_is_no_image_is_an_error_that_names_it(images):
    save(images / "a.png")
    (images / "b.png").write_bytes(b"hello")
    found = scan_of(with_class(images))
    assert names(found.samples) == ["a.png"]
    (message,) = messages(found, "error")
    assert "b.png: cannot be read as an image (not an image)" in message


def test_a_folder_that_is_not_there_or_has_no_images_is_an_error(images, tmp_path):
    images.mkdir()
    found = scan_of(with_class(images), with_class(tmp_path / "absent"))
    assert ["has no images" in m or "no such folder" in m for m in messages(found, "error")] == [True, True]


# --cache_info


def test_cached_headers_are_used_while_a_file_is_unchanged(images):
    path = save(images / "a.png")
    subset = with_class(images, cache_info=True)
    before = scan_of(subset)
    changed = path.stat()
    path.write_bytes(b"x" * changed.st_size)  # would be unreadable
    os.utime(path, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    assert scan_of(subset) == before


def test_cached_headers_of_a_changed_file_are_read_again(images):
    save(images / "a.png")
    subset = with_class(images, cache_info=True)
    scan_of(subset)
    save(images / "a.png", (64, 128))
    (sample,) = scan_of(subset).samples
    assert sample.transform.source == (64, 128)


def test_the_cache_can_be_read_by_sd_scripts(images):
    path = save(images / "a.png")
    scan_of(with_class(images, cache_info=True))
    entry = json.loads((images / "metadata_cache.json").read_text(encoding="utf-8"))[str(path)]
    assert (entry["caption"], entry["resolution"]) == ("cat", [96, 64])


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"a.png": {"fingerprint": null}}', '{"a.png": {"resolution": [1, 1]}}']
)
def test_a_cache_that_is_damaged_or_not_ours_is_made_anew(images, content):
    save(images / "a.png")
    (images / "metadata_cache.json").write_text(content, encoding="utf-8")
    assert scan_of(with_class(images, cache_info=True)) == scan_of(with_class(images, cache_info=True))
    assert "fingerprint" in (images / "metadata_cache.json").read_text(encoding="utf-8")


# Captions


def test_a_missing_caption_is_the_class_words(images):
    save(images / "a.png")
    found = scan_of(with_class(images))
    assert found.samples[0].captions == ("cat",)
    assert not found.problems


def test_missing_captions_without_class_words_are_one_warning_with_their_number(images):
    for name in ("a.png", "b.png", "c.png"):
        save(images / name)
    (images / "b.caption").write_text("b", encoding="utf-8")
    found = scan_of(SubsetConfig(images))
    assert [sample.captions for sample in found.samples] == [("",), ("b",), ("",)]
    (message,) = messages(found, "warning")
    assert "2 of 3 images have no .caption file" in message
    assert message.endswith("a.png, c.png.")


def test_an_empty_caption_file_is_found_before_training(images):
    save(images / "a.png")
    (images / "a.caption").touch()
    with pytest.raises(DataError, match=r"a\.caption: is empty"):
        raise_errors(scan_of(with_class(images)).problems)


# Masks


def test_a_mask_is_the_file_of_the_same_stem(images, masks):
    for name in ("a.png", "b.v2.jpg"):
        save(images / name)
    expected = [save(masks / "a.webp"), save(masks / "b.v2.png")]
    found = scan_of(with_class(images, conditioning_data_dir=masks))
    assert [sample.mask for sample in found.samples] == [MaskSource("file", path) for path in expected]
    assert not found.problems


def test_a_mask_file_beats_alpha_and_alpha_beats_nothing(images, masks):
    save(images / "a.png", mode="RGBA")
    save(images / "b.png", mode="RGBA")
    save(images / "c.png")
    mask = save(masks / "a.png")
    subset = with_class(images, conditioning_data_dir=masks, alpha_mask=True, missing_mask="train_all")
    assert [sample.mask for sample in scan_of(subset).samples] == [
        MaskSource("file", mask),
        MaskSource("alpha"),
        MaskSource("none"),
    ]


def test_alpha_is_no_mask_unless_it_is_asked_for(images):
    save(images / "a.png", mode="RGBA")
    assert scan_of(with_class(images)).samples[0].mask == MaskSource("none")
    assert scan_of(with_class(images, alpha_mask=True)).samples[0].mask == MaskSource("alpha")


@pytest.fixture
def two_of_three_lack_masks(images, masks) -> SubsetConfig:
    for name in ("cat.png", "dog.png", "eel.png"):
        save(images / name)
    for name in ("cat_mask.png", "dog.png", "EEL.png"):
        save(masks / name)
    return with_class(images, conditioning_data_dir=masks)


def test_missing_masks_are_one_error_that_lists_names_and_near_misses(two_of_three_lack_masks):
    found = scan_of(two_of_three_lack_masks)
    assert len(messages(found, "error")) == 2
    with pytest.raises(DataError, match=r"2 images of .* have no mask in ") as error:
        raise_errors(found.problems)
    assert "cat.png (is cat_mask.png meant?), eel.png (is EEL.png meant?). Name a mask like its image" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_images_without_a_mask_can_be_learnt_whole(two_of_three_lack_masks):
    found = scan_of(replace(two_of_three_lack_masks, missing_mask="train_all"))
    assert [sample.mask.kind for sample in found.samples] == ["none", "file", "none"]
    assert not messages(found, "error")


def test_images_without_a_mask_can_be_left_out(two_of_three_lack_masks, caplog):
    found = scan_of(replace(two_of_three_lack_masks, missing_mask="skip"))
    assert names(found.samples) == ["dog.png"]
    raise_errors(found.problems)
    log_warnings(found.problems)
    assert "2 images of" in caplog.text
    assert "are left out" in caplog.text


def test_surplus_masks_are_one_warning(two_of_three_lack_masks, caplog):
    found = scan_of(replace(two_of_three_lack_masks, missing_mask="train_all"))
    assert {problem.path.name for problem in found.problems} == {"cat_mask.png", "EEL.png"}
    log_warnings(found.problems)
    (record,) = caplog.records
    assert "2 masks in" in record.message
    assert "EEL.png, cat_mask.png" in record.message


def test_one_mask_folder_may_serve_several_subsets_without_surplus(tmp_path, masks):
    for name in ("a", "b"):
        save(tmp_path / name / f"{name}.png")
        save(masks / f"{name}.png")
    subsets = [with_class(tmp_path / name, conditioning_data_dir=masks) for name in ("a", "b")]
    assert not scan_of(*subsets).problems


def test_the_second_mask_of_a_name_is_warned_about(images, masks):
    save(images / "a.png")
    first, second = save(masks / "a.jpg"), save(masks / "a.png")
    found = scan_of(with_class(images, conditioning_data_dir=masks))
    assert found.samples[0].mask.path == first
    (problem,) = found.problems
    assert (problem.severity, problem.path) == ("warning", second)


def test_regularisation_images_need_no_mask_but_use_one(tmp_path, images, masks):
    save(images / "a.png")
    for name in ("r.png", "s.png"):
        save(tmp_path / "reg" / name)
    for name in ("a.png", "r.png"):
        save(masks / name)
    reg = with_class(tmp_path / "reg", conditioning_data_dir=masks, is_reg=True)
    found = scan_of(with_class(images, conditioning_data_dir=masks, num_repeats=2), reg)
    assert {sample.path.name: sample.mask.kind for sample in found.samples} == {
        "a.png": "file",
        "r.png": "file",
        "s.png": "none",
    }
    assert not found.problems


def test_a_mask_of_another_shape_is_an_error_of_the_headers(images, masks):
    save(images / "a.png", (96, 64))
    mask = save(masks / "a.png", (64, 64))
    found = scan_of(with_class(images, conditioning_data_dir=masks))
    (problem,) = found.problems
    assert problem.path == mask
    assert problem.message.endswith("mask is 64x64, its image a.png is 96x64. Make both the same size.")


@pytest.mark.parametrize("size", [(96, 64), (192, 128), (48, 32), (97, 64), (95, 64)])
def test_a_mask_may_be_its_image_rescaled_and_rounded(images, masks, size):
    save(images / "a.png", (96, 64))
    save(masks / "a.png", size)
    assert not scan_of(with_class(images, conditioning_data_dir=masks)).problems


def test_a_mask_of_a_picture_that_lies_on_its_side_gets_a_hint(images, masks):
    save(images / "a.jpg", (96, 64), orientation=6)
    save(masks / "a.png", (96, 64))
    (message,) = messages(scan_of(with_class(images, conditioning_data_dir=masks)), "error")
    assert "mask is 96x64, its image a.jpg is 64x96" in message
    assert "EXIF orientation 6" in message


def test_a_mask_of_the_picture_as_seen_fits(images, masks):
    save(images / "a.jpg", (96, 64), orientation=6)
    save(masks / "a.png", (64, 96))
    assert not scan_of(with_class(images, conditioning_data_dir=masks)).problems


def test_a_mask_folder_that_is_not_there_is_one_error(images, tmp_path):
    for name in ("a.png", "b.png"):
        save(images / name)
    found = scan_of(with_class(images, conditioning_data_dir=tmp_path / "absent"))
    (message,) = messages(found, "error")
    assert message.startswith("conditioning_data_dir: ")


def test_masked_loss_without_any_mask_is_an_error(images):
    save(images / "a.png", mode="RGBA")
    unmasked, masked = (scan_of(with_class(images, alpha_mask=on)).samples for on in (False, True))
    check_masked_loss(False, unmasked)
    check_masked_loss(True, masked)
    with pytest.raises(OptionError, match="none of the 1 images has a mask"):
        check_masked_loss(True, unmasked)


def test_numbered_names_are_no_near_miss_of_each_other():
    surplus = [Path("img_0002.png"), Path("img_0013.png"), Path("img_0001-mask.png")]
    assert pairing.near_miss(Path("img_0001.png"), surplus) == Path("img_0001-mask.png")
    assert pairing.near_miss(Path("img_0103.png"), [Path("holiday.png")]) is None


# Regularisation balance


def repeats_after_balance(tmp_path, num_train, train_repeats, num_reg, reg_repeats) -> dict[str, int]:
    for number in range(num_train):
        save(tmp_path / "train" / f"t{number}.png")
    for number in range(num_reg):
        save(tmp_path / "reg" / f"r{number}.png")
    subsets = (
        with_class(tmp_path / "reg", num_repeats=reg_repeats, is_reg=True),
        with_class(tmp_path / "train", num_repeats=train_repeats),
    )
    return {sample.path.stem: sample.num_repeats for sample in scan_of(*subsets).samples if sample.is_reg}


@pytest.mark.parametrize(
    ("num_train", "train_repeats", "num_reg", "reg_repeats", "expected"),
    [
        (2, 2, 4, 1, [1, 1, 1, 1]),
        (2, 2, 6, 1, [1, 1, 1, 1]),  # the rest are not used
        (5, 2, 3, 1, [4, 3, 3]),
        (5, 1, 3, 2, [2, 2, 2]),  # the last one passes the number
        (7, 1, 3, 2, [3, 2, 2]),
        (1, 1, 3, 5, [5]),
    ],
)
def test_regularisation_images_are_repeated_until_they_are_as_many(
    tmp_path, num_train, train_repeats, num_reg, reg_repeats, expected
):
    found = repeats_after_balance(tmp_path, num_train, train_repeats, num_reg, reg_repeats)
    assert list(found.values()) == expected
    assert list(found) == [f"r{number}" for number in range(len(expected))]


def test_a_dataset_of_regularisation_images_alone_is_an_error(images):
    save(images / "a.png")
    (message,) = messages(scan_of(with_class(images, is_reg=True)), "error")
    assert "has only regularisation images" in message


# As a whole


def test_a_sample_knows_its_dataset_subset_and_place_in_the_bucket(images):
    path = save(images / "a.png", (128, 64))
    subset = with_class(images, num_repeats=3)
    config = DatasetConfig((64, 64), (subset,))
    found = scan([config, replace(config, resolution=(128, 64))])
    assert [sample.dataset for sample in found.samples] == [0, 1]
    first = found.samples[0]
    assert isinstance(first, Sample)
    assert (first.path, first.subset, first.num_repeats, first.is_reg) == (path, subset, 3, False)
    assert (first.transform.target, first.transform.resized, first.transform.crop) == ((64, 64), (128, 64), (32, 0))


def test_problems_of_a_folder_that_two_datasets_share_are_told_once(images):
    images.mkdir()
    (images / "a.png").write_bytes(b"hello")
    config = DatasetConfig((64, 64), (with_class(images),))
    assert len(scan([config, config]).problems) == 1


def test_the_first_kind_of_error_is_raised_and_the_others_are_counted(images, masks):
    for name in ("a.png", "b.png"):
        save(images / name)
    (images / "c.png").write_bytes(b"hello")
    masks.mkdir()
    with pytest.raises(DataError, match=r"c\.png.*\(1 more: tools/check_dataset\.py lists them\)"):
        raise_errors(scan_of(with_class(images, conditioning_data_dir=masks)).problems)


def test_a_long_list_of_names_is_cut(images, masks):
    for number in range(25):
        save(images / f"{number:02}.png")
    masks.mkdir()
    with pytest.raises(DataError, match=r"25 images .*: 00\.png, .*09\.png and 15 more\."):
        raise_errors(scan_of(with_class(images, conditioning_data_dir=masks)).problems)


def test_a_folder_with_braces_in_its_name_is_told_as_it_is(tmp_path, masks):
    for name in ("a.png", "b.png"):
        save(tmp_path / "{names}" / name)
    masks.mkdir()
    with pytest.raises(DataError, match=r"2 images of .*\{names\} have no mask"):
        raise_errors(scan_of(with_class(tmp_path / "{names}", conditioning_data_dir=masks)).problems)


def test_mixed_pictures_become_samples_one_to_one(images):
    rng = np.random.default_rng(0)
    for number in range(40):
        save(images / f"{number:02}.{['png', 'jpg', 'webp'][number % 3]}", tuple(rng.integers(20, 200, 2).tolist()))
    found = scan_of(with_class(images), enable_bucket=True, min_bucket_reso=64, max_bucket_reso=64)
    assert Counter(names(found.samples)) == Counter(path.name for path in images.iterdir())


def test_reading_a_dataset_imports_no_torch():
    code = (
        "import sys, library.dataset.config, library.dataset.scan, library.dataset.captions, library.dataset.plan; "
        "sys.exit('torch' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}).returncode == 0


def test_images_that_are_their_own_masks_are_a_warning(images):
    save(images / "a.png")
    found = scan_of(with_class(images, conditioning_data_dir=images / ".." / "images"))
    assert found.samples[0].mask.kind == "file"
    (message,) = messages(found, "warning")
    assert "is the folder of the images: each is used as its own mask" in message
