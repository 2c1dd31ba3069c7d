"""The benchmarks still run: each once, as small as can be. What they measure is not looked at here."""

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
DATASET = """
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "examples/data/photos"
conditioning_data_dir = "examples/data/photos_mask"
caption_extension = ".txt"
"""


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let the benchmarks find each other, and take back what they set."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # hashes of models are remembered there
    level = logging.getLogger("library").level
    yield
    logging.getLogger("library").setLevel(level)


def rows(output: str) -> dict[str, list[str]]:
    """Return the cells of a printed table by the name in its first column."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]
    return {name: rest for name, *rest in cells[2:]}


def run(name: str, capsys: pytest.CaptureFixture[str], *options: object) -> dict[str, list[str]]:
    """Return the table that a benchmark prints when it is run quickly."""
    importlib.import_module(name).main(["--quick", *map(str, options)])
    return rows(capsys.readouterr().out)


def test_the_benchmark_of_cache_entries_measures_bytes_writing_and_reading(capsys):
    found = run("cache_entry", capsys)
    assert set(found) == {f"{what} {mask} mask" for what in ("entry", "write", "read") for mask in ("with", "without")}
    assert found["entry with mask"][-1] == "< 170000: holds"  # bytes do not depend on the machine


def test_the_benchmark_of_filling_measures_both_kinds_of_pictures(capsys):
    found = run("fill_cache", capsys)
    assert {"RGBA PNG: fill", "RGBA PNG: masks switched on", "JPEG + mask PNG: second start"} <= set(found)


def test_the_benchmark_of_fills_measures_each_and_the_shape_of_masks(capsys):
    found = run("mask_fill", capsys)
    assert [name.partition(":")[0] for name in found] == ["fill", "fill", "fill", "shape"]


def test_the_benchmark_of_checking_a_dataset_runs_the_command(capsys):
    assert set(run("check_dataset", capsys)) == {"check 3 JPEG + mask PNG", "check 3 RGBA PNG"}


@pytest.mark.slow
def test_the_benchmark_of_starting_up_finds_every_phase_in_the_log(capsys, tmp_path):
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(DATASET, encoding="utf-8")
    found = run("start_up", capsys, "--model", tiny_models.tiny_sd15(), "--dataset_config", dataset)
    assert {"--help", "a wrong option", "start to step 1 and its file", "load the model", "step 1 and its file"} <= set(
        found
    )


def test_the_benchmark_of_steps_takes_the_model_out(capsys):
    found = run("step_overhead", capsys, "--model", tiny_models.tiny_sd15(), "--side", 128)
    assert {"disk, masks on: outside the model", "weigh the loss, batch of 4 at 128"} <= set(found)


@pytest.mark.slow
def test_the_benchmark_of_true_size_trains_and_finds_the_keys_of_the_reference(capsys):
    found = run("true_size", capsys, "--model", tiny_models.tiny_sd15())
    assert {"peak memory of loading", "command to the end of step 1", "peak memory"} <= set(found)


@pytest.mark.slow
def test_the_benchmark_of_true_size_trains_the_models_themselves_and_times_single_steps(capsys):
    options = ("--family", "sd15_full_fused", "--without_loading", "--steps", 3, "--model", tiny_models.tiny_sd15())
    found = run("true_size", capsys, *options)
    assert found["a step"][4] == "1", "of three steps, from the end of the first to that of the second"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize(
    ("model", "make"),
    [
        ("sd15", tiny_models.tiny_sd15),
        ("sdxl", tiny_models.tiny_sdxl),
        ("sd15_full", tiny_models.tiny_sd15),
    ],
)
def test_the_benchmark_of_a_gpu_runs_where_there_is_none(capsys, model, make):
    found = run("gpu_step", capsys, "--models", model, "--shapes", make())
    case = f"{model}, batch 1, checkpointing, compiled"
    assert {f"{case}: {what}" for what in ("with masks", "without", "cost of masks")} <= set(found)
    assert found[f"{case}: graphs compiled later"][-1] == "< 1: holds"


@pytest.mark.slow
def test_the_benchmark_of_sd3_swaps_blocks_and_leaves_tokens_out(capsys):
    found = run("sd3_speed", capsys)
    assert {"batch 1: speed", "batch 1, 4 blocks swapped: speed", "batch 1, tokens left out: speed-up"} <= set(found)
    assert (
        found["batch 1, tokens left out: share that is kept"][1] == "50"
    )  # up to 100 of 256 tokens, rounded up to 128


def test_the_benchmark_of_merging_runs_the_commands(capsys):
    assert {"copy the model", "merge into the model", "extract"} <= set(run("merging_full_size", capsys))


def test_a_record_says_how_to_repeat_the_measurement(monkeypatch, tmp_path):
    measuring = importlib.import_module("measuring")
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks/cache_entry.py", "--runs", "3", "--record", "--device", "a machine"])
    arguments = measuring.make_parser("A benchmark.").parse_args(["--record", "--device", "a machine"])
    measuring.conclude(arguments, [measuring.Figure("reading", "ms", (3.0, 1.0, 2.0), 5, at_most=1.5)], 0.25)
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "- device: a machine\n" in text
    assert "- command: `python benchmarks/cache_entry.py --runs 3`\n" in text
    assert rows(text)["reading"] == ["ms", "1", "2", "3", "3", "5", "< 1.5: FAILS"]
