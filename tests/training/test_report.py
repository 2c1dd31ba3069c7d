"""The report: one file that tells everything and needs nothing."""

import base64
import hashlib
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from library.metadata import DatasetFacts
from library.options.groups import Options
from library.options.logging import LoggingOptions
from library.options.optimizer import OptimizerOptions
from library.options.saving import SavingOptions
from library.training import charts, report_masks
from library.training.metrics import MaskFigures
from library.training.prompts import SamplePrompt
from library.training.report import (
    ReportData,
    changed_options,
    dataset_rows,
    duration,
    embedded,
    report_path,
    spread,
    write_report,
)
from library.training.sampling import Sample

VOID = {"meta", "img"}
LOSSES = [(step, 0.3 - 0.001 * step, 1e-4) for step in range(1, 101)]
FIGURES = [(i, MaskFigures(0.2 - 0.001 * i, 0.3, 0.4, 0.01 * i if i % 4 == 0 else None)) for i in range(1, 101)]


class Page(HTMLParser):
    """Reads a page: its elements, its text, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture(path: Path, size: tuple[int, int] = (64, 48), noisy: bool = False) -> Path:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) if noisy else None
    (Image.fromarray(pixels) if noisy else Image.new("RGB", size, "teal")).save(path)
    return path


def full_report(folder: Path) -> ReportData:
    cat, dog = SamplePrompt("a cat", "ugly", 64, 48, 20, 7.5, 3), SamplePrompt('a <dog> & "friends"', seed=None)
    samples = [
        Sample(picture(folder / "cat1.png"), 0, cat, 100, None),
        Sample(picture(folder / "cat0.png"), 0, cat, 0, 0),
        Sample(picture(folder / "dog.png"), 1, dog, 100, 2),
    ]
    (folder / "lora.safetensors").write_bytes(b"weights")
    return ReportData(
        title="my <lora>",
        losses=LOSSES,
        samples=samples,
        mask_line="masks: 58 of 60 images",
        mask_sheet=picture(folder / "sheet.png", (2000, 500), noisy=True),
        dataset=[{"Folder": "photos", "Images": 6}],
        options={"learning_rate": 1e-4, "network_args": ("a=1", "b=2")},
        files=[folder / "lora.safetensors"],
        seconds=75.0,
        step_s=0.75,
        images_per_s=2.5,
        facts={"Device": "cpu"},
        validations=[(50, 0.3), (100, 0.2)],
        mask_shares=[("a picture of a rather long name, standing at the window.png", 0.034), ("b.png", 0.5)],
        mask_figures=FIGURES,
        validation_figures=[(50, MaskFigures(0.3, 0.5, 0.4)), (100, MaskFigures(0.2, 0.6, 0.4))],
    )


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_tells_everything(tmp_path: Path) -> None:
    text = read(write_report(tmp_path / "r.html", full_report(tmp_path))).text
    for told in (
        *("my <lora>", "a cat", 'a <dog> & "friends"', "ugly", "before training", "epoch 2, step 100", "seed 3"),
        *("masks: 58 of 60 images", "photos", "learning_rate", "a=1 b=2", "lora.safetensors", "cpu"),
        *(hashlib.sha256(b"weights").hexdigest(), "1 min 15 s", "750 ms", "2.5"),
    ):
        assert told in text


def test_the_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", full_report(tmp_path))
    page = read(path)
    tags = Counter(tag for tag, _ in page.elements)
    assert not {"script", "link", "iframe", "object", "base"} & set(tags)
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes[name].startswith("data:image/") for name in ("src", "href") if name in attributes)
    assert not re.search(r"url\((?!#)|@import|https?://", path.read_text(encoding="utf-8"))


def test_every_picture_has_a_text_and_a_size(tmp_path: Path) -> None:
    pictures = read(write_report(tmp_path / "r.html", full_report(tmp_path))).all("img")
    assert len(pictures) == 4
    for attributes in pictures:
        assert attributes["alt"]
        data = base64.b64decode(attributes["src"].partition("base64,")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (int(attributes["width"]), int(attributes["height"]))


def test_samples_stand_in_the_order_of_time(tmp_path: Path) -> None:
    alts = [entry["alt"] for entry in read(write_report(tmp_path / "r.html", full_report(tmp_path))).all("img")]
    assert alts[:2] == ["a cat – before training", "a cat – step 100"]


def test_the_page_is_made_for_phones_and_dark_rooms(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", full_report(tmp_path))
    page = read(path)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


def test_a_run_with_nothing_but_losses_has_a_report(tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "r.html", ReportData("lora", LOSSES)))
    assert len(page.all("section")) == 1
    assert len(page.all("svg")) == 2


def test_a_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    text = read(write_report(tmp_path / "r.html", ReportData("lora", [], is_complete=False))).text
    assert "stopped before its end" in text


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    data = full_report(tmp_path)
    data.samples[2].path.unlink()
    assert "dog.png is gone" in read(write_report(tmp_path / "r.html", data)).text


def test_a_large_picture_is_shrunk_and_compressed(tmp_path: Path) -> None:
    path = picture(tmp_path / "large.png", (2000, 1000), noisy=True)
    data, kind, size = embedded(path, 512)
    assert (kind, size) == ("webp", (512, 256))
    assert len(data) < path.stat().st_size / 20


def test_a_small_picture_is_kept_exactly(tmp_path: Path) -> None:
    path = picture(tmp_path / "small.png", (64, 64), noisy=True)
    assert embedded(path, 512) == (path.read_bytes(), "png", (64, 64))


def test_a_long_run_shows_some_of_its_samples(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    row = [Sample(path, 0, SamplePrompt("a cat"), step, None) for step in range(100)]
    shown = [sample.step for sample in spread(row, 12)]
    assert (len(shown), shown[0], shown[-1]) == (12, 0, 99)
    assert shown == sorted(set(shown))
    page = read(write_report(tmp_path / "r.html", ReportData("lora", LOSSES, row)))
    assert len(page.all("img")) == 12
    assert "12 of 100 pictures" in page.text


def test_secrets_and_defaults_are_not_among_the_options() -> None:
    options = Options(logging=LoggingOptions(wandb_api_key="secret"), optimizer=OptimizerOptions(learning_rate=3e-4))
    assert changed_options(options) == {"learning_rate": 3e-4}


def test_the_report_lies_beside_the_model() -> None:
    assert report_path(SavingOptions(output_dir="out", output_name="cat")) == Path("out/cat-report.html")
    assert report_path(SavingOptions(output_dir="out")) == Path("out/last-report.html")


def test_the_dataset_table_has_a_row_for_each_subset() -> None:
    subsets = [
        {"image_dir": "photos", "img_count": 6, "num_repeats": 5, "is_reg": False},
        {"image_dir": "reg", "img_count": 9, "num_repeats": 1, "is_reg": True},
    ]
    entry = {"resolution": [512, 640], "batch_size_per_device": 2, "bucket_info": None, "subsets": subsets}
    rows = dataset_rows(DatasetFacts(30, 9, 0, 15, 2, True, (entry,)))
    assert [(row["Folder"], row["Use"], row["Resolution"], row["Buckets"]) for row in rows] == [
        ("photos", "training", "512×640", "off"),
        ("reg", "regularisation", "512×640", "off"),
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (7800, "2 h 10 min")])
def test_times_are_told_as_people_tell_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- masks ---------------------------------------------------------------------------------------------------------


def masked_report(**more: object) -> ReportData:
    return ReportData("lora", LOSSES, mask_figures=FIGURES, **more)


def test_the_losses_inside_and_outside_of_masks_are_two_curves(tmp_path: Path) -> None:
    held_back = [(50, MaskFigures(0.3, 0.5, 0.4)), (100, MaskFigures(0.2, 0.6, 0.4))]
    page = read(write_report(tmp_path / "r.html", masked_report(validation_figures=held_back)))
    classes = [path["class"] for path in page.all("path")]
    assert classes[-8:-2] == [
        *("line each inside", "line each outside", "line inside", "line outside"),
        *("line dashed inside", "line dashed outside"),
    ]
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "inside 0.197 at first, 0.102 at last; outside 0.3 at first, 0.3 at last" in labels[-2]
    for told in ("Loss inside and outside of the masks", "Loss inside masks", "0.2 → 0.1", "images held back"):
        assert told in page.text


def test_the_drift_has_a_chart_of_its_own_where_it_was_measured(tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "r.html", masked_report()))
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "Drift outside of the masks: 0.06 at first, 0.98 at last." in labels[-1]
    assert "mask_prior_weight" in page.text
    without = ReportData(
        "lora", LOSSES, mask_figures=[(1, MaskFigures(0.1, 0.2, 0.3)), (2, MaskFigures(0.1, 0.2, 0.3))]
    )
    page = read(write_report(tmp_path / "without.html", without))
    assert len(page.all("svg")) == 3
    assert "mask_prior_weight" not in page.text


def test_each_image_has_a_bar_for_its_share_of_weight_the_lowest_first(tmp_path: Path) -> None:
    shares = [("b <1>.png", 0.5), ("a.png", 0.034), ("c.png", 1.0)]
    page = read(write_report(tmp_path / "r.html", ReportData("lora", [], mask_shares=shares)))
    assert [span["style"] for span in page.all("span") if "style" in span] == [
        "width:3.4%",
        "width:50.0%",
        "width:100.0%",
    ]
    for told in ("b <1>.png", "3.4 %", "mean 51.1 % of 3 images."):
        assert told in page.text


def test_a_name_that_is_not_utf_8_ends_no_run(tmp_path: Path) -> None:
    shares = [("caf\udce9.png", 0.5)]  # as Python reads a name in Latin-1
    page = read(write_report(tmp_path / "r.html", ReportData("lora", [], mask_shares=shares)))
    assert "caf\\udce9.png" in page.text


def test_of_many_images_some_bars_from_the_lowest_to_the_highest_are_shown(tmp_path: Path) -> None:
    shares = [(f"{i}.png", i / 1000) for i in range(1001)]
    page = read(write_report(tmp_path / "r.html", ReportData("lora", [], mask_shares=shares)))
    widths = [float(span["style"][6:-1]) for span in page.all("span") if "style" in span]
    assert (len(widths), widths[0], widths[-1]) == (report_masks.MOST_BARS, 0, 100)
    assert widths == sorted(widths)
    assert "1001 images, of which 40 are shown" in page.text


@pytest.mark.parametrize(
    ("inside", "outside"), [((), ()), ([(1, float("nan"))], ()), ([(1, 0.5)], ()), ((), [(3, 0.0)])]
)
def test_unusual_curves_of_masks_are_drawn(inside, outside) -> None:
    chart = charts.region_chart(inside, outside)
    assert bool(chart) == any(value == value for _, value in (*inside, *outside))
    if chart:
        ElementTree.fromstring(chart)


# ---- the curves ----------------------------------------------------------------------------------------------------
def test_a_chart_is_valid_svg_with_names_numbers_and_a_text() -> None:
    chart = ElementTree.fromstring(charts.loss_chart([(step, loss) for step, loss, _ in LOSSES]))
    texts = [element.text for element in chart.iter("text")]
    assert {"step", "loss", "20", "100", "0.2"} <= set(texts)
    assert chart.get("role") == "img"
    assert "smoothed 0.297 at first, 0.202 at last" in chart.get("aria-label")
    assert [path.get("class") for path in chart.iter("path")] == ["line raw", "line smooth"]


def test_the_loss_of_images_held_back_is_a_line_of_its_own_that_is_never_cut_off() -> None:
    losses = [(step, loss) for step, loss, _ in LOSSES]
    chart = ElementTree.fromstring(charts.loss_chart(losses, [(20, 0.5), (60, float("nan")), (100, 2.5)]))
    assert [path.get("class") for path in chart.iter("path")][-1] == "line validation"
    assert "Of images held back: 0.5 at first, 2.5 at last." in chart.get("aria-label")
    heights = [float(point.split()[1]) for point in list(chart.iter("path"))[-1].get("d")[1:].split("L")]
    assert len(heights) == 2
    assert min(heights) >= charts.TOP


def test_the_curve_lies_where_the_axis_says() -> None:
    plot = charts.Plot((0, 100), (0.0, 1.0), charts.HEIGHT, "loss")
    assert plot.place(0, 0.0) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert plot.place(100, 1.0) == (charts.WIDTH - charts.RIGHT, charts.TOP)


@pytest.mark.parametrize(
    "losses",
    [[(1, 0.5)], [(1, 0.5), (2, 0.5)], [(1, 0.0)], [(1, float("nan")), (2, 0.1)], [(5, 1e-7), (6, 2e-7)]],
    ids=["one", "equal", "zero", "nan", "small"],
)
def test_unusual_curves_are_drawn(losses: list[tuple[int, float]]) -> None:
    chart = charts.loss_chart(losses)
    ElementTree.fromstring(chart)
    assert "nan" not in chart


def test_no_curve_is_drawn_of_nothing() -> None:
    assert charts.loss_chart([]) == ""
    assert charts.loss_chart([(1, float("inf"))]) == ""


def test_a_spike_does_not_flatten_the_curve() -> None:
    losses = [(step, 0.2) for step in range(1, 301)] + [(301, 50.0)]
    assert "1 higher values are cut off" in charts.loss_chart(losses)


def test_a_long_curve_keeps_its_spikes_and_stays_small() -> None:
    points = [(float(step), 0.1) for step in range(100_000)]
    points[31_415] = (31_415.0, 9.0)
    thin = charts.thinned(points)
    assert len(thin) <= charts.MAX_POINTS
    assert (31_415.0, 9.0) in thin
    assert thin == sorted(thin)
    assert (thin[0], thin[-1]) == (points[0], points[-1])


def test_smoothing_keeps_a_straight_line_straight_and_halves_noise() -> None:
    assert charts.smoothed([(x, 2.0) for x in range(50)]) == [(x, 2.0) for x in range(50)]
    noise = np.random.default_rng(0).normal(size=2000)
    smooth = [y for _, y in charts.smoothed(list(enumerate(noise)))]
    assert np.std(smooth) < 0.2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.11, 0.26, [0.15, 0.2, 0.25]),
        (0, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high, 5) == pytest.approx(expected)
