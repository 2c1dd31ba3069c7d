"""Number formats: what a gradient scaler takes."""

import pytest
import torch

from library.training.precision import let_scaler_take_half_gradients


def test_with_full_fp16_a_scaler_unscales_half_gradients() -> None:
    """Which torch refuses by itself."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def unscaled(scaler: torch.amp.GradScaler) -> list[float]:
        weight.grad = scaler.scale(torch.ones(2)).half()
        scaler.unscale_(optimizer)
        return weight.grad.tolist()

    with pytest.raises(ValueError, match="FP16"):
        unscaled(torch.amp.GradScaler("cpu", init_scale=8.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    let_scaler_take_half_gradients(scaler)
    assert unscaled(scaler) == [1.0, 1.0]
