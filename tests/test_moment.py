import pytest
import torch

from gradsift.engine.answers.moment import second_moment
from gradsift.kernels.errors import ShapeError


def test_blocks_add_up_to_the_whole():
    rows = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    total, count = second_moment(rows.split(8), lambda block: 2 * block)
    assert count == 37
    torch.testing.assert_close(total, 4 * rows.double().T @ rows.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [[], [torch.zeros(0, 4)], [torch.zeros(2, 3, 4)]])
def test_nothing_to_sum_is_refused(blocks):
    with pytest.raises(ShapeError):
        second_moment(blocks)
