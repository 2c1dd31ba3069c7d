import pytest
import torch
from torch import nn

from networks.adapter import is_skipped
from networks.layers import Dropout, LoraLayer, rank_scales

CASES = [
    "dim4_alpha1.0_mult1",
    "dim4_alpha4.0_mult0.5",
    "dim3_alpha2.0_mult-0.3",
    "dim8_alphaNone_mult1",
    "dim8_alpha0_mult1",
]
KINDS = ["linear", "linear3d", "conv1x1", "conv3x3", "conv3x3_s2"]


@pytest.fixture(scope="module")
def cases(read_json):
    return {case["key"]: case for case in read_json("lora_forward.json.gz")["cases"]}


@pytest.fixture
def build(reference, target):
    """Make a layer on a base module, both with the reference's weights."""

    def make(key, rank, alpha=None, multiplier=1.0, dropout=None, stride=1):
        weight, bias = reference[f"{key}/weight"], reference.get(f"{key}/bias")
        if weight.dim() == 2:
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            size = weight.shape[2]
            base = nn.Conv2d(weight.shape[1], weight.shape[0], size, stride, size // 2, bias=bias is not None)
        with torch.no_grad():
            base.weight.copy_(weight)
            if bias is not None:
                base.bias.copy_(bias)
            layer = LoraLayer(target(base), rank, alpha, dropout or Dropout(), multiplier)
            layer.lora_down.weight.copy_(reference[f"{key}/down"])
            layer.lora_up.weight.copy_(reference[f"{key}/up"])
        return base, layer

    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_references(kind, case, cases, build, reference):
    facts = cases[f"{kind}/{case}"]
    stride = tuple(facts["stride"]) or 1
    base, layer = build(facts["key"], facts["dim"], facts["alpha_arg"], facts["multiplier"], stride=stride)
    layer.attach()
    torch.testing.assert_close(
        base(reference[f"{facts['key']}/x"]), reference[f"{facts['key']}/y_lora"], atol=2e-6, rtol=1e-5
    )
    assert layer.scale == pytest.approx(facts["scale"])
    assert float(layer.alpha) == facts["alpha_buffer"]


def test_a_new_layer_changes_nothing(target):
    base = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    before = base(x)
    LoraLayer(target(base), 2, 1.0, Dropout()).attach()
    assert torch.equal(base(x), before)


def test_down_starts_uniform_within_one_over_the_root_of_its_inputs(target, read_json):
    torch.manual_seed(0)
    facts = read_json("lora_forward.json.gz")["init"]
    for base, key in ((nn.Linear(320, 320), "linear320"), (nn.Conv2d(64, 64, 3), "conv64x3x3")):
        weight = LoraLayer(target(base), 64, 1.0, Dropout()).lora_down.weight.detach()
        bound = facts[key]["fan_in"] ** -0.5
        assert weight.abs().max() <= bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.03)


def test_the_base_module_keeps_its_names_and_its_weights(target):
    base = nn.Linear(6, 5)
    names = list(base.state_dict())
    layer = LoraLayer(target(base), 2, 1.0, Dropout())
    layer.attach()
    assert list(base.state_dict()) == names
    assert list(layer.state_dict()) == ["alpha", "lora_down.weight", "lora_up.weight"]


def test_detaching_restores_the_class_forward(target):
    base = nn.Linear(6, 5)
    layer = LoraLayer(target(base), 2, 1.0, Dropout())
    layer.attach()
    layer.detach()
    assert "forward" not in base.__dict__
    assert not layer.is_attached


def test_two_layers_on_one_module_add_up_and_come_off_again(target, trained):
    base = nn.Linear(6, 5).requires_grad_(False)
    first, second = (LoraLayer(target(base), 2, 1.0, Dropout()) for _ in range(2))
    trained(first)
    trained(second)
    x = torch.randn(3, 6)
    plain = base(x)
    first.attach()
    with_first = base(x)
    second.attach()
    both = base(x)
    second.detach()
    assert torch.equal(base(x), with_first)
    first.detach()
    assert torch.equal(base(x), plain)
    second.attach()
    torch.testing.assert_close(both - plain, (with_first - plain) + (base(x) - plain))


@pytest.mark.parametrize("kind", ["linear3d", "conv3x3"])
def test_rank_dropout_is_the_references(kind, build, reference, monkeypatch):
    key = f"dropout/{kind}/rank0.25"
    uniform = reference[f"{key}/uniform"]
    base, layer = build(key, uniform.shape[1], 4.0, dropout=Dropout(rank=0.25))
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: uniform.view(shape))  # the reference's draw
    layer.attach()
    torch.testing.assert_close(base(reference[f"{key}/x"]), reference[f"{key}/y_train"], atol=5e-6, rtol=1e-4)


def test_rank_scales_drop_what_is_drawn_low_and_keep_the_mean():
    assert rank_scales(torch.tensor([[0.1, 0.25, 0.3, 0.9]]), 0.25).tolist() == [
        [0, 0, pytest.approx(4 / 3), pytest.approx(4 / 3)]
    ]


@pytest.mark.parametrize("kind", ["linear3d", "conv3x3"])
def test_neuron_dropout_has_the_references_mean_and_spread(kind, build, reference):
    key = f"dropout/{kind}/neuron0.4"
    base, layer = build(key, reference[f"{key}/down"].shape[0], 4.0, dropout=Dropout(neuron=0.4))
    layer.attach()
    x = reference[f"{key}/x"]
    layer.eval()
    torch.testing.assert_close(base(x), reference[f"{key}/y_eval"], atol=5e-6, rtol=1e-4)
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = torch.stack([base(x) for _ in range(600)])
    assert float((outputs.mean(0) - reference[f"{key}/y_mean_600"]).abs().mean()) < 0.1 * float(outputs.std(0).mean())
    assert float(outputs.std(0).mean()) == pytest.approx(float(reference[f"{key}/y_std_600"].mean()), rel=0.03)


@pytest.mark.parametrize("kind", ["linear3d", "conv3x3"])
def test_module_dropout_skips_exactly_the_references_steps(kind, reference):
    key = f"dropout/{kind}/module0.5"
    skipped = [is_skipped(float(draw), 0.5) for draw in reference[f"{key}/uniform"]]
    assert skipped == reference[f"{key}/skipped"].tolist()


def test_module_dropout_leaves_the_base_output_for_a_whole_batch(target, trained):
    base = nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(3, 6)
    plain = base(x)
    layer = LoraLayer(target(base), 2, 1.0, Dropout(module=0.3))
    trained(layer)
    layer.attach()
    torch.manual_seed(1)
    share = sum(torch.equal(base(x), plain) for _ in range(1000)) / 1000
    assert share == pytest.approx(0.3, abs=0.05)


def test_nothing_is_dropped_in_evaluation(target, trained):
    base = nn.Linear(6, 5)
    layer = LoraLayer(target(base), 2, 1.0, Dropout(0.5, 0.5, 0.5)).eval()
    trained(layer)
    layer.attach()
    x = torch.randn(3, 6)
    assert torch.equal(base(x), base(x))


def test_at_multiplier_zero_the_output_is_the_bases_bit_for_bit(target, trained):
    base = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    plain = base(x)
    layer = LoraLayer(target(base), 2, 1.0, Dropout())
    trained(layer)
    layer.attach()
    layer.multiplier = 0.0
    assert torch.equal(base(x), plain)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(6, 5, 3, padding=1)])
def test_a_bfloat16_base_keeps_its_output_type_and_float32_weights_learn(make, target, trained):
    base = make().to(torch.bfloat16).requires_grad_(False)
    layer = LoraLayer(target(base), 2, 1.0, Dropout())
    trained(layer)
    layer.attach()
    x = torch.randn(2, 6, 4, 4) if isinstance(base, nn.Conv2d) else torch.randn(2, 6)
    y = base(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.lora_up.weight.grad.dtype == torch.float32
    assert layer.lora_up.weight.grad.abs().sum() > 0


def test_autocast_gives_its_type_and_leaves_the_base_bit_equal(target):
    base = nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        plain = base(x)
        layer = LoraLayer(target(base), 2, 1.0, Dropout())
        layer.attach()
        adapted = base(x)
    assert adapted.dtype == torch.bfloat16
    assert torch.equal(adapted, plain)
    adapted.float().sum().backward()
    assert layer.lora_up.weight.grad.dtype == torch.float32


def test_half_precision_lora_weights_work_on_a_half_precision_base(target, trained):
    base = nn.Linear(6, 5).to(torch.bfloat16)
    layer = LoraLayer(target(base), 2, 1.0, Dropout(neuron=0.1, rank=0.1)).to(torch.bfloat16)
    trained(layer)
    layer.attach()
    assert base(torch.randn(3, 7, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_loaded_alpha_changes_the_strength(target):
    layer = LoraLayer(target(nn.Linear(6, 5)), 4, 1.0, Dropout())
    layer.load_state_dict({**layer.state_dict(), "alpha": torch.tensor(8.0)})
    assert layer.scale == 2.0


def test_only_the_low_rank_weights_get_gradients(target, trained):
    base = nn.Linear(6, 5).requires_grad_(False)
    layer = LoraLayer(target(base), 2, 1.0, Dropout())
    trained(layer)
    layer.attach()
    base(torch.randn(3, 6)).square().sum().backward()
    assert base.weight.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
