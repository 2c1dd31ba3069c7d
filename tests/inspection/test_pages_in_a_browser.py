"""Both reports in a browser: every picture is decoded, every figure drawn, and nothing is wider than the window."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from inspection import planted
from PIL import Image
from training.test_report import full_report

from library.training.report import write_report
from tools import check_dataset

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
WIDTH, HEIGHT = 1280, 30_000  # of the frame: high enough that all pictures are asked for
LOOK = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><pre id="seen"></pre>
<iframe id="page" src="%s" style="width:%dpx;height:%dpx;border:0"></iframe><script>
addEventListener("load", async () => {
  const page = document.getElementById("page").contentDocument;
  const pictures = [...page.images];
  pictures.forEach((picture) => { picture.loading = "eager"; });  // wherever the window ends
  const done = (picture) => picture.complete || new Promise((tell) => { picture.onload = picture.onerror = tell; });
  await Promise.all(pictures.map(done));
  const box = (element) => element.getBoundingClientRect();
  const area = (element) => box(element).width * box(element).height;
  const length = (element) => Math.max(box(element).width, box(element).height);
  document.getElementById("seen").textContent = JSON.stringify({
    title: page.title,
    pictures: pictures.length,
    decoded: pictures.filter((picture) => picture.naturalWidth > 1 && area(picture) > 100).length,
    charts: [...page.querySelectorAll("svg.chart")].filter((chart) => area(chart) > 10000).length,
    marks: [...page.querySelectorAll("svg.chart .line, svg.chart .bar")].filter((mark) => length(mark) > 1).length,
    bars: [...page.querySelectorAll(".bars .track span")].filter((bar) => area(bar) > 10).length,
    tables: [...page.querySelectorAll("table")].filter((table) => area(table) > 1000).length,
    findings: page.querySelectorAll("article.finding").length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    styled: getComputedStyle(page.querySelector("section")).borderRadius,
  });
});</script>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no browser is installed")]


def browse(folder: Path, *flags: str) -> str:
    """Return what the browser writes."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", "--virtual-time-budget=20000", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def seen(page: Path, width: int = WIDTH) -> dict:
    """Return what is on a page once it is shown in a window of some width."""
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(LOOK % (page.as_uri(), width, HEIGHT), encoding="utf-8")
    text = browse(page.parent, "--dump-dom", wrapper.as_uri())
    match = re.search(r'<pre id="seen">(.*?)</pre>', text)
    assert match, text[:500]
    return json.loads(unescape(match[1]))


def picture_of(page: Path, *flags: str) -> np.ndarray:
    """Return what a window of 1280x900 shows of a page, (H, W, 3)."""
    target = page.with_suffix(".shot.png")
    browse(page.parent, f"--screenshot={target}", "--window-size=1280,900", *flags, page.as_uri())
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def dataset_page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    planted.plant(root)
    check_dataset.main(["--dataset_config", str(root / "dataset.toml"), "--html", str(root / "report.html")])
    return root / "report.html"


@pytest.fixture(scope="module")
def training_page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    return write_report(root / "report.html", full_report(root))


def test_the_dataset_report_shows_its_figures_and_pictures(dataset_page):
    found = seen(dataset_page)
    assert found["title"] == "dataset.toml – dataset report"
    assert found["pictures"] > 80
    assert found["decoded"] == found["pictures"]
    assert (found["charts"], found["tables"]) == (1, 1)
    assert found["marks"] > 3
    assert found["findings"] > 50
    assert found["styled"] == "12px"


def test_the_training_report_shows_its_figures_and_pictures(training_page):
    found = seen(training_page)
    assert found["title"] == "my <lora> – training report"
    assert found["pictures"] >= 4
    assert found["decoded"] == found["pictures"]
    assert found["charts"] == 4  # the loss and its rate; inside and outside of masks, and the drift
    assert found["marks"] == 3 + 1 + 6 + 2
    assert found["bars"] == 2
    assert found["tables"] >= 3
    assert found["styled"] == "12px"


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
@pytest.mark.parametrize("name", ["dataset_page", "training_page"])
def test_no_page_is_wider_than_its_window(name, width, request):
    assert seen(request.getfixturevalue(name), width)["overflow"] == 0


@pytest.mark.parametrize("name", ["dataset_page", "training_page"])
def test_what_is_shown_is_light_by_day_and_dark_by_night(name, request):
    page = request.getfixturevalue(name)
    day, night = picture_of(page), picture_of(page, "--blink-settings=preferredColorScheme=0")
    assert day.std() > 10
    assert np.median(day) > 200
    assert np.median(night) < 60
