"""The example of difference training: a LoRA on top of a LoRA, with --base_weights and on a merged model."""

from pathlib import Path

import pytest
import torch
from end_to_end.training_runs import SD15, differing, metadata_of, tensors_of
from safetensors.torch import load_file

from examples.difference_training import run
from networks import merge_lora

NUM_STEPS = 2


def carry_out(command: list[str]) -> int:
    """Return the exit code of a command of the example, run in this process."""
    script, *argv = command
    return SD15.run(*argv) if script == "train_network.py" else merge_lora.main(argv)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder that the example leaves behind."""
    folder = tmp_path_factory.mktemp("difference")
    run.prepare(folder)
    for command in run.commands(SD15.checkpoint(), folder, NUM_STEPS):
        assert carry_out(command) == 0
    return folder


def test_both_ways_give_the_same_lora(output):
    one, other = (tensors_of(output / f"{name}.safetensors") for name in ("difference", "difference-on-merged-model"))
    assert not differing(one, other)
    assert run.largest_difference(output) == 0


def test_the_base_lora_changes_what_is_learnt(output):
    """Without it the difference LoRA is another: the base LoRA does take part in both ways."""
    plain = run.training(SD15.checkpoint(), "dataset_difference.toml", "plain", output, NUM_STEPS)
    assert carry_out(plain) == 0
    assert differing(tensors_of(output / "difference.safetensors"), tensors_of(output / "plain.safetensors"))


def test_the_base_lora_is_not_in_the_difference_lora(output):
    """The file holds what was learnt on top: with base and difference merged, the model is the merged one plus it."""
    base, difference = output / "base.safetensors", output / "difference.safetensors"
    results = []
    for name, model, loras in (
        ("at-once", SD15.checkpoint(), [base, difference]),
        ("one-by-one", output / "merged-model.safetensors", [difference]),
    ):
        out = output / f"{name}.safetensors"
        argv = ["--sd_model", model, "--models", *loras, "--ratios", *["1"] * len(loras), "--save_to", out]
        assert merge_lora.main([str(each) for each in argv]) == 0
        results.append(load_file(out))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=1e-6)


def test_the_merged_model_names_its_parents(output):
    assert metadata_of(output / "merged-model.safetensors")["modelspec.merged_from"] == "sd15, base"


def test_the_masks_of_the_base_lora_are_turned_round(output):
    import numpy as np
    from PIL import Image

    masks = sorted((output / "style_masks").glob("*.png"))
    assert [mask.stem for mask in masks] == ["astronaut", "coffee", "flower", "rocket", "temple"]
    for mask in masks:
        with Image.open(mask) as turned, Image.open(run.MASKS / mask.name) as original:
            assert (np.asarray(turned) == 255 - np.asarray(original.convert("L"))).all()


def test_a_failing_command_ends_the_example(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "train_network.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "MODEL", Path("model.safetensors"))
    assert run.main() == 3
    assert not list((tmp_path / run.OUTPUT).glob("*.safetensors"))
