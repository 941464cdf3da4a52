"""Gated activations: against torch's own, and bit for bit between batch compositions."""

import pytest
import torch

from loramux_server.kernels.activation import Kind, glu
from tests.support.kernel_cases import assert_close


def naive_glu(gate_up: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The activation in float64."""
    gate, up = gate_up.double().chunk(2, -1)
    functional = torch.nn.functional
    return (functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (3, 202), (0, 16)])
def test_matches_torch(shape: tuple[int, int], kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(shape)).to(dtype)
    before = gate_up.clone()
    out = glu(gate_up, kind)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(gate_up, before)
    assert_close(out, naive_glu(gate_up, kind), dtype)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_large_magnitudes_stay_finite(kind: Kind) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(glu(gate_up, kind), torch.tensor([[0.0, 0.0, 0.0, 200.0, 1e4]]))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_row_bits_do_not_depend_on_batch(kind: Kind) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(150, 2 * 333)
    whole = glu(gate_up, kind)
    for begin, count in ((0, 1), (5, 1), (7, 3), (2, 101), (149, 1)):
        assert torch.equal(glu(gate_up[begin : begin + count].clone(), kind), whole[begin : begin + count])


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        glu(torch.zeros(1, 4), "relu")  # type: ignore[arg-type]
