"""From arguments and a config file to options."""

import logging
from pathlib import Path

import pytest

from library.errors import OptionError
from library.options import GROUPS, CommandLine, Options, parse, read_command_line, read_training
from library.options.reference import GRANTED, IGNORED, OTHER_SCRIPTS, REFUSED

NEEDED = [
    "--pretrained_model_name_or_path=model.safetensors",
    "--train_data_dir=images",
    "--resolution=512",
    "--network_module=networks.lora",
    "--output_dir=output",
]


def read(*arguments: str) -> CommandLine:
    return read_training([*NEEDED, *arguments], "train_network")


def refusal(*arguments: str) -> str:
    with pytest.raises(OptionError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str, name: str = "train.toml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return f"--config_file={tmp_path / name}"

    return write


# precedence


def test_without_arguments_every_value_is_its_default():
    options = read_command_line([], prog="x.py", description="x").options
    assert options == Options()


def test_the_command_line_beats_the_config_file_and_the_file_beats_the_defaults(config):
    file = config("network_dim = 8\nnetwork_alpha = 4\n")
    options = read(file, "--network_dim=16").options
    assert (options.network.network_dim, options.network.network_alpha) == (16, 4.0)
    assert options.training.max_train_steps == 1600


def test_a_default_on_the_command_line_beats_the_config_file(config):
    assert read(config("max_train_steps = 10"), "--max_train_steps=1600").options.training.max_train_steps == 1600


def test_the_sections_of_a_config_file_do_not_matter(config):
    options = read(config("seed = 1\n[anything]\nnetwork_dim = 8\n[anything.below]\nflip_aug = true\n")).options
    assert (options.training.seed, options.network.network_dim, options.dataset.flip_aug) == (1, 8, True)


def test_the_ending_of_a_config_file_may_be_left_out(config):
    assert read(config("seed = 5").removesuffix(".toml")).options.training.seed == 5


def test_a_config_file_may_begin_with_a_byte_order_mark(config):
    assert read(config("\ufeffseed = 5")).options.training.seed == 5


def test_a_key_that_stands_in_two_sections_is_warned_about_and_the_last_counts(config):
    found = read(config("[a]\nseed = 1\n[b]\nseed = 2\n"))
    assert found.options.training.seed == 2
    assert ["seed is given twice" in warning for warning in found.warnings] == [True]


# values


def test_lists_come_from_several_arguments_and_from_a_toml_list(config):
    options = read("--network_args", "conv_dim=4", "conv_alpha=1", config('optimizer_args = ["weight_decay=0.1"]'))
    assert options.options.network.network_args == ("conv_dim=4", "conv_alpha=1")
    assert options.options.optimizer.optimizer_args == ("weight_decay=0.1",)


def test_text_encoder_lr_may_be_one_number_in_a_config_file(config):
    assert read(config("text_encoder_lr = 1e-4")).options.network.text_encoder_lr == (1e-4,)


def test_numbers_in_quotes_are_numbers_in_a_config_file(config):
    assert read(config('learning_rate = "1e-4"\nseed = "7"')).options.optimizer.learning_rate == 1e-4


def test_a_size_may_be_a_number_or_a_list_in_a_config_file(config):
    file = config("resolution = [768, 512]")
    arguments = [argument for argument in NEEDED if "resolution" not in argument]
    assert read_training([*arguments, file], "train_network").options.dataset.resolution == "768,512"


def test_warm_up_keeps_steps_and_ratios_apart():
    scheduler = "--lr_scheduler=cosine"
    assert read(scheduler, "--lr_warmup_steps=100").options.schedule.lr_warmup_steps == 100
    assert read(scheduler, "--lr_warmup_steps=10%").options.schedule.lr_warmup_steps == 0.1
    assert "--lr_warmup_steps must be a whole number of steps" in refusal(scheduler, "--lr_warmup_steps=1.5")


def test_a_negative_number_may_follow_its_option():
    assert read("--noise_offset", "0.1", "--adaptive_noise_scale", "-0.05").options.noise.adaptive_noise_scale == -0.05


def test_the_settings_that_a_graphical_front_end_writes_are_understood(config):
    found = read(
        config(
            'adaptive_noise_scale = 0\nclip_skip = 1\ndynamo_backend = "no"\nepoch = 1\nlr_scheduler_args = []\n'
            "max_token_length = 75\nmax_timestep = 1000\nmultires_noise_iterations = 0\nnetwork_args = []\n"
            'noise_offset = 0\nnoise_offset_type = "Original"\nnetwork_alpha = 1\nprior_loss_weight = 1\n'
            'lr_scheduler = "cosine"\nlr_warmup_steps = 160\nscale_weight_norms = 0\nlr_scheduler_power = 1\n'
            "min_snr_gamma = 0\nip_noise_gamma = 0\n"
        )
    )
    assert found.options.network.network_args is None
    assert found.options.model.max_token_length is None
    assert [warning.partition(" has no effect")[0].split()[-1] for warning in found.warnings] == [
        "epoch",
        "noise_offset_type",
    ]


# wrong names and values


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--network_din=4", "there is no option --network_din. Did you mean --network_dim?"),
        ("--train-batch-size=4", "there is no option --train-batch-size. Did you mean --train_batch_size?"),
        ("--zzz", "there is no option --zzz."),
        ("stray", "'stray' belongs to no option. Put values with spaces in quotes."),
        ("--seed=x", "--seed must be a whole number, got 'x'."),
        ("--seed", "--seed: expected one argument. See --help."),
        ("--loss_type=hubert", "--loss_type must be one of l1, l2, huber, smooth_l1; got hubert. Did you mean huber?"),
        ("--flip_aug=yes", "--flip_aug: ignored explicit argument 'yes'. See --help."),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(argument: str, message: str):
    assert refusal(argument) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("keep_token = 1", "train.toml: there is no option keep_token. Did you mean keep_tokens?"),
        ("seed = true", "train.toml: seed must be a whole number, got true."),
        ('loss_type = "l3"', "train.toml: loss_type must be one of l1, l2, huber, smooth_l1; got l3."),
        ("network_dim = 0", "train.toml: network_dim must be at least 1, got 0."),
        ("seed = = 3", "train.toml: is not valid TOML"),
        (r'vae = "C:\models\vae"', r"Between double quotes \ begins a special character: write paths with /"),
        (
            r'vae = "C:\new\table"',
            r"train.toml: vae has a special character in it: 'C:\new\table'. Between double quotes",
        ),
    ],
)
def test_a_wrong_line_of_a_config_file_is_one_line_that_names_file_and_key(config, line: str, message: str):
    assert message in refusal(config(line))


def test_a_missing_config_file_is_named(tmp_path: Path):
    assert refusal(f"--config_file={tmp_path / 'none'}") == (
        f"--config_file: there is no file {tmp_path / 'none.toml'}. Check the path."
    )


def test_an_option_may_be_shortened_while_it_is_clear():
    assert read("--max_train_st", "7").options.training.max_train_steps == 7


def test_a_shortened_option_that_is_not_clear_is_refused():
    assert refusal("--max_train", "7").startswith("ambiguous option: --max_train could match")


# options without a reader


@pytest.mark.parametrize("option", REFUSED, ids=lambda option: option.name)
def test_a_refused_option_says_why(option):
    value = {bool: (), str: ("x",), int: ("7",), float: ("0.5",)}[option.element]
    assert refusal(f"--{option.name}", *value) == f"--{option.name} cannot be used: {option.reason}. Leave it out."


def test_a_refused_option_at_its_default_is_silently_fine(config):
    found = read(config("zero3_init_flag = false\nfused_backward_pass = false\nsave_state = false\nresume = ''\n"))
    assert found.warnings == ()


def test_a_refused_option_that_is_off_by_a_0_is_silently_fine(config):
    found = read(config("fp8_base = 0\n"))
    assert found.warnings == ()


def test_intervals_and_limits_of_validation_that_are_0_are_none(config):
    found = read(config("validate_every_n_steps = 0\nvalidate_every_n_epochs = 0\nmax_validation_steps = 0\n"))
    validation = found.options.validation
    assert {validation.validate_every_n_steps, validation.validate_every_n_epochs, validation.max_validation_steps} == {
        None
    }


def test_a_number_of_states_or_a_first_epoch_of_0_is_none(config):
    found = read(config("save_last_n_steps_state = 0\ninitial_epoch = 0\n")).options
    assert (found.saving.save_last_n_steps_state, found.training.initial_epoch) == (None, None)


@pytest.mark.parametrize("option", IGNORED, ids=lambda option: option.name)
def test_an_ignored_option_is_warned_about(option):
    assert read(f"--{option.name}").warnings == (f"--{option.name} has no effect: {option.reason}",)


@pytest.mark.parametrize("option", GRANTED, ids=lambda option: option.name)
def test_an_option_that_is_always_on_is_accepted_without_a_word(option):
    assert read(f"--{option.name}").warnings == ()


@pytest.mark.parametrize("name", OTHER_SCRIPTS)
def test_an_option_of_another_script_is_skipped_with_its_value_and_warned_about(name: str):
    value = ["3"] if OTHER_SCRIPTS[name][1] else []
    found = read("--seed=1", f"--{name}", *value, "--network_dim=2")
    assert (found.options.training.seed, found.options.network.network_dim) == (1, 2)
    assert [warning.split()[0] for warning in found.warnings] == [f"--{name}"]


def test_an_option_of_another_script_may_hold_its_value_behind_an_equals_sign():
    assert len(read("--t5xxl=t5.safetensors", "--flip_aug").warnings) == 1


def test_a_key_of_another_script_is_warned_about_in_a_config_file_unless_it_is_off(config):
    found = read(config("blocks_to_swap = 3\nno_token_padding = false\n"))
    (warning,) = found.warnings
    assert "blocks_to_swap has no effect: train_network does not use it" in warning


def test_parse_sends_the_warnings_to_the_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        parse([*NEEDED, "--mem_eff_attn"])
    assert [record.message.split()[0] for record in caplog.records] == ["--mem_eff_attn"]


# --output_config


def written(path: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        read_training([f"--config_file={path}", "--output_config", *arguments], "train_network")
    assert caught.value.code == 0
    return path.read_text(encoding="utf-8")


def test_output_config_writes_what_differs_from_the_defaults(tmp_path: Path):
    text = written(tmp_path / "out.toml", "--seed=3", "--network_dim=8", "--train_batch_size=1", "--flip_aug")
    sections = ["[dataset]\nflip_aug = true\n", "[network]\nnetwork_dim = 8\n", "[training]\nseed = 3\n"]
    assert text == "\n".join(sections)


def test_what_output_config_writes_is_read_back_as_the_same_options(tmp_path: Path):
    arguments = [
        *NEEDED, "--caption_prefix=a \"quoted\" \\ 猫\t", "--network_args", "conv_dim=4", "a=b", "--text_encoder_lr",
        "1e-5", "2e-5", "--lr_scheduler=cosine", "--lr_warmup_steps=10%", "--flip_aug", "--noise_offset=0.05",
    ]  # fmt: skip
    path = tmp_path / "out.toml"
    written(path, *arguments)
    assert read_training([f"--config_file={path}"], "train_network") == read_training(arguments, "train_network")


def test_output_config_does_not_write_secrets(tmp_path: Path):
    assert "abc" not in written(tmp_path / "out.toml", "--wandb_api_key=abc", "--seed=1")


def test_output_config_does_not_overwrite(config):
    file = config("seed = 1")
    assert "exists and is not overwritten" in refusal(file, "--output_config")


def test_output_config_needs_a_file():
    assert refusal("--output_config") == "--output_config has no file to write to. Add --config_file=FILE.toml."


# other commands


def test_another_command_shows_some_groups_understands_all_and_has_its_own_flags(capsys: pytest.CaptureFixture[str]):
    shown = {name: GROUPS[name] for name in ("dataset", "masks")}

    def read_other(*arguments: str) -> CommandLine:
        return read_command_line(
            arguments,
            prog="check.py",
            description="Check.",
            shown=shown,
            add_own=lambda parser: parser.add_argument("--json", metavar="FILE", default=None, help="Write to FILE."),
        )

    found = read_other("--train_data_dir=images", "--json", "out.json", "--seed=3")
    assert found.own == {"json": "out.json"}
    assert (found.options.dataset.train_data_dir, found.options.training.seed) == ("images", 3)
    assert read_other().own == {"json": None}
    with pytest.raises(SystemExit):
        read_other("--help")
    text = capsys.readouterr().out
    assert "--alpha_mask" in text
    assert "--json" in text
    assert "--network_dim" not in text


def test_help_lists_every_option_with_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Default: 1600." in text
    names = {name for group in GROUPS.values() for name in group.__dataclass_fields__}
    assert [name for name in names - set(OTHER_SCRIPTS) if f"--{name}" not in text] == []


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        (["--text_encoder_lr1=1e-5", "--text_encoder_lr2=2e-5"], (1e-5, 2e-5)),
        (["--text_encoder_lr2=2e-5", "--learning_rate=1e-4"], (1e-4, 2e-5)),
        (["--text_encoder_lr1=0", "--text_encoder_lr=3e-5"], (0.0, 3e-5)),
        (["--text_encoder_lr1=1e-5", "--text_encoder_lr", "3e-5", "4e-5"], (1e-5, 4e-5)),
        (["--text_encoder_lr", "3e-5", "4e-5"], (3e-5, 4e-5)),
    ],
)
def test_a_rate_for_each_text_encoder_is_a_list_of_rates(given: list[str], rates: tuple[float, ...]):
    options = read_training([*NEEDED, *given], "sdxl_train_network").options
    assert options.network.text_encoder_lr == pytest.approx(rates)


def test_what_a_script_cannot_carry_out_is_refused_or_warned_about():
    with pytest.raises(OptionError, match=r"--v2 cannot be used with sdxl_train_network.py: .* train_network.py"):
        read_training([*NEEDED, "--v2"], "sdxl_train_network")
    (warning,) = read_training([*NEEDED, "--clip_skip=2"], "sdxl_train_network").warnings
    assert warning.startswith("--clip_skip has no effect: SDXL")


def test_help_lists_only_the_options_of_the_script(capsys: pytest.CaptureFixture[str]):
    for script, is_there in (("train_network", False), ("sdxl_train_network", True)):
        with pytest.raises(SystemExit):
            read_training(["--help"], script)
        assert ("--disable_mmap_load_safetensors" in capsys.readouterr().out) is is_there
