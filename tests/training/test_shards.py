"""What FSDP shares out is put together, changed and shared out again."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from library.training import distribution, optimizers, shards


class Block(nn.Module):
    """Half of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, values):
        return self.inner(values)


class Model(nn.Module):
    """Two blocks, and a weight outside of them."""

    _no_split_modules = ("Block", "BlockOfAnotherModel")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, values):
        return self.blocks(values) * self.scale


@pytest.fixture
def group(tmp_path):
    """A group of one process: everything is shared out, to it."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.fixture
def model(group) -> Model:
    torch.manual_seed(0)
    made = Model()
    mesh = distributed.init_device_mesh("cpu", (1,))
    for module in (*made.blocks, made):
        fully_shard(module, mesh=mesh)
    return made


INPUT = torch.arange(8.0).view(2, 4)


def test_blocks_are_those_that_a_model_has_of_the_ones_it_names():
    assert distribution.blocks_of(nn.ModuleList([Model()])) == ["Block"]
    assert distribution.blocks_of(nn.ModuleList([nn.Linear(2, 2)])) == []


def test_inside_weights_are_whole_and_the_model_predicts_as_before(model):
    before = model(INPUT).detach()
    with torch.no_grad(), shards.whole_weights(model):
        assert not any(isinstance(weight, DTensor) for weight in model.parameters())
        assert torch.equal(model(INPUT), before)
        assert not any(isinstance(weight, DTensor) for weight in model.parameters()), "no hook puts its own in place"
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert isinstance(model.blocks[0], FSDPModule)
    model(INPUT).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_what_is_loaded_inside_is_kept(model):
    model(INPUT)
    with shards.whole_weights(model):
        loaded = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with shards.whole_weights(model, is_kept=True):
        model.load_state_dict(loaded)
    assert torch.equal(model(INPUT), torch.func.functional_call(Model(), loaded, INPUT))


def step(model, optimizer) -> None:
    model(INPUT).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_goes_on_from_its_whole_state(model):
    def made():
        return torch.optim.AdamW(model.parameters(), lr=0.1)

    first = made()
    step(model, first)
    state = shards.whole_state(first.state_dict(), is_wanted=True)
    assert not any(isinstance(value, DTensor) for kept in state["state"].values() for value in kept.values())
    assert state["state"][0]["exp_avg"].any()
    second = made()
    optimizers.load_state(second, shards.shared_state(second, state))
    again = shards.whole_state(second.state_dict(), is_wanted=True)["state"]
    assert all(torch.equal(kept[key], again[n][key]) for n, kept in state["state"].items() for key in kept)
    step(model, second)


def test_a_process_without_a_use_for_the_state_keeps_nothing_of_it(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    assert not any(shards.whole_state(optimizer.state_dict(), is_wanted=False)["state"].values())


def test_the_state_of_other_groups_is_refused(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="argument"):
        shards.shared_state(optimizer, {"state": {}, "param_groups": [{"params": [0]}]})


def test_whole_weights_leave_a_plain_module_alone():
    module = nn.Linear(2, 2)
    weight = module.weight
    with shards.whole_weights(module):
        assert module.weight is weight
    assert module.weight is weight
