"""Rotary embedding and cache write: against rotate_half in float64; what is and is not written."""

import pytest
import torch

from loramux_server.kernels.rope import rope_and_write
from tests.support.kernel_cases import assert_close, forward_batch, naive_rope, rope_table

SEQUENCES = ((1, 9), (4, 6), (0, 0))
TABLE = torch.tensor([[5, 2, 7], [1, 4, 0], [0, 0, 0]], dtype=torch.int32)
PAGE = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (96, 96), (80, 32), (128, 128), (20, 6)])
def test_rotates_and_writes(head_dim: int, rotary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads = 7, 4, 2
    batch = forward_batch(SEQUENCES, TABLE, PAGE, tokens)
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in fused.split([n * head_dim for n in (4, 2, 2)], 1))
    kv = torch.full((8, 2, PAGE, kv_heads, head_dim), torch.nan, dtype=dtype)
    table = rope_table(16, rotary)
    before = fused.clone()
    out = rope_and_write(q, k, v, table, batch, kv)
    assert torch.equal(fused, before)
    assert_close(out, naive_rope(q, table, batch.positions), dtype, "q")
    expected = naive_rope(k, table, batch.positions)
    flat = kv.transpose(1, 2).flatten(0, 1)
    assert_close(flat[batch.kv_slots[:5], 0], expected[:5], dtype, "k")
    assert torch.equal(flat[batch.kv_slots[:5], 1], v[:5])
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[batch.kv_slots] = False
    assert flat[untouched].isnan().all()


def test_float32_equals_separate_rotation_bit_for_bit() -> None:
    """As transformers writes it: `x * cos + rotate_half(x) * sin`."""
    torch.manual_seed(0)
    batch = forward_batch(SEQUENCES, TABLE, PAGE, 5)
    q, k = torch.randn(5, 4, 64), torch.randn(5, 2, 64)
    table = rope_table(16, 64)
    entries = table[batch.positions]
    cos, sin = entries[:, None, 0].repeat(1, 1, 2), entries[:, None, 1].repeat(1, 1, 2)
    rotated = q * cos + torch.cat((-q[..., 32:], q[..., :32]), -1) * sin
    out = rope_and_write(q, k, k, table, batch, torch.zeros(8, 2, PAGE, 2, 64))
    assert torch.allclose(out, rotated, rtol=0, atol=1e-6)
