"""What is said of a repository, a place in it and a token before anything is asked of the hub."""

import pytest

from library.errors import OptionError
from library.options import public_values, read_training
from library.options.hub import HubOptions, HubPlace, hub_place

NEEDED = {
    "pretrained_model_name_or_path": "model.safetensors",
    "train_data_dir": "images",
    "resolution": "512",
    "network_module": "networks.lora",
    "output_dir": "out",
}
SECRET = "hf_NobodyMaySeeThis"


def read(*arguments: str):
    """Return what a training is asked for with these arguments beside those that are needed."""
    return read_training([*(f"--{name}={value}" for name, value in NEEDED.items()), *arguments], "train_network")


def refusal(**values: object) -> str:
    """Return the one line that refuses these values of the hub's group."""
    with pytest.raises(OptionError) as caught:
        HubOptions(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    "repo_id", ["my-lora", "jane/", "/my-lora", "jane/my-lora/loras", "jane/my lora", "https://x/y"]
)
def test_a_repository_is_owner_and_name(repo_id):
    assert refusal(huggingface_repo_id=repo_id).startswith("--huggingface_repo_id must be OWNER/NAME")


def test_repository_types_and_visibilities_are_refused_with_the_nearest():
    assert refusal(huggingface_repo_type="dataste").endswith("got dataste. Did you mean dataset?")
    assert refusal(huggingface_repo_visibility="pubic") == (
        "--huggingface_repo_visibility must be private or public; got pubic. Did you mean public?"
    )


def test_letters_of_either_case_name_a_type():
    assert HubOptions(huggingface_repo_type="Dataset").huggingface_repo_type == "dataset"


@pytest.mark.parametrize(("given", "kept"), [("/loras/", "loras"), ("a\\b", "a/b"), ("/", None), ("a", "a")])
def test_a_folder_in_the_repository_has_no_slashes_at_its_ends(given, kept):
    assert HubOptions(huggingface_path_in_repo=given).huggingface_path_in_repo == kept


@pytest.mark.parametrize("path", ["../other", "a//b", "a/./b", ".git"])
def test_a_folder_that_the_hub_would_refuse_is_refused_at_once(path):
    assert "must be a folder" in refusal(huggingface_path_in_repo=path)


def test_a_token_that_was_pasted_with_a_line_break_is_taken_without():
    assert HubOptions(huggingface_token=f" {SECRET}\n").huggingface_token == SECRET


@pytest.mark.parametrize("token", [f"{SECRET}\nmore", f"{SECRET} more", f"{SECRET}ü"])
def test_a_token_that_no_request_could_carry_is_refused_without_being_shown(token):
    assert "NobodyMaySeeThis" not in refusal(huggingface_token=token)


def test_the_token_is_a_secret():
    options = read("--huggingface_repo_id=jane/lora", f"--huggingface_token={SECRET}").options
    assert options.hub.huggingface_token == SECRET
    assert "huggingface_token" not in public_values(options)
    assert public_values(options)["huggingface_repo_id"] == "jane/lora"


def test_a_secret_that_stands_twice_in_a_config_file_is_warned_about_without_being_shown(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text('[a]\nhuggingface_token = "first"\n[b]\nhuggingface_token = "NobodyMaySeeThis"\n', encoding="utf-8")
    (warning,) = read(f"--config_file={file}", "--huggingface_repo_id=jane/lora").warnings
    assert warning.endswith("huggingface_token is given twice; the last one is used")


# --resume_from_huggingface


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("jane/lora/a-state", HubPlace("jane/lora", "a-state")),
        ("jane/lora/runs/1/a-state/", HubPlace("jane/lora", "runs/1/a-state")),
        ("jane/lora/a-state:v2", HubPlace("jane/lora", "a-state", "v2")),
        ("jane/lora/a-state:refs/pr/1:dataset", HubPlace("jane/lora", "a-state", "refs/pr/1", "dataset")),
        ("jane/lora/a-state::space", HubPlace("jane/lora", "a-state", None, "space")),
    ],
)
def test_a_place_on_the_hub_is_read(text, place):
    assert hub_place(text) == place


@pytest.mark.parametrize(
    "text",
    ["jane/lora", "jane/lora/", "a-state", "jane/lora/x:a:model:b", "C:\\out\\a-state", "/out/lora/x", "j/l/../x"],
)
def test_what_is_no_place_on_the_hub_is_refused(text):
    with pytest.raises(OptionError, match=r"^--resume "):
        hub_place(text)


def test_a_wrong_place_is_told_with_the_options():
    with pytest.raises(OptionError, match="must be OWNER/NAME/FOLDER"):
        read("--resume=out/lora-state", "--resume_from_huggingface")
    with pytest.raises(OptionError, match="does not say where"):
        read("--resume_from_huggingface")


# what belongs together


@pytest.mark.parametrize(
    "option",
    [
        "--huggingface_repo_type=model",
        "--huggingface_path_in_repo=x",
        "--huggingface_token=x",
        "--huggingface_repo_visibility=public",
        "--save_state_to_huggingface",
        "--async_upload",
    ],
)
def test_options_of_uploads_without_a_repository_are_warned_about(option):
    name = option.partition("=")[0]
    assert read(option, "--save_state").warnings == (f"{name} has no effect without --huggingface_repo_id",)


def test_uploading_states_that_are_not_saved_is_warned_about():
    (warning,) = read("--huggingface_repo_id=jane/lora", "--save_state_to_huggingface").warnings
    assert warning.startswith("--save_state_to_huggingface has no effect without --save_state")


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--huggingface_repo_id=jane/lora",
            "--save_state_to_huggingface",
            "--save_state_on_train_end",
            "--async_upload",
        ],
        ["--resume=jane/lora/x", "--resume_from_huggingface", "--huggingface_token=x"],
    ],
)
def test_options_of_the_hub_that_belong_together_give_no_warning(arguments):
    assert read(*arguments).warnings == ()
