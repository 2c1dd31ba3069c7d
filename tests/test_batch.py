"""What each of several processes has of a batch."""

import pytest
import torch

from library.batch import Share


def shares(num_images: int, num_processes: int) -> list[Share]:
    return [Share(num_images, index, num_processes) for index in range(num_processes)]


@pytest.mark.parametrize(("num_images", "num_processes"), [(4, 2), (3, 2), (1, 2), (2, 3), (7, 3)])
def test_the_average_of_the_processes_means_is_the_mean_of_the_whole_batch(num_images, num_processes):
    losses = torch.arange(1.0, num_images + 1)
    means = [share.mean(losses[share.rows]) for share in shares(num_images, num_processes)]
    assert torch.stack(means).mean() == pytest.approx(losses.mean().item())


def test_every_image_belongs_to_one_process_that_is_not_idle():
    rows = torch.arange(3)
    owned = [(share.is_idle, rows[share.rows].tolist()) for share in shares(3, 4)]
    assert owned == [(False, [0]), (False, [1]), (False, [2]), (True, [0])]


def test_the_images_of_a_process_keep_their_rows_in_the_whole_batch():
    own = torch.tensor([[1.0], [2.0]])
    whole = Share(5, 2, 3).whole(own[:1])
    assert whole.tolist() == [[0], [0], [1], [0], [0]]
    assert Share(5, 1, 3).whole(own)[Share(5, 1, 3).rows].equal(own)
