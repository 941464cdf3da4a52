import math

import pytest
import torch

from loramux_server.kernels.sampling import pick
from tests.support.sampling_cases import assert_picked, sampling_inputs


@pytest.mark.parametrize("vocab", [17, 1000, 5003])
@pytest.mark.parametrize("normaliser", [False, True])
def test_tokens_are_the_references(vocab: int, normaliser: bool) -> None:
    inputs = sampling_inputs(vocab)
    result = pick(*inputs, normaliser=normaliser)
    assert result.shape == (len(inputs[0]), 3 if normaliser else 2)
    assert_picked(result, *inputs)


def test_a_row_does_not_depend_on_the_others() -> None:
    inputs = sampling_inputs(1000)
    together = pick(*inputs, normaliser=True)
    for row in range(len(together)):
        alone = pick(*(tensor[row : row + 1] for tensor in inputs), normaliser=True)
        assert torch.equal(alone[0, :2], together[row, :2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_marked_and_no_other(value: float) -> None:
    raw, _, parameters, keys = sampling_inputs(100)
    raw[4, 50] = value
    result = pick(raw, raw, parameters, keys, normaliser=False)
    assert result[:, 1].tolist() == [int(row != 4) for row in range(len(raw))]
    assert bool(((result[:, 0] >= 0) & (result[:, 0] < 100)).all())


def test_a_row_whose_tokens_are_all_banned_still_has_a_token() -> None:
    raw, adjusted, parameters, keys = sampling_inputs(100)
    adjusted[:] = -math.inf
    tokens = pick(raw, adjusted, parameters, keys, normaliser=False)[:, 0]
    assert bool(((tokens >= 0) & (tokens < 100)).all())
