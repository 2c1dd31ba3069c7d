import sys
import types

import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.models import lora_targets
from library.models.sd import Sd
from networks import plugin
from networks.network import LoraNetwork


@pytest.fixture(scope="module")
def models():
    import tiny_models

    parts = Sd().load(str(tiny_models.tiny_sd15()), None, torch.float32)
    targets = tuple(lora_targets.of(parts.text_encoders, parts.denoiser))
    return plugin.Models(parts.text_encoders, parts.denoiser, parts.vae, targets)


def output(models):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    text = models.text_encoders[0](torch.arange(77)[None]).last_hidden_state
    return models.unet(latents, torch.tensor([500]), text).sample


class ForeignNetwork(nn.Module):
    """A third party's network on one module: an offset of its output, with the oldest form of the face."""

    def __init__(self, unet):
        super().__init__()
        self.offset, self.unused = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.steps = 0

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        unet.conv_out.register_forward_hook(lambda module, inputs, y: y + self.offset)

    def load_weights(self, file):
        self.load_state_dict(torch.load(file, weights_only=True))

    def save_weights(self, file, dtype, metadata):
        metadata["mine"] = "1"
        torch.save(self.state_dict(), file)

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def get_trainable_params(self):
        return self.parameters()

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        return [{"params": {"offset": self.offset}.values(), "lr": unet_lr}]

    def on_step_start(self, text_encoder, unet):
        self.steps += 1

    def weight_norms(self):
        return torch.tensor([1.0, 3.0])


@pytest.fixture
def foreign(monkeypatch):
    """A third-party module that does not know of targets."""
    module = types.ModuleType("foreign_network")
    module.asked = {}

    def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **kwargs):
        module.asked = {"text_encoder": text_encoder, **kwargs}
        return None if kwargs.get("nothing") else ForeignNetwork(unet)

    module.create_network = create_network
    monkeypatch.setitem(sys.modules, "foreign_network", module)
    return module


def test_our_own_module_gets_the_familys_targets(models):
    network = plugin.create(plugin.load("networks.lora"), models, 4, 1.0, 0.1, {"conv_dim": "2"})
    assert isinstance(network, LoraNetwork)
    assert len(network.layers) == len(models.targets)
    assert network.layers[0].dropout.neuron == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("networks.dylore", r"Did you mean networks\.dylora\?"),
        ("networks.lorra", r"there is no such module\. Did you mean networks\.lora\?"),
        ("lycoris_kohya", r"Did you mean lycoris\.kohya\?"),
        ("something.else.entirely", r"Known: networks\.lora, networks\.lora_fa, .*lycoris\.kohya"),
        ("", "is not a module name"),
        ("json", "has no create_network"),
    ],
)
def test_a_wrong_module_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(OptionError, match=message):
        plugin.load(name)


def test_a_module_that_lacks_a_package_says_which(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError, match="it needs a_package_that_is_not_there, which is not installed"):
        plugin.load("needs_more")


def test_a_foreign_module_gets_strings_dropout_under_both_names_and_no_targets(models, foreign):
    plugin.create(plugin.load("foreign_network"), models, 4, 1.0, 0.1, {"algo": "x"})
    asked = {key: value for key, value in foreign.asked.items() if key != "text_encoder"}
    assert asked == {"algo": "x", "dropout": 0.1, "neuron_dropout": 0.1}


def test_a_foreign_module_sees_text_encoder_paths_as_files_name_them(models, foreign):
    plugin.create(foreign, models, 4, 1.0, None, {})
    paths = dict(foreign.asked["text_encoder"].named_modules())
    assert isinstance(paths["text_model.encoder.layers.0.self_attn.q_proj"], nn.Linear)


def test_a_module_that_makes_no_network_is_refused(models, foreign):
    with pytest.raises(OptionError, match="foreign_network: made no network"):
        plugin.create(foreign, models, 4, 1.0, None, {"nothing": "1"})


def test_the_oldest_signature_is_understood_and_what_is_in_no_group_is_not_clipped(models, foreign):
    network = plugin.create(foreign, models, 4, 1.0, None, {})
    made = plugin.optimizer_groups(network, [1e-5, 2e-5], 1e-3, 1e-4)
    assert made.groups == [{"params": [network.offset], "lr": 1e-3}]
    assert made.descriptions == ["group0"]
    plugin.prepare_gradients(network, models)
    assert plugin.trainable_parameters(network) == [network.offset]


def test_a_type_error_inside_a_foreign_network_is_not_hidden(models, foreign):
    network = plugin.create(foreign, models, 4, 1.0, None, {})
    network.prepare_optimizer_params = lambda te, unet, default: te + "x"
    with pytest.raises(TypeError):
        plugin.optimizer_groups(network, [1e-5], 1e-3, 1e-4)


def test_optional_hooks_are_called_where_they_exist(models, foreign):
    network = plugin.create(foreign, models, 4, 1.0, None, {})
    plugin.start_step(network, models)
    assert network.steps == 1
    assert plugin.measure_norms(network) == {"norm/avg_key_norm": 2.0}
    assert plugin.measure_norms(plugin.create(plugin.load("networks.lora"), models, 4, 1.0, None, {})) == {}


def test_what_a_network_cannot_do_is_refused_by_option(models, foreign):
    network = plugin.create(foreign, models, 4, 1.0, None, {})
    with pytest.raises(OptionError, match="--scale_weight_norms"):
        plugin.limit_norms(network, 1.0, torch.device("cpu"))
    with pytest.raises(OptionError, match="--base_weights"):
        plugin.merge(network, models, {}, None)
    with pytest.raises(OptionError, match="cannot take its ranks from a file"):
        plugin.create_from_weights(foreign, models, "a.safetensors", {})


def test_saving_a_foreign_network_is_all_or_nothing_and_leaves_our_metadata_alone(models, foreign, tmp_path):
    network = plugin.create(foreign, models, 4, 1.0, None, {})
    metadata = {"ss_seed": "1"}
    plugin.save(network, tmp_path / "a.pt", None, metadata)
    network.save_weights = lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        plugin.save(network, tmp_path / "a.pt", None, metadata)
    assert metadata == {"ss_seed": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    network.load_weights(tmp_path / "a.pt")


def test_norms_are_limited_under_the_names_of_the_logs(models):
    network = plugin.create(plugin.load("networks.lora"), models, 4, 1.0, None, {})
    assert list(plugin.limit_norms(network, 1.0, torch.device("cpu"))) == [
        "max_norm/keys_scaled",
        "norm/avg_key_norm",
        "max_norm/max_key_norm",
    ]


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
@pytest.mark.filterwarnings("ignore")  # LyCORIS' own
def test_a_lycoris_network_trains_a_step_and_is_saved(algo, models, tmp_path):
    pytest.importorskip("lycoris.kohya", reason="lycoris-lora is an option")
    from safetensors.torch import load_file

    module = plugin.load("lycoris.kohya")
    arguments = {"algo": algo, "conv_dim": "4", "conv_alpha": "1", "preset": "attn-mlp", "factor": "2"}
    network = plugin.create(module, models, 4, 1.0, None, arguments)
    plain = output(models)
    plugin.apply(network, models, True, True)
    plugin.start_epoch(network, models)
    made = plugin.optimizer_groups(network, [1e-3], None, 1e-2)
    plugin.prepare_gradients(network, models)
    optimizer = torch.optim.AdamW(made.groups)
    for _ in range(2):
        plugin.start_step(network, models)
        output(models).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(plugin.trainable_parameters(network), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(output(models), plain)
    assert [group["lr"] for group in made.groups] == [1e-3, 1e-2]
    plugin.save(network, tmp_path / "a.safetensors", torch.float16, {"ss_network_module": "lycoris.kohya"})
    names = load_file(tmp_path / "a.safetensors")
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in names)
    assert any(name.startswith("lora_unet_down_blocks_0_attentions_0_") for name in names)
    network.restore()


@pytest.mark.filterwarnings("ignore")  # LyCORIS' own
def test_what_lycoris_cannot_make_is_one_line(models):
    pytest.importorskip("lycoris.kohya", reason="lycoris-lora is an option")
    with pytest.raises(OptionError, match=r"lycoris.kohya makes no network of this: .*Check --network_args algo=lohaa"):
        plugin.create(plugin.load("lycoris.kohya"), models, 4, 1.0, None, {"algo": "lohaa"})


@pytest.mark.parametrize("preset", [{}, {"preset": "full-lin"}])
@pytest.mark.filterwarnings("ignore")  # LyCORIS' own
def test_the_default_preset_of_lycoris_adapts_each_layer_once(preset, models):
    pytest.importorskip("lycoris.kohya", reason="lycoris-lora is an option")
    module = plugin.load("lycoris.kohya")
    network = plugin.create(module, models, 4, 1.0, None, {"algo": "lora", **preset})
    names = [adapter.lora_name for adapter in network.unet_loras]
    assert len(names) == len(set(names))
    assert "lora_unet_time_embedding_linear_1" in names


@pytest.mark.parametrize("name", ["networks.lora", "networks.lora_fa", "networks.dylora", "networks.oft"])
def test_a_network_that_is_switched_off_leaves_the_output_as_it_was_for_that_time(models, name):
    original = output(models)
    network = plugin.create(plugin.load(name), models, 4, 1.0, None, {}, multiplier=0.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.linspace(-0.1, 0.3, parameter.numel()).view_as(parameter))
    with network.attached():
        changed = output(models)
        with plugin.switched_off(network):
            assert torch.equal(output(models), original)
        assert network.multiplier == 0.5
        network.eval()
        assert not torch.equal(output(models), original)
    assert not torch.equal(changed, original)


def test_a_network_that_cannot_be_switched_off_is_refused(models):
    with (
        pytest.raises(OptionError, match=r"mask_prior_weight: ForeignNetwork cannot be switched off"),
        plugin.switched_off(ForeignNetwork(models.unet)),
    ):
        pass
