"""The entry: exit codes, messages, logging, and how fast it answers."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

from library.cli import HANDLER, main, one_line, set_up_logging
from library.errors import DataError, OptionError
from library.options.logging import LoggingOptions

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "PIL", "cv2", "accelerate", "diffusers", "transformers", "safetensors", "tqdm"}


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[logging.Logger]:
    """Yield the root logger, and leave it as it was."""
    root = logging.getLogger()
    level = root.level
    yield root
    for handler in [each for each in root.handlers if each.name == HANDLER]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_network.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_wrong_option_ends_with_one_line_and_exit_code_2():
    done = run_script("--sed=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no option --sed. Did you mean --seed?\n"


def test_help_ends_with_exit_code_0():
    done = run_script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: train_network.py ")


def test_reading_options_imports_the_standard_library_only():
    script = (
        "import sys; before = set(sys.modules); import library.cli; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    imported = set(done.stdout.split())
    assert "library" in imported
    assert not HEAVY & imported
    assert imported <= {"library", "tomli", *sys.stdlib_module_names}


def test_main_returns_2_for_an_error_of_the_users(capsys: pytest.CaptureFixture[str]):
    assert main("train_network", "library.models.sd:Sd", ["--zero3_init_flag"]) == 2
    assert capsys.readouterr().err.startswith("error: --zero3_init_flag cannot be used")


def test_the_message_of_a_loader_process_is_shown_without_its_traceback():
    try:
        raise DataError("cat.png: cannot be decoded.")
    except DataError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError) as caught:
        wrapper.reraise()
    assert "Traceback" in str(caught.value)
    assert one_line(caught.value) == "cat.png: cannot be decoded."


def test_a_plain_message_is_shown_as_it_is():
    assert one_line(OptionError("--seed must be\na number.")) == "--seed must be a number."


# logging


def test_messages_go_to_the_standard_error_with_time_and_level(capsys: pytest.CaptureFixture[str]):
    set_up_logging(LoggingOptions())
    logging.getLogger("a").info("hello")
    logging.getLogger("a").debug("hidden")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(" INFO hello\n")
    assert "hidden" not in err


def test_simple_messages_go_to_the_standard_output(capsys: pytest.CaptureFixture[str]):
    set_up_logging(LoggingOptions(console_log_simple=True, console_log_level="DEBUG"))
    logging.getLogger("a").debug("hello")
    assert capsys.readouterr().out.endswith(" DEBUG hello\n")


def test_messages_go_to_a_file_that_is_emptied_first(tmp_path: Path):
    path = tmp_path / "run.log"
    path.write_text("old\n")
    set_up_logging(LoggingOptions(console_log_file=str(path)))
    logging.getLogger("a").info("hello")
    assert path.read_text().endswith(" INFO hello\n")
    assert "old" not in path.read_text()


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(OptionError, match=r"--console_log_file .* cannot be written: No such file or directory"):
        set_up_logging(LoggingOptions(console_log_file=str(tmp_path / "none" / "run.log")))


def test_other_processes_show_warnings_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("LOCAL_RANK", "1")
    set_up_logging(LoggingOptions(console_log_level="DEBUG"))
    logging.getLogger("a").info("hidden")
    logging.getLogger("a").warning("hello")
    assert "hidden" not in (err := capsys.readouterr().err)
    assert err.endswith(" WARNING hello\n")


def test_a_second_run_in_one_process_does_not_repeat_messages(capsys: pytest.CaptureFixture[str]):
    set_up_logging(LoggingOptions())
    set_up_logging(LoggingOptions())
    logging.getLogger("a").info("hello")
    assert capsys.readouterr().err.count("hello") == 1
