import logging

import pytest
import torch
from torch import nn

from library.errors import CheckpointError, OptionError
from library.models import lora_targets
from library.models.sd import Sd
from networks import files, lora, oft
from networks.rotation import RotationLayer, change_of

KINDS = {
    "linear": lambda: nn.Linear(6, 8),
    "linear without bias": lambda: nn.Linear(6, 8, bias=False),
    "conv": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
}


def make(small, dim=2, alpha=0.1, **arguments):
    arguments = {"enable_all_linear": "true", **arguments}
    return oft.create_network(1.0, dim, alpha, None, None, None, targets=small.targets(), **arguments)


def from_weights(targets, tensors, **arguments):
    return oft.create_network_from_weights(1.0, None, None, None, None, tensors, targets=targets, **arguments)[0]


@pytest.fixture(params=KINDS)
def layer(request, target, trained):
    """A trained layer of two blocks on a module of 8 outputs, attached."""
    torch.manual_seed(0)
    made = RotationLayer(target(KINDS[request.param]().requires_grad_(False), "oft_unet_x"), 2, 0.1)
    trained(made, std=0.5)
    made.attach()
    yield made
    made.detach()


def input_of(layer):
    return torch.randn(3, 6, 4, 4) if isinstance(layer.target.module, nn.Conv2d) else torch.randn(3, 5, 6)


def rotation_of(layer):
    """The whole matrix (8, 8) from the definition: (I + Q)(I - Q)^-1, a block at a time."""
    whole = torch.zeros(8, 8)
    skew = layer.oft_blocks.detach() - layer.oft_blocks.detach().transpose(1, 2)
    skew = skew * min(1.0, float(layer.alpha) * 8 / float(skew.norm()))
    for k in range(2):
        eye = torch.eye(4)
        whole[4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = (eye + skew[k]) @ torch.inverse(eye - skew[k])
    return whole


@pytest.fixture(scope="module")
def parts():
    """The tiny SD 1.5, frozen."""
    import tiny_models

    return Sd().load(str(tiny_models.tiny_sd15()), None, torch.float32)


def test_the_change_is_that_of_a_rotation():
    torch.manual_seed(0)
    rotation = change_of(torch.randn(3, 5, 5), 1e9) + torch.eye(5)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(5).expand(3, 5, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3), atol=1e-5, rtol=0)


def test_a_quarter_turn_is_what_the_definition_gives():
    # Q = [[0, 1], [-1, 0]]: (I + Q)(I - Q)^-1 = [[0, 1], [-1, 0]].
    change = change_of(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), 10.0)
    torch.testing.assert_close(change + torch.eye(2), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]))


def test_a_long_skew_matrix_is_shortened_to_the_limit_over_all_its_blocks():
    torch.manual_seed(0)
    blocks = torch.randn(2, 4, 4)
    norm = float((blocks - blocks.mT).norm())
    torch.testing.assert_close(change_of(blocks, norm / 2), change_of(blocks / 2, 1e9))
    assert torch.equal(change_of(blocks, 0.0), torch.zeros(2, 4, 4))


def test_the_output_is_that_of_the_rotated_weight_with_the_bias_as_it_was(layer):
    x, module = input_of(layer), layer.target.module
    weight = (rotation_of(layer).T @ module.weight.flatten(1)).view(module.weight.shape)
    if isinstance(module, nn.Conv2d):
        expected = nn.functional.conv2d(x, weight, module.bias, module.stride, module.padding)
    else:
        expected = nn.functional.linear(x, weight, module.bias)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_the_multiplier_goes_from_the_module_as_it_is_to_the_rotated_one(layer):
    x, module = input_of(layer), layer.target.module
    rotated = module(x)
    layer.multiplier = 0.25
    part = module(x)
    layer.multiplier = 0.0
    torch.testing.assert_close(part, module(x) + 0.25 * (rotated - module(x)), atol=1e-5, rtol=1e-5)


def test_in_half_precision_a_small_rotation_is_not_lost(target, trained):
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).requires_grad_(False)
    half = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    half.load_state_dict(base.state_dict())
    changes = []
    for module in (base, half):
        layer = RotationLayer(target(module, "oft_unet_x"), 4, 1.0)
        torch.manual_seed(1)
        trained(layer, std=1e-3)
        change = change_of(layer.oft_blocks, layer.limit)
        outputs = module(torch.eye(64, dtype=module.weight.dtype))
        changes.append(layer._rotated(outputs, change.to(outputs.dtype), None).float())
    assert (changes[0] - changes[1]).norm() < 0.01 * changes[0].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_equals_the_forward(kind, target, trained):
    torch.manual_seed(0)
    module = KINDS[kind]().requires_grad_(False)
    one = target(module, "lora_unet_x")
    layer = RotationLayer(target(module, "oft_unet_x"), 2, 0.1)
    trained(layer, std=0.5)
    tensors = {f"oft_unet_x.{name}": value for name, value in layer.state_dict().items()}
    network = from_weights([one], tensors)
    network.load_state_dict(tensors)
    network.set_multiplier(0.7)
    x = input_of(layer)
    with network.attached():
        expected = module(x)
    network.merge_to(None, None, tensors)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_a_new_network_changes_nothing(small):
    x = torch.randn(2, 8, 4, 4)
    plain = small(x)
    with make(small, enable_conv="true").attached():
        assert torch.equal(small(x), plain)


@pytest.mark.parametrize(
    ("arguments", "num_modules", "example"),
    [
        ({}, 128, "oft_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"),
        ({"enable_all_linear": "true"}, 192, "oft_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"),
        ({"enable_conv": "True"}, 214, "oft_unet_down_blocks_1_resnets_0_conv1"),
        ({"enable_conv": "1", "enable_all_linear": "false"}, 214, "oft_unet_mid_block_resnets_0_time_emb_proj"),
    ],
)
def test_the_modules_of_sd15_and_their_names_in_files(arguments, num_modules, example, parts):
    targets = tuple(lora_targets.of(parts.text_encoders, parts.denoiser))
    network = oft.create_network(1.0, 4, 1e-3, None, None, None, targets=targets, **arguments)
    tensors = network.state_dict()
    assert len(tensors) == 2 * num_modules
    num_outputs = {oft.PREFIX + one.name.removeprefix("lora_unet"): one.module.weight.shape[0] for one in targets}
    size = num_outputs[example] // 4
    assert tensors[f"{example}.oft_blocks"].shape == (4, size, size)
    assert float(tensors[f"{example}.alpha"]) == pytest.approx(1e-3)
    assert all(name.startswith("oft_unet_") for name in tensors)


def test_training_the_tiny_unet_lowers_the_loss(parts):
    torch.manual_seed(0)
    network = oft.create_network(1.0, 4, 0.1, None, parts.text_encoders[0], parts.denoiser)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], None, 1e-2)
    assert (names, groups[0]["lr"]) == (["unet"], 1e-2)
    optimizer = torch.optim.AdamW(groups)
    latents, text, wanted = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.randn(1, 4, 8, 8)
    losses = []
    with network.attached():
        for _ in range(8):
            loss = (parts.denoiser(latents, torch.tensor([500]), text).sample - wanted).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_a_step_reads_no_value_off_the_device(small):
    network = make(small, enable_conv="true", module_dropout="0.1").to("meta")
    small.to("meta")
    with network.attached():
        small(torch.empty(2, 8, 4, 4, device="meta")).square().mean().backward()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_under_autocast_the_output_is_in_the_targets_type_and_the_same_up_to_rounding(kind, target, trained):
    torch.manual_seed(0)
    module = KINDS[kind]().requires_grad_(False)
    layer = RotationLayer(target(module, "oft_unet_x"), 2, 0.1)
    trained(layer, std=0.5)
    layer.attach()
    x = input_of(layer)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.03)
    output.float().square().sum().backward()
    assert layer.oft_blocks.grad.isfinite().all()


def test_a_dropped_module_computes_as_if_it_had_no_layer(layer):
    x, module = input_of(layer), layer.target.module
    layer.module_dropout = 0.5
    plain, torch_seeds = layer._base_forward(x), range(20)
    dropped = []
    for seed in torch_seeds:
        torch.manual_seed(seed)
        dropped.append(torch.equal(module(x), plain))
    assert 0 < sum(dropped) < 20
    layer.eval()
    assert not any(torch.equal(module(x), plain) for _ in torch_seeds)


def test_saved_and_loaded_weights_give_the_same_output(small, trained, tmp_path):
    x = torch.randn(2, 8, 4, 4)
    network = make(small, enable_conv="true", dim=4)
    trained(network)
    with network.attached():
        expected = small(x)
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"a{suffix}"
        network.save_weights(path, None, {"ss_network_dim": "4"})
        loaded, tensors = oft.create_network_from_weights(1.0, path, None, None, None, targets=small.targets())
        loaded.load_weights(path)
        with loaded.attached():
            assert torch.equal(small(x), expected)
        assert tensors.keys() == loaded.state_dict().keys() == network.state_dict().keys()


def test_the_alpha_of_a_file_replaces_that_of_the_options(small, tmp_path):
    make(small, alpha=0.5).save_weights(tmp_path / "a.safetensors", None, None)
    network = make(small, alpha=0.1)
    network.load_weights(tmp_path / "a.safetensors")
    assert {layer.limit for layer in network.layers} == {4.0}


def test_a_network_for_inference_neither_learns_nor_drops(small):
    network = from_weights(small.targets(), make(small).state_dict(), for_inference=True)
    assert not network.training
    assert not network.get_trainable_params()


def test_a_file_of_another_kind_or_model_is_refused(small, target):
    plain = lora.create_network(1.0, 4, 1.0, None, None, None, targets=small.targets()).state_dict()
    with pytest.raises(CheckpointError, match=r"networks\.oft cannot read it \(its first entry: lora_te_"):
        from_weights(small.targets(), plain)
    with pytest.raises(CheckpointError, match=r"networks\.lora cannot read it"):
        lora.create_network_from_weights(1.0, None, None, None, None, make(small).state_dict(), targets=small.targets())
    wider = target(nn.Linear(8, 16), small.targets()[2].name)
    with pytest.raises(CheckpointError, match="for 8 outputs; the model's has 16"):
        from_weights([wider], make(small).state_dict())
    with pytest.raises(CheckpointError, match="no square blocks"):
        from_weights(small.targets(), {"oft_unet_x.oft_blocks": torch.zeros(2, 3, 4)})


def test_merging_a_file_for_another_width_is_refused(target):
    base = nn.Linear(6, 8).requires_grad_(False)
    blocks = {"oft_unet_x.oft_blocks": torch.zeros(2, 4, 4), "oft_unet_x.alpha": torch.tensor(0.1)}
    network = from_weights([target(base)], blocks)
    with pytest.raises(CheckpointError, match=r"oft_unet_x in the file to merge is \(4, 4, 4\)"):
        network.merge_to(None, None, {**blocks, "oft_unet_x.oft_blocks": torch.zeros(4, 4, 4)})


def test_a_number_of_blocks_that_does_not_divide_is_refused_by_name(small):
    with pytest.raises(OptionError, match=r"--network_dim 3 does not divide the 8 outputs of oft_unet_down_blocks_0"):
        make(small, dim=3)


def test_an_alpha_meant_for_a_lora_is_warned_about(small, caplog):
    with caplog.at_level(logging.WARNING):
        make(small, alpha=1.0)
        make(small, alpha=0.001)
    assert [record.getMessage() for record in caplog.records] == [
        "--network_alpha 1 hardly limits a rotation; for networks.oft take about 0.001"
    ]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ((4, 1e-3, None), {"enable_convs": "1"}, r'networks\.oft has no "enable_convs"\. Did you mean enable_conv\?'),
        ((4, 1e-3, None), {"enable_conv": "maybe"}, 'enable_conv must be true or false, got "maybe"'),
        ((4, 1e-3, None), {"rank_dropout": "0.1"}, "there are no ranks"),
        ((4, 1e-3, 0.1), {}, "--network_dropout: networks.oft cannot have it"),
        ((4, 0.0, None), {}, "--network_alpha 0 lets nothing rotate"),
        ((0, 1e-3, None), {}, "--network_dim must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_there_is_a_model(options, arguments, message):
    with pytest.raises(OptionError, match=message):
        oft.check_arguments(*options, arguments)


def test_no_network_dropout_may_be_said_as_0():
    oft.check_arguments(4, 1e-3, 0.0, {"dropout": 0.0})


def test_a_network_on_the_text_encoder_alone_is_refused(small):
    with pytest.raises(OptionError, match="no module to train"):
        make(small).apply_to(None, None, True, False)


def test_a_file_is_written_whole_with_hashes(small, tmp_path):
    from safetensors import safe_open

    make(small).save_weights(tmp_path / "a.safetensors", torch.float16, {})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len(file.metadata()["sshs_model_hash"]) == 64
    assert {tensor.dtype for tensor in files.read(tmp_path / "a.safetensors").values()} == {torch.float16}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
