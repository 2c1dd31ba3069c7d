"""What train_db.py makes of options: its own, those of networks, and those that it takes otherwise."""

import json
from pathlib import Path

import pytest

from library.errors import OptionError
from library.options import CommandLine, read_training
from library.options.command_line import CONFIG_FILE, OUTPUT_CONFIG
from library.options.groups import all_declared
from library.options.reference import (
    GRANTED,
    IGNORED,
    IGNORED_BY_SCRIPT,
    OTHER_SCRIPTS,
    REFUSED,
    REFUSED_BY_SCRIPT,
    as_in,
)
from tests.options.whole_model_scripts import IDLE

SCRIPT = "train_db"
LIST = json.loads((Path(__file__).parents[1] / "data" / "options_train_db.json").read_text("utf-8"))
WITHOUT_READER = {each.name: each.declared for each in (*REFUSED, *IGNORED, *GRANTED)}
WITHOUT_READER |= {each.name: each for each in (CONFIG_FILE, OUTPUT_CONFIG)}
NEEDED = ["--pretrained_model_name_or_path=model.safetensors", "--dataset_config=data.toml", "--output_dir=output"]
GUIDE = (
    *("--output_name=my-cat", "--save_model_as=safetensors", "--prior_loss_weight=1.0", "--max_train_steps=1600"),
    *("--learning_rate=1e-6", "--optimizer_type=AdamW8bit", "--xformers", "--mixed_precision=fp16"),
    *("--cache_latents", "--gradient_checkpointing"),
)
OLD_STYLE = (
    *("--pretrained_model_name_or_path=model.ckpt", "--train_data_dir=photos", "--reg_data_dir=cats"),
    *("--output_dir=output", "--output_name=my-cat", "--prior_loss_weight=1.0", "--resolution=512"),
    *("--train_batch_size=1", "--learning_rate=1e-6", "--max_train_steps=1600", "--use_8bit_adam", "--xformers"),
    *("--mixed_precision=bf16", "--cache_latents", "--gradient_checkpointing"),
)


def read(*more: str, script: str = SCRIPT) -> CommandLine:
    return read_training([*NEEDED, *more], script)


def refusal_of(*arguments: str) -> str:
    """Return the error that a command line ends in, or nothing."""
    try:
        read(*arguments)
    except OptionError as refusal:
        return str(refusal)
    return ""


def given(name: str) -> str:
    """Return an option of sd-scripts' list on a command line, with a value that it takes."""
    row = LIST[name]
    if row["type"] == "flag":
        return f"--{name}"
    value = (row["choices"] or [row["default"]])[-1]
    return f"--{name}={'1' if value is None else value}"


# ---- command lines of the guide --------------------------------------------------------------------------------------
def test_the_guides_command_gives_no_warning():
    result = read(*GUIDE)
    assert result.warnings == ()
    assert result.options.saving.save_model_as == "safetensors"
    assert result.options.optimizer.learning_rate_te is None


def test_the_old_style_command_gives_no_warning():
    result = read_training(OLD_STYLE, SCRIPT)
    assert result.warnings == ()
    dataset = result.options.dataset
    assert (dataset.train_data_dir, dataset.reg_data_dir, dataset.resolution) == ("photos", "cats", "512")
    assert result.options.optimizer.optimizer_type == "AdamW8bit"


@pytest.mark.parametrize("name", LIST)
def test_every_option_of_sd_scripts_train_db_is_understood(name: str):
    assert name not in OTHER_SCRIPTS or SCRIPT in OTHER_SCRIPTS[name][0]
    if name in ("config_file", "output_config"):  # read and written in test_command_line.py
        return
    assert not refusal_of(given(name)).startswith("there is no option")


@pytest.mark.parametrize("name", LIST)
def test_an_option_has_the_kind_default_and_choices_of_sd_scripts(name: str):
    option = {**all_declared(), **WITHOUT_READER}[name]
    option, row = as_in(SCRIPT, option), LIST[name]
    kind = {bool: "flag", int: "int", float: "float", str: "str"}[option.element]
    wanted = {"Path": "str", "int_or_float": "float" if option.element is float else "int"}.get(
        row["type"], row["type"]
    )
    assert (kind, option.is_list) == (wanted, row["nargs"] == "*")
    assert option.default == (row["default"] if name != "log_tracker_name" else "dreambooth")
    if name not in WITHOUT_READER:
        assert {choice for choice in row["choices"] or () if choice is not None} <= set(option.choices or ())


def test_what_only_networks_have_in_sd_scripts_works_on_whole_models_where_it_can():
    names = ("in_json", "dataset_repeats", "initial_epoch", "initial_step", "validation_split", "no_metadata")
    assert not {*names, "cpu_offload_checkpointing", "training_comment"} & set(LIST)
    more = ("--validation_split=0.1", "--validation_seed=1", "--validate_every_n_steps=5", "--initial_step=4")
    more += ("--in_json=a.json", "--dataset_repeats=2", "--cpu_offload_checkpointing", "--no_metadata")
    assert read(*more, "--training_comment=hello", "--skip_until_initial_step").warnings == ()


# ---- its own options -------------------------------------------------------------------------------------------------
def test_its_own_options_are_read():
    own = ("--learning_rate_te=2e-7", "--stop_text_encoder_training=-1", "--no_token_padding", "--use_safetensors")
    options = read(*own[0:1], *own[2:]).options
    assert (options.optimizer.learning_rate_te, options.model.no_token_padding) == (2e-7, True)
    assert options.saving.use_safetensors
    assert read(own[1]).options.training.stop_text_encoder_training == -1


@pytest.mark.parametrize("script", ["train_network", "sdxl_train_network", "sd3_train_network"])
def test_scripts_of_networks_warn_about_its_own_options(script: str):
    own = ("--learning_rate_te=2e-7", "--stop_text_encoder_training=3", "--no_token_padding", "--use_safetensors")
    warnings = read("--network_module=networks.lora", *own, script=script).warnings
    assert [text.split()[0] for text in warnings] == [option.partition("=")[0] for option in own]


@pytest.mark.parametrize(
    ("options", "source", "form"),
    [
        ([], "model.safetensors", "safetensors"),
        ([], "model.ckpt", "ckpt"),
        ([], "folder", "diffusers_safetensors"),
        ([], "owner/model", "diffusers_safetensors"),
        (["--use_safetensors"], "model.ckpt", "safetensors"),
        (["--use_safetensors", "--save_model_as=diffusers"], "model.ckpt", "diffusers_safetensors"),
        (["--save_model_as=diffusers"], "model.safetensors", "diffusers"),
        (["--save_model_as=diffusers_safetensors"], "model.ckpt", "diffusers_safetensors"),
        (["--save_model_as=ckpt"], "folder", "ckpt"),
        (["--save_model_as=safetensors"], "folder", "safetensors"),
    ],
)
def test_models_are_saved_as_the_base_model_is_unless_told_otherwise(
    tmp_path: Path, options: list[str], source: str, form: str
):
    (tmp_path / "folder").mkdir()
    for name in ("model.safetensors", "model.ckpt"):
        (tmp_path / name).touch()
    assert read(*options).options.saving.model_form(str(tmp_path / source)) == form


@pytest.mark.parametrize(
    ("script", "value", "choices"),
    [
        (SCRIPT, "pt", "ckpt, safetensors, diffusers, diffusers_safetensors"),
        ("train_network", "diffusers", "ckpt, pt, safetensors"),
        ("sd3_train_network", "diffusers_safetensors", "ckpt, pt, safetensors"),
    ],
)
def test_each_script_has_its_own_forms_of_saved_files(script: str, value: str, choices: str):
    with pytest.raises(OptionError, match=f"--save_model_as must be one of {choices}; got {value}"):
        read("--network_module=networks.lora", f"--save_model_as={value}", script=script)


def test_a_config_file_that_is_written_holds_the_form_of_saved_files(tmp_path: Path):
    file = tmp_path / "my.toml"
    with pytest.raises(SystemExit):
        read("--save_model_as=safetensors", f"--config_file={file}", "--output_config")
    assert 'save_model_as = "safetensors"' in file.read_text("utf-8")
    assert read_training([f"--config_file={file}"], SCRIPT).options.saving.save_model_as == "safetensors"


def test_the_project_in_the_tracker_is_dreambooth():
    assert read().options.logging.log_tracker_name == "dreambooth"
    assert read("--log_tracker_name=cats", "--logging_dir=logs").options.logging.log_tracker_name == "cats"
    assert len(read("--log_tracker_name=cats").warnings) == 1


# ---- what it has no use for, and what it refuses ---------------------------------------------------------------------
def test_the_list_of_idle_options_is_whole():
    assert set(IDLE) == set(IGNORED_BY_SCRIPT[SCRIPT])


@pytest.mark.parametrize("name", IDLE)
def test_what_has_no_effect_is_warned_about_and_counts_as_not_given(name: str):
    result = read(f"--{name}{IDLE[name]}")
    assert result.warnings == (f"--{name} has no effect: {IGNORED_BY_SCRIPT[SCRIPT][name]}",)
    assert result.options == read().options


@pytest.mark.parametrize("name", REFUSED_BY_SCRIPT[SCRIPT])
def test_what_cannot_be_is_refused(name: str):
    with pytest.raises(OptionError, match=f"--{name} cannot be used with train_db.py: "):
        read(f"--{name}", "--mixed_precision=bf16")


def test_options_of_networks_that_a_config_file_leaves_off_are_not_spoken_of(tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text('scale_weight_norms = 0\nnetwork_args = []\nnetwork_module = ""\nfp8_base = false')
    assert read(f"--config_file={file}").warnings == ()


def test_help_shows_what_the_script_carries_out(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    assert "Train the model itself." in shown
    assert "--save_model_as {ckpt,safetensors,diffusers,diffusers_safetensors}" in shown
    left_out = {*IGNORED_BY_SCRIPT[SCRIPT], *REFUSED_BY_SCRIPT[SCRIPT]}
    assert not [name for name in left_out if f"  --{name} " in shown or f"  --{name}\n" in shown]
    own = {name for name in all_declared() if SCRIPT in OTHER_SCRIPTS.get(name, ((),))[0]}
    assert own == {"learning_rate_te", "no_token_padding", "stop_text_encoder_training", "use_safetensors"}
    assert not [name for name in own if f"  --{name}" not in shown]


# ---- what contradicts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate=0"], "Nothing is trained"),
        (["--learning_rate=0", "--learning_rate_te=1e-6", "--stop_text_encoder_training=0"], "Nothing is trained"),
        (["--no_token_padding", "--max_token_length=150"], "--no_token_padding cannot be with --max_token_length 150"),
        (
            ["--no_token_padding", "--cache_text_encoder_outputs"],
            "--no_token_padding pads each batch of captions to its longest",
        ),
        (
            ["--cache_text_encoder_outputs", "--stop_text_encoder_training=100"],
            "cannot be trained for --stop_text_encoder_training steps first",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: list[str], message: str):
    with pytest.raises(OptionError, match=message):
        read(*arguments)


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (
            ["--learning_rate_te=1e-6", "--stop_text_encoder_training=0"],
            "--learning_rate_te has no effect: --stop_text_encoder_training 0",
        ),
        (["--use_safetensors", "--save_model_as=ckpt"], "--use_safetensors has no effect: --save_model_as ckpt"),
        (
            ["--cache_text_encoder_outputs"],
            "--cache_text_encoder_outputs requires --stop_text_encoder_training 0, which is taken as given",
        ),
    ],
)
def test_an_option_without_effect_is_warned_about_by_name(arguments: list[str], beginning: str):
    (warning,) = read(*arguments).warnings
    assert warning.startswith(beginning)


def test_the_text_encoder_alone_can_be_trained():
    assert read("--learning_rate=0", "--learning_rate_te=1e-6").warnings == ()


def test_cached_text_leaves_the_text_encoder_as_it_is():
    assert read("--cache_text_encoder_outputs").options.training.stop_text_encoder_training == 0
    asked = read("--cache_text_encoder_outputs", "--stop_text_encoder_training=-1")
    assert (asked.warnings, asked.options.training.stop_text_encoder_training) == ((), -1)
    assert read("--cache_text_encoder_outputs", "--learning_rate_te=0").warnings == ()
