"""Paged attention, torch form: against a dense reference, and bit for bit between batch compositions."""

import random

import pytest
import torch

from loramux_server.kernels.attention import paged_attention
from tests.support.kernel_cases import (
    ATTENTION_CASES,
    AttentionCase,
    assert_close,
    attention_inputs,
    forward_batch,
    naive_attention,
)


def run(case: AttentionCase, q: torch.Tensor, kv: torch.Tensor, batch) -> torch.Tensor:
    """Call the op with the case's flags."""
    return paged_attention(
        q, kv, batch, scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, batch_invariant=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_matches_dense_reference(case: AttentionCase, dtype: torch.dtype) -> None:
    q, kv, batch = attention_inputs(case, dtype)
    out = run(case, q, kv, batch)
    assert out.dtype == dtype
    assert_close(out, naive_attention(q, kv, batch, case), dtype, case.name)


def test_accepts_view_of_fused_projection() -> None:
    case = ATTENTION_CASES[1]
    q, kv, batch = attention_inputs(case, torch.float32)
    fused = torch.cat((q.flatten(1), torch.full((len(q), 30), torch.nan)), 1)
    view = fused[:, : q[0].numel()].unflatten(1, q.shape[1:])
    assert torch.equal(run(case, view, kv, batch), run(case, q, kv, batch))


def test_plan_follows_refilled_tensors() -> None:
    first = AttentionCase(name="a", sequences=((1, 20), (1, 30)))
    second = AttentionCase(name="b", sequences=((1, 31), (1, 18)))
    q, kv, batch = attention_inputs(first, torch.float32, seed=1)
    run(first, q, kv, batch)
    q2, kv2, batch2 = attention_inputs(second, torch.float32, seed=2)
    batch.kv_lengths.copy_(batch2.kv_lengths)
    batch.page_tables.copy_(batch2.page_tables)
    assert_close(run(second, q2, kv2, batch), naive_attention(q2, kv2, batch2, second), torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "softcap"),
    [((14, 2), 64, None, None), ((3, 1), 32, None, None), ((8, 2), 128, 90, 20.0), ((2, 2), 96, None, None)],
)
def test_bits_do_not_depend_on_batch_or_chunks(
    heads: tuple[int, int], head_dim: int, window: int | None, softcap: float | None, threads: int
) -> None:
    """Every token of a set of sequences, under random chunkings and companions, has the bits of one whole prefill."""
    rng = random.Random(7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lengths = (1, 5, 127, 128, 129, 300, 420)
        case = AttentionCase(
            name="invariance",
            sequences=tuple((n, n) for n in lengths),
            heads=heads,
            head_dim=head_dim,
            window=window,
            softcap=softcap,
        )
        q, kv, batch = attention_inputs(case, torch.float32, seed=3)
        whole = run(case, q, kv, batch)
        offsets = batch.query_starts.tolist()
        for _ in range(16):
            chosen = rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))
            chunks = []
            for s in chosen:
                count = rng.choice([1, 1, 1, rng.randint(1, lengths[s])])
                end = rng.randint(min(count, lengths[s]), lengths[s])
                chunks.append((s, min(count, end), end))
            tokens = torch.cat([torch.arange(offsets[s] + end - n, offsets[s] + end) for s, n, end in chunks])
            part = forward_batch(
                tuple((n, end) for _, n, end in chunks), batch.page_tables[chosen], case.page_size, len(tokens)
            )
            assert torch.equal(run(case, q[tokens], kv, part), whole[tokens]), chunks
    finally:
        torch.set_num_threads(before)
