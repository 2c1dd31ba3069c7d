import math

import pytest
import torch
from torch import nn

from library.errors import OptionError
from networks import dylora, lora
from networks.dylora import DyLoraLayer
from networks.layers import Dropout


def make(small, dim=4, alpha=4.0, **arguments):
    return dylora.create_network(1.0, dim, alpha, None, None, None, targets=small.targets(), **arguments)


@pytest.fixture(params=[nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1)], ids=["linear", "conv"])
def layer(request, target, trained):
    """A trained layer of rank 6 and unit 2, attached."""
    torch.manual_seed(0)
    made = DyLoraLayer(target(request.param.requires_grad_(False)), 6, 3.0, Dropout(), unit=2)
    trained(made)
    made.attach()
    yield made
    made.detach()


def input_of(layer):
    return torch.randn(3, 6, 4, 4) if isinstance(layer.target.module, nn.Conv2d) else torch.randn(3, 6)


def ranks_with_gradients(layer):
    down = layer.lora_down.weight.grad.flatten(1).abs().sum(1) > 0
    up = layer.lora_up.weight.grad.flatten(1).abs().sum(0) > 0
    assert torch.equal(down, up)
    return tuple(torch.nonzero(down).flatten().tolist())


def test_names_shapes_and_values_at_the_start_are_those_of_a_lora(small):
    torch.manual_seed(1)
    plain = lora.create_network(1.0, 4, 4.0, None, None, None, targets=small.targets(), conv_dim="2").state_dict()
    torch.manual_seed(1)
    ours = make(small, conv_dim="2", unit="2").state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())


def test_a_new_network_changes_nothing(small):
    x = torch.randn(2, 8, 4, 4)
    plain = small(x)
    with make(small, conv_dim="2").attached():
        assert torch.equal(small(x), plain)


def test_every_slice_is_drawn_and_only_one_learns_at_a_time(layer):
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        layer.zero_grad()
        layer.target.module(input_of(layer)).square().sum().backward()
        seen.add(ranks_with_gradients(layer))
    assert seen == {(0, 1), (2, 3), (4, 5)}


def test_the_ranks_behind_the_drawn_slice_do_not_compute(layer, trained):
    x = input_of(layer)
    before = layer.update_of_first(x, 2, 4)
    with torch.no_grad():
        layer.lora_down.weight[4:] = 7.0
        layer.lora_up.weight[:, 4:] = 7.0
    assert torch.equal(layer.update_of_first(x, 2, 4), before)


@pytest.mark.parametrize("end", [2, 4, 6])
def test_a_file_cut_to_its_first_ranks_computes_as_they_did_in_training(layer, end, target):
    x = input_of(layer)
    cut = lora.create_network_from_weights(
        1.0,
        None,
        None,
        None,
        None,
        {
            "lora_unet_x.lora_down.weight": layer.lora_down.weight.detach()[:end],
            "lora_unet_x.lora_up.weight": layer.lora_up.weight.detach()[:, :end],
            "lora_unet_x.alpha": layer.alpha * math.sqrt(end / 6),
        },
        targets=[layer.target],
    )
    (stored,) = cut[0].layers
    stored.load_state_dict({name.partition(".")[2]: tensor for name, tensor in cut[1].items()})
    expected = layer.update_of_first(x, end - 2, end) * layer.scale
    torch.testing.assert_close(stored.lora_up(stored.lora_down(x)) * stored.scale, expected)


def test_outside_training_all_ranks_compute_and_nothing_is_drawn(layer):
    x = input_of(layer)
    layer.eval()
    state = torch.get_rng_state()
    update = layer.target.module(x) - layer._base_forward(x)
    assert torch.equal(torch.get_rng_state(), state)
    expected = layer.lora_up(layer.lora_down(x)) * 0.5
    torch.testing.assert_close(update, expected, atol=1e-6, rtol=1e-5)


def test_the_same_seed_draws_the_same_slices(small, trained):
    x = torch.randn(2, 8, 4, 4)
    network = make(small)
    trained(network)
    outputs = []
    with network.attached():
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            outputs.append(small(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_checkpointed_blocks_get_the_same_gradients(small, trained, gradients):
    network = make(small)
    trained(network)
    plain, recomputed = (gradients(network, is_checkpointed=each) for each in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_step_reads_no_value_off_the_device(small):
    network = make(small, conv_dim="2", dropout="0.1", module_dropout="0.1").to("meta")
    small.to("meta")
    with network.attached():
        small(torch.empty(2, 8, 4, 4, device="meta")).square().mean().backward()


def test_training_lowers_the_loss(small):
    torch.manual_seed(0)
    x, wanted = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4)
    network = make(small)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-2)
    optimizer = torch.optim.AdamW(groups)

    def loss():
        return (small(x) - wanted).square().mean()

    with network.attached():
        before = float(loss().detach())
        for _ in range(25):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        network.eval()
        assert float(loss().detach()) < 0.9 * before


def test_saved_and_loaded_weights_give_the_same_output_in_a_plain_lora_too(small, trained, tmp_path):
    x = torch.randn(2, 8, 4, 4)
    network = make(small, conv_dim="2")
    trained(network)
    with network.eval().attached():
        expected = small(x)
    path = tmp_path / "a.safetensors"
    network.save_weights(path, None, {})
    for module in (dylora, lora):
        loaded, _ = module.create_network_from_weights(1.0, path, None, None, None, targets=small.targets())
        loaded.load_weights(path)
        with loaded.eval().attached():
            assert torch.equal(small(x), expected)


def test_merging_equals_the_forward(small, trained):
    x = torch.randn(2, 8, 4, 4)
    network = make(small, conv_dim="2")
    trained(network)
    with network.eval().attached():
        expected = small(x)
    network.merge_to(None, None, network.state_dict())
    torch.testing.assert_close(small(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "3"}, "unit=3 does not divide --network_dim, which is 4"),
        ({"unit": "2", "conv_dim": "3"}, "unit=2 does not divide conv_dim, which is 3"),
        ({"unit": "0"}, "unit must be at least 1"),
        ({"unit": "x"}, "unit must be a whole number"),
        ({"rank_dropout": "0.1"}, "leaving out ranks is what it does in every step"),
        ({"units": "2"}, r"Did you mean unit\?"),
    ],
)
def test_wrong_arguments_are_refused_before_there_is_a_model(arguments, message):
    with pytest.raises(OptionError, match=message):
        dylora.check_arguments(4, 1.0, None, arguments)


def test_a_unit_that_does_not_divide_a_files_rank_is_refused_by_name(small):
    tensors = make(small, dim=3).state_dict()
    with pytest.raises(OptionError, match=r"unit=2 does not divide the rank of lora_te_.*, which is 3"):
        dylora.create_network_from_weights(1.0, None, None, None, None, tensors, targets=small.targets(), unit="2")
