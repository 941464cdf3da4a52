"""Root mean square norms: against transformers' order of operations, and bit for bit between batch compositions."""

import pytest
import torch

from loramux_server.kernels.norm import add_rms_norm, rms_norm
from tests.support.kernel_cases import assert_close


def naive_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """The norm in float64."""
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (3, 897), (0, 16)])
def test_matches_reference(shape: tuple[int, int], offset: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    out = rms_norm(x, weight, 1e-6, offset=offset)
    assert out.dtype == dtype
    assert_close(out, naive_norm(x, weight, 1e-6, offset), dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-6, offset=offset)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6, offset=offset))


def test_cast_order_is_that_of_the_family() -> None:
    """In bfloat16 the two orders differ; llama multiplies after the cast, gemma before it."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 256).bfloat16(), torch.randn(256).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5), weight * normed.bfloat16())
    assert torch.equal(rms_norm(x, weight, 1e-5, offset=1.0), (normed * (1.0 + weight.float())).bfloat16())


def test_row_bits_do_not_depend_on_batch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 896), torch.randn(896)
    whole = rms_norm(x, weight, 1e-6)
    for begin, count in ((0, 1), (5, 1), (7, 3), (2, 250), (299, 1)):
        assert torch.equal(rms_norm(x[begin : begin + count].clone(), weight, 1e-6), whole[begin : begin + count])
