"""What is trained: options that contradict each other, what a network is made of, and what is saved."""

import pytest
import torch
from safetensors.torch import load_file

from library.errors import OptionError
from library.models.sd import Sd
from library.options.network import NetworkOptions
from library.training import trainee
from networks import lora

CPU = torch.device("cpu")


@pytest.fixture
def parts():
    """The models of a tiny SD 1.5, afresh: networks are attached to them."""
    from tiny_models import tiny_sd15

    return Sd().load(str(tiny_sd15()), None, torch.float32)


def create(parts, rate: float = 1e-3, dtypes=(torch.float32, None), **options) -> trainee.NetworkTrainee:
    chosen = NetworkOptions(network_module="networks.lora", **options)
    return trainee.create(lora, chosen, rate, Sd(), parts, dtypes=dtypes, device=CPU)


def output_of(parts) -> torch.Tensor:
    """Return what the U-Net makes of fixed input."""
    text = Sd().encode_text(parts, Sd().tokenize(["a cat"]))
    noisy = torch.ones(1, 4, 8, 8)
    with torch.no_grad():
        return Sd().predict(parts, noisy, torch.tensor([500]), text, None)


def randomise(trained: trainee.NetworkTrainee) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.network.parameters():
            parameter.normal_(std=0.1)


# ---- checks before a model is loaded ---------------------------------------------------------------------------


def test_a_run_without_network_module_is_told_which_to_use() -> None:
    with pytest.raises(OptionError, match=r"--network_module networks\.lora"):
        trainee.check(NetworkOptions())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("conv_dimm=4", "conv_dim"),
        ("conv_dim=four", "conv_dim"),
        ("conv_dim=0", "at least 1"),
        ("conv_alpha=1", "conv_alpha needs conv_dim"),
        ("rank_dropout=1.5", "rank_dropout"),
    ],
)
def test_wrong_network_arguments_are_found_at_once(argument: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        trainee.check(NetworkOptions(network_module="networks.lora", network_args=(argument,)))


def test_arguments_by_block_wait_for_the_models_blocks() -> None:
    arguments = ("conv_block_dims=1,2", "conv_alpha=1", "down_lr_weight=1,1", "block_lr_zero_threshold=0.1")
    options = NetworkOptions(network_module="networks.lora", network_args=arguments)
    assert trainee.check(options) is lora


def test_network_arguments_are_split_at_the_first_equals_sign() -> None:
    assert trainee.network_arguments(["a=1", " b =x=y"]) == {"a": "1", "b": "x=y"}
    assert trainee.network_arguments(None) == {}


def test_a_network_argument_without_equals_sign_is_refused() -> None:
    with pytest.raises(OptionError, match='"conv_dim" is not of the form key=value'):
        trainee.network_arguments(["conv_dim"])


# ---- what is made ----------------------------------------------------------------------------------------------


def test_a_new_network_changes_nothing_before_it_is_trained(parts) -> None:
    before = output_of(parts)
    trained = create(parts)
    assert torch.equal(output_of(parts), before)
    randomise(trained)
    assert not torch.equal(output_of(parts), before)


def test_only_the_network_is_trained(parts) -> None:
    trained = create(parts)
    trained.parameter_groups()
    assert not any(p.requires_grad for model in (parts.denoiser, *parts.text_encoders, parts.vae) for p in own(model))
    assert trained.modules == (trained.network,)
    assert len(trained.trained_parameters()) == 2 * (72 + 192)


def own(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return a model's parameters without those of a network attached to it."""
    return [parameter for name, parameter in model.named_parameters() if "lora" not in name]


@pytest.mark.parametrize(
    ("options", "rate", "is_text_trained", "descriptions"),
    [
        ({}, 1e-3, True, ["textencoder", "unet"]),
        ({"network_train_unet_only": True}, 1e-3, False, ["unet"]),
        ({"network_train_text_encoder_only": True}, 1e-3, True, ["textencoder"]),
        ({"text_encoder_lr": (0.0,)}, 1e-3, False, ["unet"]),
        ({"text_encoder_lr": (1e-4,), "unet_lr": 0.0}, 1e-3, True, ["textencoder"]),
        ({"unet_lr": 1e-3}, 0.0, False, ["unet"]),
    ],
)
def test_the_options_decide_what_learns(options, rate, is_text_trained, descriptions, parts) -> None:
    trained = create(parts, rate, **options)
    groups = trained.parameter_groups()
    assert trained.is_text_trained == is_text_trained
    assert groups.descriptions == descriptions
    counted = {id(p) for group in groups.groups for p in group["params"]}
    assert {id(p) for p in trained.trained_parameters()} == counted  # what has no rate is not clipped either


def test_the_trained_weights_have_the_dtype_asked_for(parts) -> None:
    trained = create(parts, dtypes=(torch.bfloat16, None))
    assert {p.dtype for p in trained.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in own(parts.denoiser)} == {torch.float32}


def test_train_and_eval_switch_the_dropouts(parts) -> None:
    trained = create(parts, network_dropout=0.5)
    randomise(trained)
    trained.train()
    assert not torch.equal(output_of(parts), output_of(parts))
    trained.eval()
    assert torch.equal(output_of(parts), output_of(parts))


# ---- files -----------------------------------------------------------------------------------------------------


def test_a_saved_network_is_gone_on_from_exactly(parts, tmp_path) -> None:
    from tiny_models import tiny_sd15

    trained = create(parts, network_dim=2, network_alpha=2)
    randomise(trained)
    trained.save(tmp_path / "first.safetensors", {"ss_seed": "1"})
    fresh = Sd().load(str(tiny_sd15()), None, torch.float32)
    ranks = {"network_weights": str(tmp_path / "first.safetensors"), "dim_from_weights": True}
    create(fresh, **ranks)
    torch.testing.assert_close(output_of(fresh), output_of(parts), rtol=0, atol=0)


def test_base_weights_are_merged_by_their_factors(parts, tmp_path) -> None:
    """Twice half a file is the file; what is trained on top changes nothing yet."""
    from tiny_models import tiny_sd15

    trained = create(parts)
    randomise(trained)
    file = tmp_path / "base.safetensors"
    trained.save(file, {})
    fresh = Sd().load(str(tiny_sd15()), None, torch.float32)
    options = NetworkOptions(base_weights=(str(file), str(file)), base_weights_multiplier=(0.25, 0.75))
    trainee.merge_base_weights(lora, options, Sd(), fresh)
    create(fresh)
    torch.testing.assert_close(output_of(fresh), output_of(parts), rtol=1e-4, atol=1e-4)


def test_a_file_has_the_save_dtype(parts, tmp_path) -> None:
    trained = create(parts, dtypes=(torch.float32, torch.float16))
    trained.save(tmp_path / "x.safetensors", {})
    assert {tensor.dtype for tensor in load_file(tmp_path / "x.safetensors").values()} == {torch.float16}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# ---- after each update -----------------------------------------------------------------------------------------


def test_norms_are_limited_and_measured_only_if_asked(parts) -> None:
    trained = create(parts)
    randomise(trained)
    before = [parameter.clone() for parameter in trained.network.parameters()]
    assert trained.after_update() == {}
    assert all(torch.equal(old, new) for old, new in zip(before, trained.network.parameters(), strict=True))


def test_limited_norms_are_measured_as_the_logs_name_them(parts) -> None:
    trained = create(parts, scale_weight_norms=0.5)
    randomise(trained)
    measured = trained.after_update()
    assert set(measured) == {"max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm"}
    assert measured["max_norm/max_key_norm"].item() == pytest.approx(0.5)
    assert 0 < measured["max_norm/keys_scaled"].item() <= 264
