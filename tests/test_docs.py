"""The documentation says what is: links lead somewhere, options exist, configs can be read."""

import re
import shlex
from pathlib import Path

import pytest

from library.dataset import config as dataset_config
from library.options import read_training
from library.options.captions import CaptionOptions
from library.options.command_line import CONFIG_FILE, OUTPUT_CONFIG
from library.options.dataset import DatasetOptions
from library.options.declare import declared
from library.options.groups import all_declared
from library.options.masks import MaskOptions
from library.options.reference import GRANTED, IGNORED, OTHER_SCRIPTS, REFUSED
from networks import (
    command_line,
    extract_lora_from_models,
    merge_lora,
    resize_lora,
    sd3_merge_lora,
    sdxl_merge_lora,
    svd_merge_lora,
)
from tools import mask_images, merge_sd3_safetensors, pad_buckets

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOOL_FLAGS = {
    "torch-index",
    "json",
    "html",
    "full",
    "masks",
    "contact_sheet",
    "help",
}  # of quickstart.py and tools/check_dataset.py
FOREIGN_FLAGS = {"extra-index-url", "num_cpu_threads_per_process", "logdir"}  # of pip, accelerate and tensorboard
FOREIGN_FLAGS |= {"multi_gpu", "num_processes", "nproc_per_node", "use_deepspeed"}  # of launchers
FOREIGN_FLAGS |= {"use_fsdp", "fsdp_version", "fsdp_reshard_after_forward", "fsdp_offload_params"}
FOREIGN_FLAGS |= {"fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap"}
FOREIGN_FLAGS |= {"no-deps"}  # of pip
FOREIGN_FLAGS |= {"diffusers_xformers"}  # of sd-scripts
PLACEHOLDERS = {"name"}
GUIDES_CONFIG = "my_sd3_dataset_config.toml"  # of a command that is shown as sd-scripts' guide has it
PROMPT_FLAGS = {"w", "h", "d", "s", "l", "n", "ss"}  # in prompt files
COMMANDS = {  # of networks/ and tools/ -> what declares their options
    "merge_lora.py": merge_lora.MergeOptions,
    "sdxl_merge_lora.py": sdxl_merge_lora.SdxlMergeOptions,
    "sd3_merge_lora.py": sd3_merge_lora.Sd3MergeOptions,
    "svd_merge_lora.py": svd_merge_lora.SvdMergeOptions,
    "extract_lora_from_models.py": extract_lora_from_models.ExtractOptions,
    "resize_lora.py": resize_lora.ResizeOptions,
    "merge_sd3_safetensors.py": merge_sd3_safetensors.PackOptions,
}
TOOLS = {"pad_buckets.py": (pad_buckets.PadOptions, pad_buckets.read, "placement.md")}  # and where each is described
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchor(heading: str) -> str:
    """Return the fragment that a heading is linked by."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def has_heading(page: Path, fragment: str) -> bool:
    """Return whether a link to the fragment of a page leads somewhere; an empty one leads to the page itself."""
    return not fragment or fragment in {anchor(line) for line in HEADING.findall(page.read_text(encoding="utf-8"))}


def known_options() -> set[str]:
    """Return the name of every option of training, those that are refused or ignored included."""
    names = set(all_declared()) | {each.name for each in (*REFUSED, *IGNORED, *GRANTED)} | set(OTHER_SCRIPTS)
    names |= {each.name for group in (*COMMANDS.values(), *mask_images.GROUPS.values()) for each in declared(group)}
    names |= {each.name for group, _, _ in TOOLS.values() for each in declared(group)}
    return names | {CONFIG_FILE.name, OUTPUT_CONFIG.name}


def tool_modules() -> list[str]:
    """Return the modules that the pages tell to be run with python -m, ours only."""
    said = re.findall(
        r"python -m (library\.[\w.]+|networks\.[\w.]+)", "".join(page.read_text("utf-8") for page in PAGES)
    )
    return sorted(set(said))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, fragment = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        if not target.startswith(("http://", "https://")) and not (place.exists() and has_heading(place, fragment)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_that_is_named_exists(page):
    named = set(re.findall(r"(?<![\w-])--([a-zA-Z]\w*(?:-\w+)*)", page.read_text(encoding="utf-8")))
    assert named - TOOL_FLAGS - FOREIGN_FLAGS - PROMPT_FLAGS - PLACEHOLDERS <= known_options()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_of_ours_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`?((?:library|networks|tests|tools|examples|docs|benchmarks)/[\w./-]+\.\w+)", text))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_module_that_is_to_be_run_exists():
    assert not [name for name in tool_modules() if not (ROOT / (name.replace(".", "/") + ".py")).is_file()]


def dataset_configs() -> list[tuple[str, str]]:
    """Return (place, text) of every data set config shown on a page or lying among the examples."""
    found = []
    for page in PAGES:
        blocks = [body for language, body in CODE_BLOCK.findall(page.read_text("utf-8")) if language == "toml"]
        found += [(f"{name_of(page)}-{number}", body) for number, body in enumerate(blocks) if "[[datasets" in body]
    configs = sorted([*ROOT.glob("examples/masked_lora/dataset_*.toml"), *ROOT.glob("examples/*/dataset.toml")])
    return found + [(name_of(path), path.read_text(encoding="utf-8")) for path in configs]


@pytest.mark.parametrize(("place", "text"), dataset_configs(), ids=[place for place, _ in dataset_configs()])
def test_every_config_that_is_shown_can_be_loaded(place, text, tmp_path):
    path = tmp_path / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    options = DatasetOptions(dataset_config=path, resolution="512")
    assert dataset_config.load(options, CaptionOptions(), MaskOptions(), bucket_step_multiple=32)  # SDXL's, the finest


def training_commands() -> list[tuple[str, str, str]]:
    """Return (place, script, arguments) of every whole training command that a page shows."""
    found = []
    for page in PAGES:
        for _, body in CODE_BLOCK.findall(page.read_text("utf-8")):
            command = re.search(
                r"(\w*train_network|train_db|sdxl_train)\.py(.*--output_dir.*)", body.replace("\\\n", " "), re.DOTALL
            )
            if command:
                found.append((name_of(page), command[1], command[2]))
    return found


@pytest.mark.parametrize(("place", "script", "arguments"), training_commands())
def test_every_training_command_that_is_shown_is_understood(place, script, arguments):
    read = read_training(shlex.split(arguments), script)
    assert read.options.masks.masked_loss or GUIDES_CONFIG in arguments or script == "train_db"
    assert not read.warnings


def network_commands() -> list[tuple[str, str, str]]:
    """Return (place, command, arguments) of every command of networks/ that a page shows."""
    found = []
    for page in PAGES:
        for _, body in CODE_BLOCK.findall(page.read_text("utf-8")):
            lines = body.replace("\\\n", " ").splitlines()
            said = [re.match(r"python networks/(\w+\.py) (.*)", line) for line in lines]
            found += [(name_of(page), match[1], match[2]) for match in said if match]
    return found


@pytest.mark.parametrize(("place", "command", "arguments"), network_commands())
def test_every_command_of_networks_that_is_shown_is_understood(place, command, arguments):
    group = COMMANDS[command]
    options = command_line.read(shlex.split(arguments), prog=command, description="", group=group)
    assert options.save_to


def test_every_option_of_the_commands_of_networks_is_described():
    text = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    names = {each.name for group in COMMANDS.values() for each in declared(group)}
    assert not [name for name in names if f"--{name}" not in text]


def test_every_option_of_the_command_that_makes_masks_is_described():
    names = {each.name for group in mask_images.GROUPS.values() for each in declared(group)}
    for page in (ROOT / "docs" / "mask-images.md", ROOT / "docs" / "ja" / "mask-images.md"):
        text = page.read_text(encoding="utf-8")
        assert not [name for name in names if f"--{name}" not in text]


def shown_tools():
    """Return each command of a tool as the pages show it: page, tool, arguments."""
    found = []
    for page in PAGES:
        for language, block in CODE_BLOCK.findall(page.read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines() if language == "bash" else []
            said = [re.match(r"python tools/(\w+\.py) (.*)", line) for line in lines]
            found += [(name_of(page), match[1], match[2]) for match in said if match and match[1] in TOOLS]
    return found


@pytest.mark.parametrize(("place", "tool", "arguments"), shown_tools())
def test_every_command_of_a_tool_that_is_shown_is_understood(place, tool, arguments):
    _, read, _ = TOOLS[tool]
    assert read(shlex.split(arguments))


@pytest.mark.parametrize("tool", TOOLS)
def test_every_option_of_a_tool_is_described(tool):
    group, _, page = TOOLS[tool]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert not [
        each.name for each in declared(group) if f"--{each.name}" not in text and not each.name.endswith("put_dir")
    ]


def test_every_key_of_a_data_set_config_is_described():
    from library.dataset import schema

    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    keys = {*schema.DATASET_KEYS, *schema.SUBSET_KEYS, *schema.SUBSET_ONLY_KEYS}
    assert not [key for key in keys if f"`{key}`" not in text]


def test_the_japanese_pages_show_the_same_configs_as_the_english_ones():
    for page in (ROOT / "docs" / "ja").glob("*.md"):
        english = (ROOT / "docs" / page.name).read_text(encoding="utf-8")
        for language, body in CODE_BLOCK.findall(page.read_text(encoding="utf-8")):
            assert language != "toml" or body in english


def test_every_picture_is_small_and_stands_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.suffix in (".png", ".webp", ".jpg")]
    assert len(pictures) > 5
    assert not [path.name for path in pictures if f"images/{path.name}" not in text]
    assert not [path.name for path in pictures if not 1000 < path.stat().st_size < 250_000]
