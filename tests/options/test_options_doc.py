"""docs/options.md says what the code declares."""

from library.options.groups import all_declared
from library.options.reference import GRANTED, IGNORED, OTHER_SCRIPTS, REFUSED
from tools.write_options_doc import DOCUMENT, render


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run python tools/write_options_doc.py"


def test_every_option_has_one_row():
    rows = [line.split("`")[1] for line in render().splitlines() if line.startswith("| `--")]
    names = [
        *all_declared(),
        "config_file",
        "output_config",
        *(each.name for each in (*REFUSED, *IGNORED, *GRANTED)),
        *(name for name in OTHER_SCRIPTS if name not in all_declared()),
    ]
    assert sorted(rows) == sorted(f"--{name}" for name in names)


def test_an_option_of_certain_scripts_names_them():
    (row,) = (line for line in render().splitlines() if line.startswith("| `--disable_mmap_load_safetensors`"))
    assert "Only sdxl_train_network and sd3_train_network and sdxl_train." in row


def test_what_a_script_cannot_carry_out_has_a_row():
    rows = [line for line in render().splitlines() if line.startswith("| sdxl_train_network |")]
    assert [row.split("`")[1] for row in rows] == ["--v2", "--clip_skip"]


def test_the_group_of_sd3_has_its_name_in_capitals():
    assert "\n## SD3\n" in render()


def test_help_texts_are_sentences():
    texts = {name: option.help for name, option in all_declared().items()}
    assert {name: text for name, text in texts.items() if not text[0].isalpha() or not text.endswith(".")} == {}
