"""Stable Diffusion 2.x from end to end: --v2 for models that predict noise, with --v_parameterization for velocity."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end.conftest import masks_and_alpha
from end_to_end.training_runs import (
    SD15,
    SD21,
    SD21_V,
    Family,
    Pictures,
    Trained,
    arguments,
    differing,
    subset,
    tensors_of,
    write_toml,
)
from PIL import Image

from networks import merge_lora

DATA = Path(__file__).resolve().parents[1] / "data"
velocity_only = pytest.mark.parametrize("family", [SD21_V], indirect=True, ids=["sd_v2_v"])
STILL = ("--learning_rate", "1e-12", "--max_train_steps", 1)  # so slow that nothing is learnt


@pytest.fixture(params=(SD21, SD21_V), ids=lambda family: family.base_model_version, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    """Both kinds of SD 2.x."""
    return request.param


@pytest.fixture(scope="module")
def whole(family: Family, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of four steps with masks, previews, and a state after two. Do not change its files."""
    folder = tmp_path_factory.mktemp(family.base_model_version)
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --d 5 --s 3 --l 3\n")
    more = ["--max_train_steps", 4, "--save_every_n_steps", 2, "--save_state", "--masked_loss"]
    more += ["--sample_prompts", folder / "prompts.txt", "--sample_at_first", "--sample_every_n_steps", 4]
    argv = arguments(family, folder, masks_and_alpha(folder, pictures), *more)
    assert family.run(*argv) == 0
    return Trained(folder, tuple(argv))


@pytest.fixture
def config(pictures: Pictures, tmp_path: Path) -> Path:
    """Write a config of two pictures with transparency: one batch."""
    return write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))


def preview(run: Trained, stamp: str) -> np.ndarray:
    """Return the pixels of the one preview of a time."""
    (path,) = (run.folder / "out" / "sample").glob(f"lora_{stamp}_*.png")
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_file_has_the_names_and_kinds_of_layers_of_sd_2(whole: Trained, family: Family):
    """Projections are 1x1 convolutions in the file, though the checkpoint's are linear."""
    shapes = json.loads(gzip.decompress((DATA / "networks" / family.keys).read_bytes()))["variants"]["default"]
    assert {name: tensor.dim() for name, tensor in whole.tensors.items()} == {n: len(s) for n, s in shapes.items()}
    layers = [re.search(r"^lora_te_text_model_encoder_layers_(\d+)", name) for name in whole.tensors]
    assert max(int(layer[1]) for layer in layers if layer) == 22  # the last but one of OpenCLIP's 24


def test_every_module_was_trained(whole: Trained):
    untrained = [name for name, tensor in whole.tensors.items() if "lora_up" in name and not tensor.any()]
    # pictures of 64 pixels are one cell in the middle of the U-Net, and attention over one cell has nothing to choose
    assert [name for name in untrained if "_mid_block_" not in name or "_attn1_to_" not in name] == []
    assert all(tensor.isfinite().all() for tensor in whole.tensors.values())
    assert len(whole.losses) == 4


def test_the_metadata_say_which_model_it_is_for(whole: Trained, family: Family):
    metadata = whole.metadata
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("True", family.base_model_version)
    assert metadata["modelspec.architecture"] == family.architecture
    assert metadata["modelspec.prediction_type"] == ("v" if family is SD21_V else "epsilon")


def test_previews_show_the_training(whole: Trained):
    before, after = preview(whole, "e000000"), preview(whole, "000004")
    assert before.shape == (64, 64, 3)
    assert (before != after).any()


def test_a_resumed_run_is_the_one_that_was_not_stopped(whole: Trained, train):
    config = whole.argv[whole.argv.index("--dataset_config") + 1]
    state = whole.folder / "out" / "lora-step00000002-state"
    resumed = train(Path(config), "--max_train_steps", 4, "--masked_loss", "--resume", state)
    assert not differing(resumed.tensors, whole.tensors)
    assert resumed.losses == whole.losses[2:]


@pytest.mark.slow
@velocity_only
def test_merged_into_the_model_it_does_what_it_does_beside_it(whole: Trained, train, config, family, tmp_path):
    merged = tmp_path / "merged.safetensors"
    argv = ["--v2", "--sd_model", family.checkpoint(), "--models", whole.file, "--ratios", 1, "--save_to", merged]
    assert merge_lora.main([str(each) for each in argv]) == 0
    stored, plain_model = tensors_of(merged), tensors_of(family.checkpoint())
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in plain_model.items()}
    plain = train(config, *STILL, name="plain").losses
    beside = train(config, *STILL, "--network_weights", whole.file, name="beside").losses
    inside = train(config, *STILL, "--base_weights", whole.file, name="inside").losses
    own = train(config, *STILL, "--pretrained_model_name_or_path", merged, name="own").losses
    assert beside != pytest.approx(plain, rel=1e-4)
    assert inside == pytest.approx(beside, rel=1e-5)
    assert own == inside


@velocity_only
def test_a_diffusers_folder_trains_as_the_file_does(train, config, family):
    """There projections are linear layers, so their LoRA is one; each kind is read for the other."""
    from_file = train(config, name="file")
    from_folder = train(config, "--pretrained_model_name_or_path", family.folder(), name="folder")
    assert from_folder.losses == pytest.approx(from_file.losses, rel=1e-5)
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    assert (from_file.tensors[name].dim(), from_folder.tensors[name].dim()) == (4, 2)
    model = ("--pretrained_model_name_or_path", family.folder())
    for weights in (from_file.file, from_folder.file):
        alone = train(config, *STILL, "--network_weights", weights, name=f"{weights.parts[-3]} for file").losses
        other = train(
            config, *STILL, *model, "--network_weights", weights, name=f"{weights.parts[-3]} for folder"
        ).losses
        assert other == pytest.approx(alone, rel=1e-5)


@velocity_only
@pytest.mark.filterwarnings("ignore")  # of peft and diffusers
def test_diffusers_gives_our_own_forward_with_what_was_trained_on_a_folder(train, config, family: Family):
    """It builds SD 2.x with linear projections, and takes no 1x1 convolutions for them."""
    from diffusers import StableDiffusionPipeline

    from networks import lora

    made, parts = family.load()
    tokens = made.tokenize(["a cat on a mat"])
    noisy, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    targets = tuple(made.lora_targets(parts))
    run = train(config, "--pretrained_model_name_or_path", family.folder(), "--learning_rate", "1e-2")
    network, _ = lora.create_network_from_weights(1.0, run.file, None, None, None, targets=targets)
    network.load_weights(run.file)
    network.set_multiplier(20.0)  # two steps change little

    @torch.no_grad()
    def output() -> torch.Tensor:
        return made.predict(parts, noisy, timesteps, made.encode_text(parts, tokens), None)

    plain = output()
    with network.eval().attached():
        ours = output()
    pipeline = StableDiffusionPipeline.from_pretrained(family.folder(), safety_checker=None, local_files_only=True)
    pipeline.load_lora_weights(run.file.parent, weight_name=run.file.name)
    pipeline.set_adapters(pipeline.get_active_adapters(), 20.0)
    with torch.no_grad():
        text = pipeline.text_encoder.eval()(tokens[:, 0]).last_hidden_state
        theirs = pipeline.unet.eval()(noisy, timesteps, text).sample
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_velocity_is_another_target_and_another_preview(pictures, tmp_path):
    config = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --d 5 --s 3 --l 3\n")
    runs = []
    for family in (SD21, SD21_V):
        folder = tmp_path / family.base_model_version
        argv = arguments(
            family, folder, config, *STILL, "--sample_prompts", tmp_path / "prompts.txt", "--sample_at_first"
        )
        assert family.run(*argv) == 0
        runs.append(Trained(folder, tuple(argv)))
    noise, velocity = runs
    assert velocity.losses != pytest.approx(noise.losses, rel=1e-3)
    assert (preview(noise, "e000000") != preview(velocity, "e000000")).any()


@pytest.mark.parametrize("place", ["checkpoint", "folder"])
@pytest.mark.parametrize(
    ("given", "model", "said"),
    [
        (SD15, SD21, "is a Stable Diffusion 2.x model. Add --v2."),
        (SD21, SD15, "is a Stable Diffusion 1.x model. Leave out --v2."),
    ],
    ids=["2.x without v2", "1.x with v2"],
)
def test_a_model_of_the_other_version_ends_in_one_line(given, model, said, place, config, tmp_path, capsys):
    path = getattr(model, place)()
    argv = arguments(given, tmp_path / "run", config, "--pretrained_model_name_or_path", path)
    assert given.run(*argv) == 2
    written = capsys.readouterr().err.splitlines()
    assert written[-1] == f"error: {path}: {said}"
    assert not list((tmp_path / "run" / "out").iterdir())
