"""What a run says about its data."""

from pathlib import Path

import numpy as np
import pytest
from dataset.pictures import sample_of, save_picture
from PIL import Image

from library.masks import MaskSource
from library.training.data import Data
from library.training.reporting import tell_masks


@pytest.mark.parametrize("grey", [0, 1])
def test_masks_that_let_nothing_through_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture, grey: int):
    Image.fromarray(np.full((80, 96), grey, np.uint8)).save(tmp_path / "mask.png")
    sample = sample_of(save_picture(tmp_path / "a.png"), MaskSource("file", tmp_path / "mask.png"))
    tell_masks(Data((), (sample,)), None)
    assert [record.message.startswith("the masks are black everywhere") for record in caplog.records] == [True] * (
        grey == 0
    )
