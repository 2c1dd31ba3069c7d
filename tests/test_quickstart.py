"""The first command of the README: set-up, command line, and the files it names."""

import ast
import os
import shlex
import sys
import time
from pathlib import Path

import pytest

import quickstart
from library.options import read_training

ROOT = Path(quickstart.__file__).resolve().parent


def test_only_the_standard_library_is_used():
    tree = ast.parse(Path(quickstart.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


def test_the_python_of_the_environment_is_where_each_system_puts_it():
    venv = Path("somewhere")
    assert quickstart.venv_program(venv, "Windows") == venv / "Scripts" / "python.exe"
    assert quickstart.venv_program(venv, "Linux") == quickstart.venv_program(venv, "Darwin") == venv / "bin" / "python"


def test_a_second_call_installs_nothing(tmp_path):
    stamp = tmp_path / "stamp"
    wanted = quickstart.fingerprint(b"torch==1\n", None)
    assert quickstart.needs_installation(stamp, wanted, torch_chosen=False)
    stamp.write_text(wanted, encoding="utf-8")
    assert not quickstart.needs_installation(stamp, wanted, torch_chosen=False)


def test_changed_requirements_are_installed(tmp_path):
    stamp = tmp_path / "stamp"
    stamp.write_text(quickstart.fingerprint(b"torch==1\n", None), encoding="utf-8")
    assert quickstart.needs_installation(stamp, quickstart.fingerprint(b"torch==2\n", None), torch_chosen=False)


def test_windows_line_ends_are_no_change():
    assert quickstart.fingerprint(b"a\r\nb\r\n", None) == quickstart.fingerprint(b"a\nb\n", None)


def test_a_chosen_build_of_torch_is_kept_until_another_is_chosen(tmp_path):
    stamp = tmp_path / "stamp"
    stamp.write_text(quickstart.fingerprint(b"torch==1\n", "cpu"), encoding="utf-8")
    same = quickstart.fingerprint(b"torch==1\n", None)
    assert not quickstart.needs_installation(stamp, same, torch_chosen=False)
    assert quickstart.needs_installation(stamp, quickstart.fingerprint(b"torch==1\n", "cu130"), torch_chosen=True)


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_the_printed_command_is_the_one_that_is_run(system):
    printed = quickstart.copyable(system).partition("\n")[2]
    words = shlex.split(printed.replace("\\\n", " "))
    run = quickstart.launch_command(Path("python"))
    assert words[:2] == ["accelerate", "launch"]
    assert words[2:] == run[3:]


def test_every_file_of_the_command_is_there():
    named = [word.partition("=")[2] for word in quickstart.training_arguments() if "examples/" in word]
    named.remove(quickstart.MODEL.as_posix())
    assert named
    assert all((ROOT / name).is_file() for name in named)
    assert (ROOT / quickstart.MODEL_MAKER).is_file()


def test_the_config_file_of_the_example_says_the_same_as_the_command():
    script, *arguments = quickstart.training_arguments()
    config = ROOT / "examples" / "masked_lora" / "config.toml"
    from_file = read_training(["--config_file", str(config)], script.removesuffix(".py")).options
    assert read_training(arguments, script.removesuffix(".py")).options == from_file


def test_a_failed_step_passes_its_exit_code_on(capsys):
    with pytest.raises(quickstart.StepError, match="it broke") as failure:
        quickstart.run([sys.executable, "-c", "raise SystemExit(7)"], "it broke")
    assert failure.value.code == 7


def test_an_environment_that_cannot_be_made_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setattr(quickstart, "VENV", tmp_path / "file" / ".venv")
    with pytest.raises(quickstart.StepError, match="python3-venv"):
        quickstart.prepare_environment(None)


def test_files_of_an_earlier_run_are_not_named(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    folder = tmp_path / quickstart.OUTPUT
    folder.mkdir(parents=True)
    for name in ("old.html", "new.html"):
        (folder / name).write_text("x", encoding="utf-8")
    os.utime(folder / "old.html", (time.time() - 500, time.time() - 500))
    assert quickstart.made_since(time.time() - 100, {"report": "*.html"}) == {"report": [folder / "new.html"]}


def test_a_missing_result_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    with pytest.raises(quickstart.StepError, match="the LoRA"):
        quickstart.report_files(time.time())


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.read_arguments(["demo", "--stpes", "3"])
    assert stop.value.code == 2
    assert "--stpes" in capsys.readouterr().err


def test_words_after_test_go_to_pytest():
    asked, rest = quickstart.read_arguments(["test", "tests/test_masks.py", "-x"])
    assert asked.what == "test"
    assert rest == ["tests/test_masks.py", "-x"]
