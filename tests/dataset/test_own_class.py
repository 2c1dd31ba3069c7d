"""A data set of the user's own class: what it gives, what is drawn in it, and what is said of mistakes."""

import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset import config, images, mask_shares, own_class, summary
from library.dataset.loader import DrawnImages, LoaderSettings
from library.dataset.plan import Draw
from library.errors import DataError, OptionError
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.masks import MaskOptions

NAME = "my_pictures.Pictures"
Install = Callable[..., None]


def picture(width: int = 64, height: int = 64, red: int = 0) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = red
    return pixels


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make my_pictures.Pictures a class that gives what a function of the index returns."""

    def make(give: Callable[[int], Any], length: int = 3, **methods: Any) -> None:
        def remember(self: Any, *arguments: Any) -> None:
            self.arguments = arguments

        own = {"__init__": remember, "__len__": lambda _: length, "__getitem__": lambda _, index: give(index)}
        module: Any = ModuleType("my_pictures")
        module.Pictures = type("Pictures", (), {**own, "__module__": "my_pictures", **methods})
        monkeypatch.setitem(sys.modules, "my_pictures", module)

    return make


def scan(**options: Any) -> own_class.scan.Scan:
    captions, masks = options.pop("captions", CaptionOptions()), options.pop("masks", MaskOptions())
    dataset = DatasetOptions(**{"dataset_class": NAME, "resolution": "64", "train_batch_size": 2, **options})
    configs = config.load(dataset, captions, masks)
    return own_class.scan_any(configs, dataset, None)


def batch(found: own_class.scan.Scan, *indices: int, epoch: int = 1, seed: int = 7) -> Any:
    loaded = DrawnImages(found.samples, LoaderSettings(seed, 10))[tuple(Draw(i, 0, epoch, 0) for i in indices)]
    if not hasattr(loaded, "images"):
        raise loaded.error
    return loaded


def test_the_class_is_made_with_the_arguments_of_sd_scripts(install: Install) -> None:
    install(lambda index: {"image": picture(), "caption": ""})
    found = scan(resolution="64,128", debug_dataset=True)
    assert found.samples[0].give.func.__self__.made.arguments == (None, None, (64, 128), True)


def test_a_batch_has_the_pictures_captions_masks_and_weights(install: Install) -> None:
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    masks = {0: half, 1: None, 2: half}
    install(lambda i: {"image": picture(red=i), "caption": f"p{i}", "mask": masks[i], "weight": 1.0 + i})
    loaded = batch(scan(), 2, 1)
    assert loaded.captions == ("p2", "p1")
    assert loaded.names == (str(Path(NAME) / "2"), str(Path(NAME) / "1"))
    assert ((loaded.images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [2, 1]
    assert loaded.masks[0].mean() == 0.5
    assert loaded.masks[0, 0, :, :4].min() == 1
    assert loaded.masks[1].min() == 1
    assert loaded.weights.tolist() == [3, 2]


def test_masks_are_cut_and_mirrored_with_their_pictures(install: Install) -> None:
    """A picture whose mask is its own red channel, twice as wide as the bucket."""
    pixels = picture(128, 64)
    pixels[:, 70:, 0] = 255
    install(lambda _: {"image": pixels, "caption": "", "mask": pixels[..., 0]}, length=1)
    found = scan(flip_aug=True)
    for epoch in range(1, 6):
        loaded = batch(found, 0, epoch=epoch)
        cells = torch.nn.functional.avg_pool2d((loaded.images[:, :1] + 1) / 2, 8)
        torch.testing.assert_close(loaded.masks, cells, rtol=0, atol=0.01)


def test_a_cut_follows_the_mask_of_each_picture(install: Install) -> None:
    def give(index: int) -> dict[str, Any]:
        mask = np.zeros((64, 192), np.uint8)
        mask[20:40, 150 if index else 5 : 190 if index else 25] = 255
        return {"image": np.dstack([mask] * 3), "caption": "", "mask": mask}

    install(give)
    aware = MaskOptions(mask_aware_crop=True)
    assert batch(scan(), 0, 1).masks.sum() == 0
    for found in (scan(masks=aware), with_sizes(install, give, aware)):
        loaded = batch(found, 0, 1)
        assert loaded.masks.sum(dim=(1, 2, 3)).tolist() == [20 * 20 / 64, 20 * 40 / 64]
        assert (loaded.crop_top_lefts[:, 1] == torch.tensor([5, 126])).all()


def with_sizes(install: Install, give: Callable[[int], Any], masks: MaskOptions) -> own_class.scan.Scan:
    install(give, size=lambda *_: (192, 64))
    buckets = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 64}
    return scan(masks=masks, **buckets)


def test_a_mask_aware_crop_of_a_class_without_masks_is_warned_about(install: Install) -> None:
    install(lambda index: {"image": picture(), "caption": ""})
    (problem,) = scan(masks=MaskOptions(mask_aware_crop=True)).problems
    assert "mask_aware_crop has no effect" in problem.message


def test_pictures_of_a_class_are_placed_too(install: Install) -> None:
    install(
        lambda index: {
            "image": picture(red=200),
            "caption": "",
            "mask": None if index else np.full((64, 64), 255, np.uint8),
        }
    )
    found = scan(masks=MaskOptions(random_placement=True, placement_scale="0.5,0.5"))
    loaded = batch(found, 0, 1)
    assert loaded.masks.mean(dim=(1, 2, 3)).tolist() == [0.25, 0.25]
    assert not torch.equal(loaded.masks, batch(found, 0, 1, epoch=2).masks)


def test_pil_images_are_taken_too(install: Install) -> None:
    grey = Image.new("L", (64, 64), 51)
    install(lambda _: {"image": Image.new("RGBA", (64, 64), (255, 0, 0, 9)), "caption": "", "mask": grey})
    loaded = batch(scan(), 0)
    assert loaded.masks.unique().tolist() == pytest.approx([0.2])
    assert loaded.images[0, :, 0, 0].tolist() == [1, -1, -1]


def test_captions_are_drawn_from_as_those_of_files(install: Install) -> None:
    install(lambda _: {"image": picture(), "caption": "a, b, c\nd"})
    plain = batch(scan(), 0)
    assert plain.captions == ("a, b, c",)
    changed = batch(scan(captions=CaptionOptions(caption_prefix="x,", shuffle_caption=True, keep_tokens=1)), 0)
    assert changed.captions[0].startswith("x, ")
    lines = {batch(scan(captions=CaptionOptions(enable_wildcard=True)), 0, epoch=e).captions[0] for e in range(1, 9)}
    assert lines == {"a, b, c", "d"}


def test_what_the_class_draws_depends_on_seed_epoch_and_index_alone(install: Install) -> None:
    def drawn(_: int) -> dict[str, Any]:
        numbers = (random.random(), float(np.random.random()), float(torch.rand(())))
        return {"image": picture(), "caption": repr(numbers)}

    install(drawn)
    found = scan()
    first = batch(found, 0, 1).captions
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    assert batch(found, 1, 0).captions == first[::-1]
    others = [batch(found, 0, epoch=2).captions[0], batch(found, 0, seed=8).captions[0], first[1]]
    assert len({first[0], *others}) == 4


def test_the_draws_of_the_run_go_on_as_if_the_class_had_drawn_nothing(install: Install) -> None:
    install(lambda _: {"image": picture(), "caption": f"{random.random()}{np.random.random()}{torch.rand(())}"})

    def draws() -> tuple[float, ...]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    wanted = draws()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    batch(scan(), 0, 1)
    assert draws() == wanted


def test_what_its_masks_mask_out_is_filled_and_its_masks_are_shaped(install: Install) -> None:
    """White in the left half but inverted: the right half is learnt, less a column of cells that is eroded away."""
    half, pixels = np.zeros((64, 64), np.uint8), picture(red=40)
    half[:, :32], pixels[:, 40:] = 255, (200, 100, 50)
    install(lambda i: {"image": pixels, "caption": "", "mask": None if i else half})
    loaded = batch(scan(masks=MaskOptions(mask_fill=("mean",), mask_invert=True, mask_erode=8.0)), 0, 1)
    assert (loaded.masks[0, 0].amin(dim=0) == torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])).all()
    seen = ((loaded.images + 1) * 127.5).round()
    assert (seen[0] == torch.tensor([200, 100, 50])[:, None, None]).all(), "all as what is learnt"
    assert seen[1, :, 0, 0].tolist() == [40, 0, 0], "without a mask nothing is filled"


def test_buckets_are_made_of_the_sizes_that_the_class_tells(install: Install) -> None:
    sizes = [(128, 64), (64, 128), (128, 64)]
    give = lambda i: {"image": picture(*sizes[i]), "caption": ""}  # noqa: E731
    install(give, size=lambda _, index: sizes[index])
    options = {"enable_bucket": True, "resolution": "96", "min_bucket_reso": 64, "max_bucket_reso": 128}
    found = scan(**options)
    assert [sample.transform.target for sample in found.samples] == [(128, 64), (64, 128), (128, 64)]
    assert batch(found, 0, 2).images.shape == (2, 3, 64, 128)


def test_samples_can_be_sent_to_loader_processes(install: Install) -> None:
    install(lambda index: {"image": picture(red=index), "caption": "", "mask": None})
    sent = pickle.loads(pickle.dumps(scan().samples[2]))
    assert images.read_training_pixels(sent)[0, 0, 0] == 2


def test_the_summary_counts_its_masks(install: Install) -> None:
    install(lambda _: {"image": picture(), "caption": "", "mask": np.full((64, 64), 51, np.uint8)})
    samples = scan().samples
    assert "3 of 3 images (3 of the class)" in summary.mask_line(samples)
    assert [each.share for each in mask_shares.decoded(samples)] == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"images": [], "input_ids_list": []},
            r"\[0\] is a batch, as sd-scripts wants it\. Let __getitem__ return one",
        ),
        ([1, 2], r"\[0\] is of type list"),
        ({"image": picture()}, r'has no "caption"'),
        ({"image": picture(), "caption": "", "masc": None}, r"Did you mean mask\?"),
        ({"image": picture(), "caption": None}, r'\["caption"\] must be a text, got None'),
        ({"image": picture().astype(float), "caption": ""}, r"must be \(H, W, 3\) uint8 .*, got \(64, 64, 3\) float64"),
        ({"image": picture(), "caption": "", "mask": picture()}, r'\["mask"\] must be \(H, W\) uint8'),
        ({"image": picture(), "caption": "", "mask": picture(32)[..., 0]}, "the mask is 32x64, the image 64x64"),
        ({"image": picture(), "caption": "", "weight": -1}, r'\["weight"\] must be a number of at least 0, got -1'),
    ],
)
def test_an_item_that_is_no_picture_is_refused_at_the_start(item: Any, message: str, install: Install) -> None:
    install(lambda _: item)
    with pytest.raises(DataError, match=message):
        scan()


def test_an_error_in_the_class_names_its_line(install: Install) -> None:
    install(lambda index: {"image": picture(), "caption": ""} if index == 0 else 1 / 0)
    with pytest.raises(
        DataError, match=r"my_pictures\.Pictures\[1\]: ZeroDivisionError: .* \(test_own_class\.py, line"
    ):
        batch(scan(), 1)


def test_a_mask_after_a_first_picture_without_any_is_an_error(install: Install) -> None:
    mask = {"mask": np.zeros((64, 64), np.uint8)}
    install(lambda index: {"image": picture(), "caption": "", **(mask if index else {})})
    with pytest.raises(DataError, match="has a mask, and the first picture has none"):
        batch(scan(), 1)


def test_a_size_that_is_not_the_pictures_is_an_error(install: Install) -> None:
    install(lambda _: {"image": picture(64, 128), "caption": ""}, size=lambda *_: (128, 64))
    options = {"enable_bucket": True, "resolution": "96", "min_bucket_reso": 64, "max_bucket_reso": 128}
    with pytest.raises(DataError, match=r"not as large as the size\(\) of its class says"):
        batch(scan(**options), 0)


def test_buckets_need_sizes(install: Install) -> None:
    install(lambda _: {"image": picture(), "caption": ""})
    with pytest.raises(OptionError, match=r"no method size\(index\)"):
        scan(enable_bucket=True, min_bucket_reso=64, max_bucket_reso=64)


@pytest.mark.parametrize("line", ["import library.train_util", "from library import train_util"])
def test_a_class_written_for_sd_scripts_is_told_what_to_change(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(f"{line}\nclass Mine(train_util.MinimalDataset): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError, match=r"needs a part of sd-scripts .* Leave out its base class\. .*docs/datasets"):
        scan(dataset_class="theirs.Mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pictures", "takes package.module.Class, got Pictures"),
        ("no_such_module.Pictures", "there is no module no_such_module"),
        ("my_pictures.Picture", r"has no class Picture\. Did you mean Pictures\?"),
    ],
)
def test_a_class_that_is_not_there_is_named(name: str, message: str, install: Install) -> None:
    install(lambda _: {})
    with pytest.raises(OptionError, match=message):
        scan(dataset_class=name)


def test_a_class_without_pictures_is_refused(install: Install) -> None:
    install(lambda _: {}, length=0)
    with pytest.raises(OptionError, match="its length is 0"):
        scan()
