"""CUDA graphs: captured once, replayed with other lengths, tables, adapter mixes and slabs in the same tensors."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from loramux_server.kernels.attention import paged_attention
from loramux_server.kernels.lora import lora_add
from loramux_server.kernels.rope import rope_and_write
from tests.support.kernel_cases import (
    AttentionCase,
    LoraCase,
    assert_close,
    attention_inputs,
    forward_batch,
    lora_inputs,
    naive_attention,
    naive_lora,
    naive_rope,
    rope_table,
    to_device,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def capture(work: Callable[[], torch.Tensor | None]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor | None]:
    """Warm up on a side stream and capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def refill(target: object, source: object) -> None:
    """Copy the tensors of one batch or group into another's of the same shapes."""
    for field in dataclasses.fields(target):  # type: ignore[arg-type]
        old, new = getattr(target, field.name), getattr(source, field.name)
        if isinstance(old, torch.Tensor):
            assert old.shape == new.shape, field.name
            old.copy_(new)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_replays_other_mixes_and_swapped_slots(dtype: torch.dtype) -> None:
    slices, width = (896, 128, 128), 896
    first = LoraCase(
        name="capture",
        ranks=((16, 16, 16), (8, 8, 8), (16, 4, 0), (1, 2, 3)),
        token_slots=(-1,) * 16,
        width=width,
        slices=slices,
        spare_segments=4,
    )
    x, out, group, batch = lora_inputs(first, dtype, "cuda")
    graph, _ = capture(lambda: lora_add(x, out, group, batch))
    mixes = (
        tuple(t % 4 for t in range(16)),
        (3,) * 16,
        (-1,) * 8 + (2,) * 8,
        tuple((7 * t) % 5 - 1 for t in range(16)),
        (-1,) * 16,
    )
    ranks = (first.ranks, tuple(reversed(first.ranks)))
    for i, slots in enumerate(mixes):
        used = len(set(slots))
        case = dataclasses.replace(first, ranks=ranks[i % 2], token_slots=slots, spare_segments=5 - used)
        new_x, new_out, new_group, new_batch = lora_inputs(case, dtype, "cuda", seed=i)
        x.copy_(new_x)
        out.copy_(new_out)
        refill(group, new_group)
        refill(batch, new_batch)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, naive_lora(new_x, new_out, new_group, slots), dtype, f"replay {i}")


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_replays_other_lengths(dtype: torch.dtype, invariant: bool) -> None:
    bound = 1200
    cases = (
        ((1, 1), (1, 1), (1, 1), (0, 0)),
        ((1, 1200), (1, 5), (1, 700), (1, 33)),
        ((1, 16), (1, 257), (0, 0), (0, 0)),
        ((1, 512), (1, 513), (1, 511), (1, 1)),
    )
    replay_attention(cases, bound, 1, dtype, invariant)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_attention_replays_other_lengths(dtype: torch.dtype, invariant: bool) -> None:
    cases = (
        ((16, 16), (0, 0), (0, 0), (0, 0)),
        ((1, 300), (3, 40), (1, 2), (11, 600)),
        ((1, 128), (1, 129), (4, 4), (0, 0)),
    )
    replay_attention(cases, 1200, 16, dtype, invariant)


def replay_attention(
    cases: tuple[tuple[tuple[int, int], ...], ...], bound: int, tokens: int, dtype: torch.dtype, invariant: bool
) -> None:
    """Capture with the first lengths and host bounds, replay with each of the others."""
    tokens = max(tokens, *(sum(n for n, _ in sequences) for sequences in cases))
    longest = max(n for sequences in cases for n, _ in sequences)
    head_dim, size = 64, 16
    inputs = []
    for i, sequences in enumerate(cases):
        spare = tokens - sum(n for n, _ in sequences)
        case = AttentionCase(
            name=f"replay {i}", sequences=sequences, heads=(14, 2), head_dim=head_dim, extra_tokens=spare
        )
        q, kv, batch = attention_inputs(case, dtype, "cuda", seed=i)
        table = torch.zeros((len(sequences), bound // size + 2), dtype=torch.int32, device="cuda")
        table[:, : batch.page_tables.shape[1]] = batch.page_tables
        batch = dataclasses.replace(batch, page_tables=table, max_kv_length=bound, max_query_length=longest)
        inputs.append((case, q, kv, batch))
    static_q = torch.zeros_like(inputs[0][1])
    static_kv = torch.zeros((400, *inputs[0][2].shape[1:]), dtype=dtype, device="cuda")
    static = dataclasses.replace(
        inputs[0][3],
        **{
            field.name: getattr(inputs[0][3], field.name).clone()
            for field in dataclasses.fields(inputs[0][3])
            if isinstance(getattr(inputs[0][3], field.name), torch.Tensor)
        },
    )
    graph, out = capture(
        lambda: paged_attention(
            static_q, static_kv, static, scale=head_dim**-0.5, window=None, softcap=None, batch_invariant=invariant
        )
    )
    for case, q, kv, batch in inputs:
        static_q.copy_(q)
        static_kv.fill_(torch.nan)
        static_kv[: len(kv)] = kv
        refill(static, batch)
        graph.replay()
        torch.cuda.synchronize()
        assert out is not None
        assert_close(out, naive_attention(q, kv, batch, case), dtype, case.name, slack=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_replays_other_positions(dtype: torch.dtype) -> None:
    head_dim, size = 64, 4
    table = rope_table(64, head_dim)
    device_table = table.cuda()
    fused = torch.zeros(6, 8 * head_dim, dtype=dtype, device="cuda")
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in fused.split([n * head_dim for n in (4, 2, 2)], 1))
    kv = torch.zeros((20, 2, size, 2, head_dim), dtype=dtype, device="cuda")
    tables = torch.arange(1, 19, dtype=torch.int32).view(2, 9)
    batch = to_device(forward_batch(((1, 1), (1, 1)), tables, size, 6), "cuda")
    graph, out = capture(lambda: rope_and_write(q, k, v, device_table, batch, kv))
    for i, sequences in enumerate((((1, 9), (4, 33)), ((3, 3), (3, 20)), ((0, 0), (1, 36)))):
        torch.manual_seed(i)
        new = to_device(forward_batch(sequences, tables, size, 6), "cuda")
        fused.copy_(torch.randn(6, 8 * head_dim))
        kv.fill_(torch.nan)
        refill(batch, new)
        graph.replay()
        torch.cuda.synchronize()
        count = sum(n for n, _ in sequences)
        assert_close(out, naive_rope(q, table, new.positions), dtype, f"replay {i} q")
        flat = kv.transpose(1, 2).flatten(0, 1)
        expected = naive_rope(k, table, new.positions)[:count]
        assert_close(flat[new.kv_slots[:count], 0], expected, dtype, f"replay {i} k")
        assert torch.equal(flat[new.kv_slots[:count], 1], v[:count])
