"""Whole runs with the network modules beside networks.lora: trained, saved, merged, gone on from, refused."""

import pytest
from end_to_end.conftest import masks_and_alpha
from end_to_end.training_runs import arguments, differing

MODULES = {
    "networks.lora_fa": (("--network_dim", 4), ()),
    "networks.dylora": (("--network_dim", 4), ("unit=2", "conv_dim=4")),
    "networks.oft": (("--network_dim", 4, "--network_alpha", 0.01), ("enable_conv=true",)),
}
RESUMED = {"networks.dylora": ("unit=4",)}  # one slice, so that all ranks compute as they do when merged


@pytest.fixture(params=MODULES)
def module(request, family):
    """The name of each module in turn."""
    family.skip_unless_taken(request.param)
    return request.param


@pytest.fixture
def train_module(module, train, pictures, tmp_path):
    """Train with the module over masks and transparency."""
    sizes, own = MODULES[module]
    config = masks_and_alpha(tmp_path, pictures)

    def run(*more, own=own, **keywords):
        given = ("--network_args", *own) if own else ()
        return train(config, "--network_module", module, *sizes, *given, *more, **keywords)

    return run


def test_two_steps_train_a_file_that_a_second_run_merges_and_another_goes_on_from(module, train_module):
    first = train_module("--mixed_precision", "bf16", "--gradient_checkpointing", "--learning_rate", "1e-2")
    assert len(first.losses) == 2
    assert first.metadata["ss_network_module"] == module
    assert len(first.metadata["sshs_model_hash"]) == 64
    ends = (".lora_up.weight", ".oft_blocks")
    learnt = [bool(tensor.any()) for name, tensor in first.tensors.items() if name.endswith(ends)]
    assert sum(learnt) > 0.8 * len(learnt)  # where a picture is one token wide, queries and keys have no gradient

    once = ("--max_train_steps", 1)
    plain = train_module(*once, name="plain")
    merged = train_module(*once, "--base_weights", first.file, name="merged")
    resumed = train_module(
        *once, "--network_weights", first.file, "--dim_from_weights", own=RESUMED.get(module, ()), name="resumed"
    )
    assert list(resumed.tensors) == list(first.tensors)
    effect = merged.losses[0] - plain.losses[0]
    assert abs(effect) > 1e-4
    assert resumed.losses[0] == pytest.approx(merged.losses[0], abs=0.001 * abs(effect))


def test_the_same_seed_draws_the_same_slices_of_ranks(train, pictures, tmp_path):
    given = ("--network_module", "networks.dylora", "--network_args", "unit=1")
    once, twice = (train(masks_and_alpha(tmp_path, pictures), *given, name=name) for name in ("once", "twice"))
    assert differing(once.tensors, twice.tensors) == []


def test_a_misspelt_argument_ends_the_run_with_the_nearest(module, family, pictures, tmp_path, capsys):
    wrong, right = ("enable_conf", "enable_conv") if module == "networks.oft" else ("conv_dimm", "conv_dim")
    config = masks_and_alpha(tmp_path, pictures)
    more = ("--network_module", module, "--network_args", f"{wrong}=1")
    assert family.run(*arguments(family, tmp_path, config, *more)) != 0
    said = capsys.readouterr().err
    assert f'{module} has no "{wrong}". Did you mean {right}?' in said
