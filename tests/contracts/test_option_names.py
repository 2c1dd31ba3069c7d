"""The command line is a contract: sd-scripts' options keep their names, kinds and defaults here."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from library.options.command_line import CONFIG_FILE, OUTPUT_CONFIG
from library.options.groups import GROUPS, all_declared
from library.options.reference import GRANTED, IGNORED, OTHER_SCRIPTS, REFUSED
from library.options.values import Declared

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
REFERENCE: dict[str, dict[str, Any]] = json.loads((DATA / "options_train_network.json").read_text("utf-8"))
FOREIGN: dict[str, dict[str, Any]] = json.loads((DATA / "options_other_scripts.json").read_text("utf-8"))

NEW = {"cache_dir", "missing_mask", "report"}  # sd-scripts has no such option
# sd-scripts has these for SDXL and SD3 only; here they are for all.
NEW |= {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size"}
NEW_OF_OTHER_SCRIPTS = {"text_encoder_lr1", "text_encoder_lr2"}  # its guide has them, its parser has not
NEW_OF_OTHER_SCRIPTS |= {"mask_token_drop"}  # for SD3 alone
NEW |= {"mask_fill", "mask_invert", "mask_erode", "mask_dilate", "mask_feather", "mask_weight_min", "mask_area_norm"}
NEW |= {"mask_area_floor", "unmasked_probability", "mask_prior_weight", "mask_prior_every", "mask_drop_tags"}
NEW |= {"mask_captions", "mask_aware_crop", "mask_aware_zoom", "random_placement", "placement_scale"}
NEW |= {"placement_rotate", "placement_variants"}
NEW |= {"ema_decay", "save_ema"}
NEW |= {"fused_optimizer_groups"}  # of its SDXL fine-tuning only; here it is for all
ELSEWHERE = {each.name: each.declared for each in (*REFUSED, *IGNORED, *GRANTED)}
ALL = {**all_declared(), CONFIG_FILE.name: CONFIG_FILE, OUTPUT_CONFIG.name: OUTPUT_CONFIG}
DECLARED = {name: each for name, each in ALL.items() if name not in OTHER_SCRIPTS}

# Other spellings: the options themselves turn them into another option, which is the one that is read.
FOLDED = {"use_8bit_adam", "use_lion_optimizer", "caption_extention", "text_encoder_lr1", "text_encoder_lr2"}
FOLDED |= {"use_safetensors"}  # SavingOptions.model_form
FOLDED |= {"train_text_encoder", "block_lr"}  # stop_text_encoder_training; OptimizerOptions.block_rates
FOLDED |= {"learning_rate_te", "learning_rate_te1", "learning_rate_te2"}  # OptimizerOptions.text_encoder_rates


def kind_of(option: Declared) -> tuple[str, str | None]:
    """Return an option's type and nargs in the words of the reference data."""
    names = {bool: "flag", int: "int", float: "float", str: "str"}
    kind = "int_or_float" if option.parse is not None else names[option.element]
    return kind, "*" if option.is_list else None


def attributes_read(folders: Iterator[Path]) -> set[str]:
    """Return every name that stands behind a dot and is read, "group.name" in a table of places included."""
    read = set()
    for path in folders:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                group, dot, name = node.value.partition(".")
                if dot and group in GROUPS and name.isidentifier():  # metadata.py reads these with attrgetter
                    read.add(name)
    return read


def test_the_reference_has_193_options():
    assert len(REFERENCE) == 193


def test_every_option_of_the_reference_is_declared_or_has_its_reason():
    assert set(REFERENCE) == (set(DECLARED) | set(ELSEWHERE)) - NEW


def test_no_option_is_both_declared_and_without_reader():
    assert not set(ALL) & set(ELSEWHERE)
    assert not set(ELSEWHERE) & set(OTHER_SCRIPTS)


def test_no_name_is_declared_twice():
    assert len(all_declared()) == sum(len(group.__dataclass_fields__) for group in GROUPS.values())


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_an_option_has_the_kind_default_and_choices_of_the_reference(name: str):
    option = {**DECLARED, **ELSEWHERE}[name]
    wanted = REFERENCE[name]
    kind = "str" if wanted["type"] == "Path" else wanted["type"]
    assert kind_of(option) == (kind, wanted["nargs"])
    assert option.default == wanted["default"]
    if name in DECLARED:
        choices = {choice for choice in wanted["choices"] or () if choice is not None}
        assert choices <= set(option.choices or choices)
        assert bool(option.choices) == bool(choices)


def test_the_options_of_other_scripts_are_known_by_name_script_and_shape():
    found = {name: (list(scripts), has_value) for name, (scripts, has_value) in OTHER_SCRIPTS.items()}
    wanted = {name: (entry["scripts"], entry["type"] != "flag") for name, entry in FOREIGN.items()}
    assert {name: each for name, each in found.items() if name not in NEW_OF_OTHER_SCRIPTS} == wanted
    assert set(found) >= NEW_OF_OTHER_SCRIPTS


def test_the_options_of_other_scripts_that_work_have_the_references_kind():
    working = (set(ALL) & set(OTHER_SCRIPTS)) - NEW_OF_OTHER_SCRIPTS
    assert working
    assert {name: kind_of(ALL[name])[0] for name in working} == {name: FOREIGN[name]["type"] for name in working}


def test_every_option_is_read_by_code_outside_the_options():
    sources = (path for path in (ROOT / "library").rglob("*.py") if "options" not in path.relative_to(ROOT).parts)
    assert sorted(set(all_declared()) - attributes_read(sources) - FOLDED) == []
