"""What sdxl_train.py makes of options: its own, those of networks, and those that it takes otherwise."""

import pytest

from library.errors import OptionError
from library.options import CommandLine, read_training
from library.options.groups import all_declared
from library.options.reference import IGNORED_BY_SCRIPT, OTHER_SCRIPTS, REFUSED_BY_SCRIPT
from tests.options.whole_model_scripts import IDLE

SCRIPT = "sdxl_train"
NEEDED = ["--pretrained_model_name_or_path=model.safetensors", "--dataset_config=data.toml", "--output_dir=output"]
TEXTS = ("--train_text_encoder", "--learning_rate_te1=1e-6", "--learning_rate_te2=2e-6")
USUAL = (
    *("--output_name=my-cat", "--save_model_as=safetensors", "--learning_rate=4e-7", "--max_train_steps=1600"),
    *("--optimizer_type=Adafactor", "--optimizer_args", "scale_parameter=False", "relative_step=False"),
    *("warmup_init=False", "--max_grad_norm=0", "--fused_backward_pass", "--full_bf16", "--mixed_precision=bf16"),
    *("--cache_latents", "--cache_text_encoder_outputs", "--gradient_checkpointing", "--sdpa", "--no_half_vae"),
)
RATES = ",".join(["1e-7"] * 23)
IDLE_HERE = {**IDLE, "clip_skip": "=2"}


def read(*more: str, script: str = SCRIPT) -> CommandLine:
    return read_training([*NEEDED, *more], script)


def test_a_usual_command_gives_no_warning():
    result = read(*USUAL)
    assert result.warnings == ()
    assert result.options.training.stop_text_encoder_training == 0
    assert result.options.optimizer.text_encoder_rates == (None, None)
    assert result.options.logging.log_tracker_name == "finetuning"


def test_text_encoders_and_blocks_have_rates():
    result = read(*TEXTS, f"--block_lr={RATES}")
    assert result.warnings == ()
    assert result.options.training.stop_text_encoder_training is None
    assert result.options.optimizer.text_encoder_rates == (1e-6, 2e-6)
    assert result.options.optimizer.block_rates == (1e-7,) * 23


def test_it_has_its_own_options_and_not_those_of_train_db():
    own = {name for name in all_declared() if SCRIPT in OTHER_SCRIPTS.get(name, ((),))[0]}
    assert own == {
        *("train_text_encoder", "learning_rate_te1", "learning_rate_te2", "block_lr"),
        *("use_safetensors", "disable_mmap_load_safetensors"),
    }
    others = ("--learning_rate_te=1e-6", "--stop_text_encoder_training=5", "--no_token_padding")
    warned = read(*others).warnings
    assert [text.split()[0] for text in warned] == [option.partition("=")[0] for option in others]


@pytest.mark.parametrize("script", ["train_network", "sdxl_train_network", "sd3_train_network", "train_db"])
def test_other_scripts_warn_about_its_options(script: str):
    own = (*TEXTS, f"--block_lr={RATES}")
    warnings = read("--network_module=networks.lora", *own, script=script).warnings
    own_warnings = [text for text in warnings if "only sdxl_train" in text]
    assert [text.split()[0] for text in own_warnings] == [option.partition("=")[0] for option in own]


def test_the_list_of_idle_options_is_whole():
    assert set(IDLE_HERE) == set(IGNORED_BY_SCRIPT[SCRIPT])


@pytest.mark.parametrize("name", IDLE_HERE)
def test_what_has_no_effect_is_warned_about(name: str):
    assert read(f"--{name}{IDLE_HERE[name]}").warnings == (
        f"--{name} has no effect: {IGNORED_BY_SCRIPT[SCRIPT][name]}",
    )


@pytest.mark.parametrize("name", REFUSED_BY_SCRIPT[SCRIPT])
def test_what_cannot_be_is_refused(name: str):
    with pytest.raises(OptionError, match=rf"--{name} cannot be used with sdxl_train\.py: "):
        read(f"--{name}", "--mixed_precision=bf16")


@pytest.mark.parametrize("rates", ["1e-6", RATES + ",1", RATES[:-1] + "x", "-" + RATES, RATES.replace("1e-7", "nan")])
def test_block_rates_that_do_not_fit_are_refused(rates: str):
    with pytest.raises(OptionError, match="--block_lr must be 23 "):
        read(f"--block_lr={rates}")


@pytest.mark.parametrize("name", ["learning_rate_te1", "learning_rate_te2"])
def test_a_rate_of_a_text_encoder_that_does_not_learn_is_warned_about(name: str):
    assert read(f"--{name}=1e-6").warnings == (f"--{name} has no effect without --train_text_encoder",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate=0"], "Nothing is trained: .* or --train_text_encoder with a rate"),
        (["--learning_rate=0", "--learning_rate_te1=1e-6"], "Nothing is trained"),
        ([f"--block_lr={RATES.replace('1e-7', '0')}"], "Nothing is trained"),
        (["--cache_text_encoder_outputs", "--train_text_encoder"], "--train_text_encoder has nothing to train"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: list[str], message: str):
    with pytest.raises(OptionError, match=message):
        read(*arguments)


def test_one_part_alone_can_be_trained():
    assert read("--learning_rate=0", *TEXTS).warnings == ()
    assert read("--learning_rate=0", f"--block_lr={RATES}").warnings == ()
    zero = ("--train_text_encoder", "--learning_rate_te1=0", "--learning_rate_te2=0")
    assert read("--cache_text_encoder_outputs", *zero).warnings == ()


def test_help_shows_what_the_script_carries_out(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    assert "Train the model itself." in shown
    assert "  --train_text_encoder" in shown
    left_out = {*IGNORED_BY_SCRIPT[SCRIPT], *REFUSED_BY_SCRIPT[SCRIPT], "no_token_padding"}
    assert not [name for name in left_out if f"  --{name} " in shown or f"  --{name}\n" in shown]
