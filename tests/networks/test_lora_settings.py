import math

import pytest

from library.errors import OptionError
from networks import lora

FULL = ",".join(["1"] * 12)


def make(small, **arguments):
    return lora.create_network(1.0, 4, 1.0, None, None, None, targets=small.targets(), **arguments)


def groups_of(network, text_encoder_lr=None, unet_lr=None, default_lr=1e-4):
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)
    return dict(zip(names, groups, strict=True))


def ranks(network):
    return {layer.target.block: layer.rank for layer in network.layers if "proj_in" in layer.target.name}


def test_block_dims_set_ranks_of_the_unet_only(small):
    network = make(small, block_dims=",".join(str(2 + i % 3) for i in range(25)))
    assert ranks(network) == {i: 2 + i % 3 for i in range(1, 25)}
    assert {layer.rank for layer in network.layers if layer.target.group == "text_encoder"} == {4}


def test_a_block_dim_of_zero_leaves_the_block_out(small):
    assert 7 not in ranks(make(small, block_dims=",".join("0" if i == 7 else "4" for i in range(25))))


def test_block_alphas_default_to_network_alpha_and_can_be_given(small):
    dims = ",".join(["4"] * 25)
    assert {layer.scale for layer in make(small, block_dims=dims).layers} == {0.25}
    network = make(small, block_dims=dims, block_alphas=",".join(["2"] * 25))
    assert {layer.scale for layer in network.layers if layer.target.group == "unet"} == {0.5}


def test_conv_block_dims_default_to_conv_dim_and_need_none(small):
    given = ",".join(["3"] * 25)
    for arguments in ({"conv_block_dims": given}, {"conv_dim": "3", "block_dims": ",".join(["4"] * 25)}):
        network = make(small, **arguments)
        convs = [layer for layer in network.layers if layer.target.kind == "resnet"]
        assert [layer.rank for layer in convs] == [3] * 24
        assert {layer.scale for layer in convs} == {1 / 3}


@pytest.mark.parametrize("key", ["block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"])
def test_a_list_of_the_wrong_length_is_refused(small, key):
    with pytest.raises(OptionError, match=rf"{key} must have 25 entries, one per block, got 24"):
        make(small, conv_dim="4", **{key: ",".join(["4"] * 24)})


def test_an_unknown_argument_is_refused_with_the_nearest(small):
    with pytest.raises(OptionError, match=r'no "conv_dims"\. Did you mean conv_dim\?'):
        make(small, conv_dims="4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_dim": "4.5"}, 'conv_dim must be a whole number, got "4.5"'),
        ({"conv_dim": "0"}, "conv_dim must be at least 1"),
        ({"conv_alpha": "1"}, "conv_alpha needs conv_dim"),
        ({"rank_dropout": "1.5"}, r"rank_dropout must be in \[0, 1\), got 1.5"),
        ({"module_dropout": "some"}, 'module_dropout must be a number, got "some"'),
        ({"down_lr_weight": "sin"}, r"sine, cosine.*Did you mean sine\?"),
        ({"down_lr_weight": "sine+x"}, "offset of a preset must be a number"),
        ({"block_lr_zero_threshold": "0.1"}, "block_lr_zero_threshold needs one of"),
        ({"block_dims": ",".join(["-1"] * 25)}, "block_dims must not be negative"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(small, arguments, message):
    with pytest.raises(OptionError, match=message):
        make(small, **arguments)


def test_two_different_neuron_dropouts_are_refused(small):
    with pytest.raises(OptionError, match="disagree"):
        lora.create_network(1.0, 4, 1.0, None, None, None, 0.1, targets=small.targets(), dropout="0.2")


def test_dropouts_reach_the_layers_as_strings_or_numbers(small):
    network = lora.create_network(
        1.0,
        4,
        1.0,
        None,
        None,
        None,
        0.1,
        targets=small.targets(),
        rank_dropout="0.2",
        module_dropout=0.3,
        dropout=None,
    )
    dropout = network.layers[0].dropout
    assert (dropout.neuron, dropout.rank, dropout.module) == (0.1, 0.2, 0.3)


def test_a_model_without_numbered_blocks_refuses_block_arguments(small, target):
    with pytest.raises(OptionError, match="no numbered blocks"):
        lora.create_network(
            1.0, 4, 1.0, None, None, None, targets=[target(small.text[0], "lora_unet_joint_blocks_0")], block_dims="1,2"
        )


def test_presets_run_from_the_first_block_to_the_last(small):
    expected = {
        "sine": lambda x: math.sin(math.pi / 2 * x),
        "cosine": lambda x: math.cos(math.pi / 2 * x),
        "linear": lambda x: x,
        "reverse_linear": lambda x: 1 - x,
        "zeros": lambda x: 0.0,
    }
    for name, shape in expected.items():
        weights = make(small, down_lr_weight=f"{name}+0.5").settings.lr_weights
        assert weights[:12] == pytest.approx([shape(i / 11) + 0.5 for i in range(12)])
        assert weights[12:] == (1.0,) * 13


def test_lr_weights_scale_each_blocks_rate(small):
    network = make(small, down_lr_weight="0.5,0.25" + ",1" * 10, mid_lr_weight="2", up_lr_weight=FULL)
    groups = groups_of(network, text_encoder_lr=[5e-5], unet_lr=1e-3)
    assert list(groups) == ["textencoder", *(f"unet_block{i}" for i in range(1, 25))]
    assert groups["textencoder"]["lr"] == 5e-5
    assert [groups[f"unet_block{i}"]["lr"] for i in (1, 2, 12, 13)] == pytest.approx([2.5e-4, 1e-3, 2e-3, 1e-3])


def test_a_weight_of_zero_or_up_to_the_threshold_removes_the_block(small):
    network = make(small, down_lr_weight="0,0.1,," + ",".join(["1"] * 9), block_lr_zero_threshold="0.1")
    assert sorted(ranks(network)) == list(range(3, 25))  # block 0 has no modules, 1 and 2 are removed


def test_short_lr_weights_are_padded_with_one_and_long_ones_cut(small, caplog):
    weights = make(small, down_lr_weight="0.5,0.5", up_lr_weight=f"{FULL},7").settings.lr_weights
    assert weights == (0.5, 0.5, *(1.0,) * 23)
    assert ["others get 1" in caplog.messages[0], "last are ignored" in caplog.messages[1]] == [True, True]


def test_the_sdxl_layout_has_23_blocks_whose_ends_have_no_weight(target, small):
    targets = [target(layer, f"lora_unet_input_blocks_{i}_0", block=i + 1) for i, layer in enumerate(small.linears[:9])]
    network = lora.create_network(
        1.0, 4, 1.0, None, None, None, targets=targets, up_lr_weight="zeros", mid_lr_weight="2,2,2"
    )
    assert network.settings.lr_weights == (*(1.0,) * 10, *(2.0,) * 3, *(0.0,) * 9, 1.0)


def test_groups_stand_in_the_order_text_encoder_unet(small):
    groups = groups_of(make(small), text_encoder_lr=None, unet_lr=2e-4)
    assert {name: group["lr"] for name, group in groups.items()} == {"textencoder": 1e-4, "unet": 2e-4}


def test_of_several_text_encoder_rates_the_first_counts(small):
    assert groups_of(make(small), text_encoder_lr=[3e-5, 4e-5])["textencoder"]["lr"] == 3e-5


def test_lora_plus_gives_up_weights_their_own_groups(small):
    network = make(small, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16")
    groups = groups_of(network)
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"textencoder": 1e-4, "textencoder plus": 4e-4, "unet": 1e-4, "unet plus": 1.6e-3}
    )
    ups = {id(layer.lora_up.weight) for layer in network.layers if layer.target.group == "unet"}
    assert {id(parameter) for parameter in groups["unet plus"]["params"]} == ups


def test_lora_plus_goes_together_with_block_weights(small):
    names = list(groups_of(make(small, mid_lr_weight="1", loraplus_unet_lr_ratio="2")))
    assert names[:4] == ["textencoder", "unet_block1", "unet_block1 plus", "unet_block2"]


def test_every_trained_weight_is_in_exactly_one_group(small):
    network = make(small, conv_dim="2", mid_lr_weight="1", loraplus_lr_ratio="2")
    grouped = [id(parameter) for group in groups_of(network).values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())


def test_a_rate_of_zero_takes_the_weights_out_of_clipping_but_not_out_of_the_file(small):
    network = make(small)
    groups = groups_of(network, text_encoder_lr=[0.0])
    network.prepare_grad_etc(None, None)
    assert list(groups) == ["unet"]
    frozen = [layer for layer in network.layers if layer.target.group == "text_encoder"]
    assert not any(parameter.requires_grad for layer in frozen for parameter in layer.parameters())
    assert len(network.get_trainable_params()) == len(groups["unet"]["params"])
    assert f"{frozen[0].target.name}.lora_up.weight" in network.state_dict()


def test_no_rate_at_all_is_refused(small):
    with pytest.raises(OptionError, match="nothing is trained"):
        groups_of(make(small), default_lr=0.0)
