import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.models import lora_targets
from library.models.family import Absent
from networks import dylora, lora, lora_fa, lora_sd3, oft, plugin
from tests.networks.sd3_parts import narrow, narrow_targets

UNET = "lora_unet_"
TYPE_DIMS = {
    "context_attn_dim": "2",
    "context_mlp_dim": "3",
    "context_mod_dim": "4",
    "x_attn_dim": "5",
    "x_mlp_dim": "6",
    "x_mod_dim": "7",
}


@pytest.fixture(scope="module")
def targets():
    return narrow_targets()


@pytest.fixture
def make(targets):
    """Make a network of rank 4 and alpha 1 on a narrow SD3 of three blocks."""

    def of(module=lora_sd3, chosen=None, dim=4, **arguments):
        return module.create_network(
            1.0, dim, 1.0, None, None, None, targets=targets if chosen is None else chosen, **arguments
        )

    return of


def ranks(network, part=""):
    return {
        layer.target.name.removeprefix(UNET): layer.rank
        for layer in network.layers
        if layer.target.group == "unet" and part in layer.target.name
    }


def test_the_guides_example_of_ranks_by_kind_of_layer(make):
    found = ranks(make(**TYPE_DIMS))
    assert {name: rank for name, rank in found.items() if name.startswith("joint_blocks_0_")} == {
        "joint_blocks_0_context_block_attn_qkv": 2,
        "joint_blocks_0_context_block_attn_proj": 2,
        "joint_blocks_0_context_block_mlp_fc1": 3,
        "joint_blocks_0_context_block_mlp_fc2": 3,
        "joint_blocks_0_context_block_adaLN_modulation_1": 4,
        "joint_blocks_0_x_block_attn_qkv": 5,
        "joint_blocks_0_x_block_attn_proj": 5,
        "joint_blocks_0_x_block_attn2_qkv": 5,
        "joint_blocks_0_x_block_attn2_proj": 5,
        "joint_blocks_0_x_block_mlp_fc1": 6,
        "joint_blocks_0_x_block_mlp_fc2": 6,
        "joint_blocks_0_x_block_adaLN_modulation_1": 7,
    }


def test_alpha_stays_that_of_the_network_where_ranks_differ(make):
    assert {float(layer.alpha) for layer in make(**TYPE_DIMS).layers} == {1.0}


def test_a_rank_of_zero_leaves_the_layers_out_and_the_others_keep_network_dim(make):
    found = ranks(make(context_mlp_dim="0", x_mod_dim="0"))
    assert not any("context_block_mlp" in name or "x_block_adaLN" in name for name in found)
    assert set(found.values()) == {4}


@pytest.mark.parametrize("text", ["[2,3,4,5,6,7]", "2,3,4,5,6,7", " [2, 3, 4, 5, 6, 7] "])
def test_the_guides_example_of_ranks_outside_the_blocks(make, text):
    found = {name: rank for name, rank in ranks(make(emb_dims=text)).items() if not name.startswith("joint")}
    assert found == {
        "context_embedder": 2,
        "t_embedder_mlp_0": 3,
        "t_embedder_mlp_2": 3,
        "x_embedder_proj": 4,
        "y_embedder_mlp_0": 5,
        "y_embedder_mlp_2": 5,
        "final_layer_adaLN_modulation_1": 6,
        "final_layer_linear": 7,
    }


def test_conv_dim_and_conv_alpha_are_those_of_the_patch_convolution(make):
    network = make(emb_dims="4,4,4,4,4,4", conv_dim="2", conv_alpha="3")
    conv = next(layer for layer in network.layers if layer.target.name.endswith("x_embedder_proj"))
    assert (conv.rank, float(conv.alpha)) == (2, 3.0)
    assert ranks(make(emb_dims="4,4,0,4,4,4", conv_dim="2"), "x_embedder") == {}


def test_conv_dim_without_the_patch_convolution_is_said_to_have_no_effect(make, caplog):
    make(conv_dim="2")
    assert "conv_dim has no effect" in caplog.text


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("all", {0, 1, 2}),
        ("1", {1}),
        ("0,2", {0, 2}),
        ("1-2", {1, 2}),
        ("0, 1-2", {0, 1, 2}),
        ("none", set()),
        ("", set()),
    ],
)
def test_the_blocks_of_train_block_indices_are_adapted_and_no_others(make, text, blocks):
    network = make(train_block_indices=text, emb_dims="[1,1,1,1,1,1]")
    assert {layer.target.block for layer in network.layers if "joint" in layer.target.name} == blocks
    assert len(ranks(network)) - len(ranks(network, "joint_blocks")) == 8  # outside the blocks nothing changes


@pytest.mark.parametrize("text", ["1,2,6-8", "0,1,5,8", "0,1,4-5,7"])
def test_the_guides_examples_of_block_indices(text):
    chosen = narrow_targets(num_blocks=9)
    network = lora_sd3.create_network(1.0, 4, 1.0, None, None, None, targets=chosen, train_block_indices=text)
    wanted = {"1,2,6-8": {1, 2, 6, 7, 8}, "0,1,5,8": {0, 1, 5, 8}, "0,1,4-5,7": {0, 1, 4, 5, 7}}[text]
    assert {layer.target.block for layer in network.layers if layer.target.group == "unet"} == wanted


def test_a_block_that_the_model_does_not_have_is_refused(make):
    with pytest.raises(OptionError, match="names block 3, the model has 3 blocks, 0 to 2"):
        make(train_block_indices="1-5")


def test_t5_is_adapted_only_when_asked_for(make):
    assert not any("lora_te3" in layer.target.name for layer in make().layers)
    network = make(train_t5xxl="True")
    assert len([layer for layer in network.layers if "lora_te3" in layer.target.name]) == 7
    assert (network.train_t5xxl, make().train_t5xxl) == (True, False)


def test_a_t5_that_is_not_there_cannot_be_trained():
    text_encoders, denoiser = narrow()
    chosen = tuple(lora_targets.of([*text_encoders[:2], Absent()], denoiser))
    with pytest.raises(OptionError, match=r"the model has no T5\. Give its file with --t5xxl"):
        lora_sd3.create_network(1.0, 4, 1.0, None, None, None, targets=chosen, train_t5xxl="True")


@pytest.mark.parametrize("value", ["true", "TRUE", True])
def test_switches_may_be_written_in_any_case(make, value):
    assert make(train_t5xxl=value).train_t5xxl


def test_verbose_names_every_layer_with_its_rank_and_alpha(make, caplog):
    with caplog.at_level("INFO"):
        network = make(**TYPE_DIMS, verbose="True")
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if ": rank " in line]) == len(network.layers)
    assert "lora_unet_joint_blocks_1_x_block_mlp_fc1: rank 6, alpha 1" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split_qkv": "1"}, 'split_qkv must be True or False, got "1"'),
        ({"train_t5xxl": "yes"}, 'train_t5xxl must be True or False, got "yes"'),
        ({"verbose": ""}, 'verbose must be True or False, got ""'),
        ({"x_attn_dim": "-1"}, "x_attn_dim must not be negative, got -1. 0 leaves these layers out"),
        ({"x_attn_dim": "two"}, 'x_attn_dim must be a whole number, got "two"'),
        ({"emb_dims": "[1,2,3]"}, r'emb_dims must be 6 whole numbers .* got "\[1,2,3\]"'),
        ({"emb_dims": "[1,2,3,4,5,x]"}, "emb_dims must be 6 whole numbers"),
        ({"emb_dims": "[1,2,3,4,5,-6]"}, "emb_dims must be 6 whole numbers from 0 on"),
        ({"train_block_indices": "1;2"}, 'block numbers and ranges like 0,3-5, got "1;2"'),
        ({"train_block_indices": "al"}, "Did you mean all"),
        ({"train_block_indices": "5-3"}, "has the range 5-3, whose end lies before its start"),
        ({"block_dims": "1,2"}, 'cannot have "block_dims": .*context_attn_dim.*train_block_indices'),
        ({"down_lr_weight": "sine"}, 'cannot have "down_lr_weight": all blocks of SD3 learn at one rate'),
        ({"x_attn_dims": "4"}, r'has no "x_attn_dims"\. Did you mean x_attn_dim\?'),
        ({"rank_dropout": "1"}, r"rank_dropout must be in \[0, 1\)"),
    ],
)
def test_a_wrong_value_is_refused_before_there_is_a_model(arguments, message):
    module = plugin.load("networks.lora_sd3")
    with pytest.raises(OptionError, match=message):
        plugin.check_arguments(module, 4, 1.0, None, arguments)


@pytest.mark.parametrize("module", [lora, lora_fa, dylora, oft])
@pytest.mark.parametrize("key", ["x_attn_dim", "emb_dims", "train_block_indices", "split_qkv", "train_t5xxl"])
def test_other_modules_say_whose_argument_it_is(module, key):
    with pytest.raises(OptionError, match=f'cannot have "{key}": it is of networks.lora_sd3'):
        module.check_arguments(4, 1.0, None, {key: "1"})


def test_a_model_without_joint_blocks_is_refused(small):
    with pytest.raises(OptionError, match=r"lora_sd3 is for Stable Diffusion 3.*Use networks\.lora\."):
        lora_sd3.create_network(1.0, 4, 1.0, None, None, None, targets=small.targets())


@pytest.mark.parametrize("module", [lora, lora_fa, dylora])
def test_other_loras_adapt_the_blocks_and_clip(make, module):
    names = [layer.target.name for layer in make(module).layers]
    assert names == [layer.target.name for layer in make().layers]


def test_lists_by_block_are_refused_by_the_other_loras(make):
    with pytest.raises(OptionError, match="no numbered blocks, so block_dims cannot be set"):
        make(lora, block_dims="1,2")


def test_rotations_are_refused(make):
    with pytest.raises(OptionError, match=r"networks\.oft is for U-Nets.*Use networks\.lora_sd3"):
        make(oft)


def test_each_text_encoder_has_its_own_rate_and_name(make):
    network = make(train_t5xxl="True")
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 2e-4, 3e-4], 4e-4, 5e-4)
    assert names == ["textencoder 1", "textencoder 2", "textencoder 3", "unet"]
    assert [group["lr"] for group in groups] == [1e-4, 2e-4, 3e-4, 4e-4]
    assert [len(group["params"]) // 2 for group in groups] == [6, 6, 7, len(ranks(network))]


@pytest.mark.parametrize(
    ("given", "rates"),
    [(None, [5e-4] * 3), ([1e-4], [1e-4] * 3), ([1e-4, 2e-4], [1e-4, 2e-4, 2e-4])],
)
def test_a_text_encoder_without_a_rate_of_its_own_has_the_last_of_them(make, given, rates):
    groups, names = make(train_t5xxl="True").prepare_optimizer_params_with_multiple_te_lrs(given, None, 5e-4)
    assert [group["lr"] for group in groups] == [*rates, 5e-4]
    assert len(names) == 4


def test_loraplus_makes_two_groups_of_each(make):
    network = make(loraplus_lr_ratio="2", loraplus_unet_lr_ratio="3")
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert rates == {
        "textencoder 1": 1e-3,
        "textencoder 1 plus": 2e-3,
        "textencoder 2": 1e-3,
        "textencoder 2 plus": 2e-3,
        "unet": 1e-3,
        "unet plus": 3e-3,
    }


def test_a_missing_text_encoder_leaves_the_others_their_names():
    text_encoders, denoiser = narrow()
    found = lora_targets.of([Absent(), text_encoders[1], Absent()], denoiser)
    assert {target.name[:8] for target in found if target.group == "text_encoder"} == {"lora_te2"}


def test_the_layers_of_transformers_t5_are_found():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=2, vocab_size=16, feed_forward_proj="gated-gelu"
    )
    found = list(lora_targets.of_t5(T5EncoderModel(config), "lora_te3", 2))
    assert [target.name for target in found[:7]] == [
        *(f"lora_te3_encoder_block_0_layer_0_SelfAttention_{part}" for part in "qkvo"),
        *(f"lora_te3_encoder_block_0_layer_1_DenseReluDense_{part}" for part in ("wi_0", "wi_1", "wo")),
    ]
    assert len(found) == 14
    assert all(isinstance(target.module, nn.Linear) and target.encoder == 2 for target in found)


@pytest.mark.parametrize("module", [lora_sd3, lora])
def test_a_network_from_weights_has_what_the_file_has(make, trained, targets, module, caplog):
    network = make(**TYPE_DIMS, emb_dims="1,2,3,4,5,6", train_t5xxl="True", train_block_indices="1-2")
    trained(network)
    tensors = network.state_dict()
    again, _ = module.create_network_from_weights(1.0, None, None, None, None, weights_sd=tensors, targets=targets)
    assert {name: t.shape for name, t in again.state_dict().items()} == {name: t.shape for name, t in tensors.items()}
    assert caplog.text == ""


def test_arguments_that_a_file_decides_are_named(make, targets, caplog):
    tensors = make().state_dict()
    lora_sd3.create_network_from_weights(
        1.0, None, None, None, None, weights_sd=tensors, targets=targets, **TYPE_DIMS, train_t5xxl="True"
    )
    assert "x_mod_dim" in caplog.text
    assert "train_t5xxl not used" in caplog.text


def test_base_weights_change_the_model_as_the_network_did(make, trained):
    text_encoders, denoiser = narrow()
    chosen = tuple(lora_targets.of(text_encoders, denoiser))
    network = make(chosen=chosen, emb_dims="2,2,2,2,2,2", split_qkv="True", train_t5xxl="True")
    trained(network)
    inputs = {t.name: torch.randn(2, *t.module.weight.shape[1:]) for t in chosen}
    with network.attached():
        wanted = {t.name: t.module(inputs[t.name]) for t in chosen}
    tensors = network.state_dict()
    base, _ = lora_sd3.create_network_from_weights(1.0, None, None, None, None, weights_sd=tensors, targets=chosen)
    base.merge_to(None, None, tensors)
    for each in chosen:
        torch.testing.assert_close(each.module(inputs[each.name]), wanted[each.name], atol=2e-6, rtol=1e-4)
