import pytest
import torch
from torch import nn

from library.errors import OptionError
from networks import lora, lora_fa
from networks.layers import Dropout


def make(small, dim=4, alpha=4.0, **arguments):
    return lora_fa.create_network(1.0, dim, alpha, None, None, None, targets=small.targets(), **arguments)


def groups_of(network):
    made, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-2)
    return [parameter for group in made for parameter in group["params"]]


def test_names_and_shapes_are_those_of_a_lora(small):
    plain = lora.create_network(1.0, 4, 4.0, None, None, None, targets=small.targets(), conv_dim="2")
    assert {name: tensor.shape for name, tensor in make(small, conv_dim="2").state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }


def test_a_new_network_changes_nothing(small):
    x = torch.randn(2, 8, 4, 4)
    plain = small(x)
    with make(small, conv_dim="2").attached():
        assert torch.equal(small(x), plain)


def test_down_starts_normal_with_the_variance_of_its_channels_and_ranks(target):
    torch.manual_seed(0)
    for base, num_inputs in ((nn.Linear(320, 64), 320), (nn.Conv2d(64, 64, 3), 64)):
        down = lora_fa.LoraFaLayer(target(base), 64, 1.0, Dropout()).lora_down.weight
        assert float(down.std()) == pytest.approx((2 / (num_inputs + 64)) ** 0.5, rel=0.03)
        assert float(down.abs().max() / down.std()) > 3  # not uniform


def test_the_groups_hold_up_weights_only_and_nothing_else_is_clipped(small):
    network = make(small)
    ups = [id(layer.lora_up.weight) for layer in network.layers]
    assert [id(parameter) for parameter in groups_of(network)] == ups
    network.prepare_grad_etc(None, None)
    assert [id(parameter) for parameter in network.get_trainable_params()] == ups


def test_training_lowers_the_loss_and_leaves_down_as_it_was(small):
    x, wanted = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4)
    network = make(small)
    before = [layer.lora_down.weight.clone() for layer in network.layers]
    optimizer = torch.optim.AdamW(groups_of(network), lr=1e-2)
    losses = []
    with network.attached():
        for _ in range(20):
            loss = (small(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(layer.lora_down.weight, old) for layer, old in zip(network.layers, before, strict=True))


def test_only_the_activations_behind_down_are_kept_for_the_backward_pass(target):
    base = nn.Linear(64, 64).requires_grad_(False)
    layer = lora_fa.LoraFaLayer(target(base), 2, 1.0, Dropout())
    layer.attach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        base(torch.randn(7, 64))
    assert (7, 64) not in kept
    assert (7, 2) in kept


def test_saved_and_loaded_weights_give_the_same_output_and_go_on_with_the_same_down(small, trained, tmp_path):
    x = torch.randn(2, 8, 4, 4)
    network = make(small)
    trained(network)
    with network.attached():
        expected = small(x)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    loaded = make(small)
    loaded.load_weights(tmp_path / "a.safetensors")
    with loaded.attached():
        assert torch.equal(small(x), expected)
    assert not any(layer.lora_down.weight.requires_grad for layer in loaded.layers)


def test_a_network_from_a_file_has_its_ranks_and_a_frozen_down(small):
    tensors = make(small, dim=3, alpha=6.0).state_dict()
    network, _ = lora_fa.create_network_from_weights(1.0, None, None, None, None, tensors, targets=small.targets())
    assert {(type(layer), layer.rank, layer.scale) for layer in network.layers} == {(lora_fa.LoraFaLayer, 3, 2.0)}
    assert not any(layer.lora_down.weight.requires_grad for layer in network.layers)


def test_merging_equals_the_forward(small, trained):
    x = torch.randn(2, 8, 4, 4)
    network = make(small, conv_dim="2")
    trained(network)
    with network.attached():
        expected = small(x)
    network.merge_to(None, None, network.state_dict())
    torch.testing.assert_close(small(x), expected, atol=1e-5, rtol=1e-5)


def test_a_limit_on_norms_shrinks_up_and_leaves_down(small, trained):
    network = make(small)
    trained(network)
    before = [layer.lora_down.weight.clone() for layer in network.layers]
    scaled, _, largest = network.apply_max_norm_regularization(0.01)
    assert int(scaled) == len(before)
    _, _, measured = network.apply_max_norm_regularization(1e9)
    assert (float(largest), float(measured)) == pytest.approx((0.01, 0.01))
    assert all(torch.equal(layer.lora_down.weight, old) for layer, old in zip(network.layers, before, strict=True))


def test_lora_plus_is_refused_with_its_reason(small):
    with pytest.raises(
        OptionError, match=r'networks\.lora_fa cannot have "loraplus_lr_ratio": lora_down does not learn'
    ):
        lora_fa.check_arguments(4, 1.0, None, {"loraplus_lr_ratio": "16"})


def test_an_unknown_argument_is_answered_with_the_nearest(small):
    with pytest.raises(OptionError, match=r'networks\.lora_fa has no "conv_dims".*Did you mean conv_dim\?'):
        make(small, conv_dims="4")
