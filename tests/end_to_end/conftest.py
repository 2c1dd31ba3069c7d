"""What the tests of whole runs share: pictures drawn once, and a function that trains."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from end_to_end.training_runs import (
    FAMILIES,
    SDXL,
    Family,
    Pictures,
    Trained,
    arguments,
    draw_pictures,
    subset,
    write_toml,
)

Train = Callable[..., Trained]
# Files whose tests look at what a family does. Those of the others pass through it: slow with all but the first.
OF_EVERY_FAMILY = (
    "test_files",
    "test_isolation",
    "test_masks",
    "test_memory_options",
    "test_metadata_keys",
    "test_options",
    "test_previews_and_report",
    "test_reproducibility",
    "test_sd3",
)

OF_THE_MIDDLE = (
    "test_files",
    "test_isolation",
    "test_masks",
    "test_metadata_keys",
)  # of SDXL, between SD 1.5 and SD3 in most


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests that depend little on the family to a run of the slow ones, with all families but the first."""
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")  # type: ignore[attr-defined]
        places = OF_THE_MIDDLE if family == SDXL else OF_EVERY_FAMILY
        if family in FAMILIES[1:] and item.path.stem not in places:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.script, scope="session")
def family(request: pytest.FixtureRequest) -> Family:
    """Every model family in turn."""
    return request.param


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Two pictures of each kind. Do not write into these folders."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session", autouse=True)
def own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep remembered hashes out of the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture
def train(family: Family, tmp_path: Path) -> Train:
    """Train in a folder of its own below tmp_path, by default the test's only one; the run must end well."""

    def run(dataset_config: Path | None, *more: object, name: str = "run", seed: object = 7) -> Trained:
        folder = tmp_path / name
        argv = arguments(family, folder, dataset_config, *more, seed=seed)
        assert family.run(*argv) == 0
        return Trained(folder, tuple(argv))

    return run


@pytest.fixture(scope="session")
def plain_run(family: Family, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of four steps over two photos with masks and two cutouts, three epochs begun; for tests that only read."""
    folder = tmp_path_factory.mktemp("plain")
    argv = arguments(family, folder, masks_and_alpha(folder, pictures), "--max_train_steps", 4)
    assert family.run(*argv) == 0
    return Trained(folder, tuple(argv))


def masks_and_alpha(folder: Path, pictures: Pictures) -> Path:
    """Write the documented mixture: one subset with mask images, one with transparency."""
    return write_toml(
        folder / "dataset.toml",
        subset(pictures.photos, conditioning_data_dir=str(pictures.photo_masks)),
        subset(pictures.cutouts, alpha_mask=True),
    )
