"""With fills, a whole run of any family does not depend on what is masked out."""

from pathlib import Path

from end_to_end.conftest import Train
from end_to_end.hidden_pictures import draw
from end_to_end.training_runs import differing


def test_with_fills_what_is_masked_out_changes_no_bit_of_the_network(train: Train, tmp_path: Path) -> None:
    """Five kinds of data at once, first with a cache on disk, then in memory."""
    caches = {1: ("--cache_latents", "--cache_latents_to_disk"), 2: ("--cache_latents",)}
    one, other = (
        train(draw(tmp_path / str(hidden), hidden), *cache, "--max_train_steps", 4, name=f"run{hidden}")
        for hidden, cache in caches.items()
    )
    assert not differing(one.tensors, other.tensors)
    assert one.losses == other.losses
    assert any(tensor.any() for name, tensor in one.tensors.items() if "lora_up" in name)
