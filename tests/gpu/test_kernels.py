"""Triton kernels on a CUDA device against float64 references, in all three dtypes.

Run with `-s` to see the largest error of every case.
"""

import dataclasses
import math

import pytest
import torch

from loramux_server.kernels import triton_available
from loramux_server.kernels.activation import Kind, glu
from loramux_server.kernels.attention import paged_attention, paged_attention_torch
from loramux_server.kernels.lora import lora_add
from loramux_server.kernels.norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from loramux_server.kernels.pages import copy_pages, poison
from loramux_server.kernels.rope import rope_and_write
from loramux_server.kernels.sampling import pick, pick_torch
from tests.support.kernel_cases import (
    ATTENTION_CASES,
    LORA_CASES,
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
from tests.support.sampling_cases import assert_picked, sampling_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE_ATTENTION = (
    AttentionCase(name="decode 7B", sequences=((1, 640),) * 7 + ((1, 2100), (0, 0)), heads=(28, 4), head_dim=128),
    AttentionCase(name="mixed 7B", sequences=((1, 640), (200, 300), (64, 64)), heads=(28, 4), head_dim=128),
    AttentionCase(
        name="decode gemma",
        sequences=((1, 900), (1, 77)),
        heads=(8, 4),
        head_dim=256,
        window=512,
        softcap=50.0,
        page_size=32,
    ),
    AttentionCase(name="long", sequences=((1, 9000),), heads=(8, 2), head_dim=64),
)
LARGE_LORA = (
    LoraCase(
        name="32 distinct",
        ranks=((16, 16, 16),) * 32,
        token_slots=tuple(t % 33 - 1 for t in range(64)),
        width=3584,
        slices=(3584, 512, 512),
    ),
    LoraCase(
        name="long prefill",
        ranks=((16, 16), (64, 48)),
        token_slots=(0,) * 700 + (1,) * 300 + (-1,) * 24,
        width=896,
        slices=(4864, 4864),
    ),
    LoraCase(name="wide", ranks=((16,), (8,)), token_slots=(0, 1, -1, 1), width=18944, slices=(3584,)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """A page copy."""

    source: int
    target: int
    tokens: int


def test_triton_is_the_form_under_test() -> None:
    """Without it the tests below would only show that torch equals torch."""
    assert triton_available()


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION_CASES + LARGE_ATTENTION, ids=lambda case: case.name)
def test_attention(case: AttentionCase, dtype: torch.dtype, invariant: bool) -> None:
    q, kv, batch = attention_inputs(case, dtype, "cuda")
    flags = {"scale": case.head_dim**-0.5, "window": case.window, "softcap": case.softcap}
    out = paged_attention(q, kv, batch, batch_invariant=invariant, **flags)
    if case in LARGE_ATTENTION:
        expected = paged_attention_torch(q.cpu().float(), kv.cpu().float(), to_device(batch, "cpu"), **flags)
    else:
        expected = naive_attention(q, kv, batch, case)
    # float32: the exponential and the division are the device's approximate ones.
    assert_close(out, expected, dtype, f"attention {case.name} invariant={invariant}", slack=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LORA_CASES + LARGE_LORA, ids=lambda case: case.name)
def test_lora(case: LoraCase, dtype: torch.dtype) -> None:
    x, out, group, batch = lora_inputs(case, dtype, "cuda")
    expected = naive_lora(x, out, group, case.token_slots)
    before = out.clone()
    lora_add(x, out, group, batch)
    assert_close(out, expected, dtype, f"lora {case.name}")
    base = [t for t, slot in enumerate(case.token_slots) if slot < 0]
    assert torch.equal(out[base], before[base])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 97, 896, 3584, 8192])
def test_norm(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(5, width).to(dtype).cuda() for _ in range(2))
    weight = torch.randn(width).to(dtype).cuda()
    for offset in (0.0, 1.0):
        expected = rms_norm_torch(x.double().cpu(), weight.double().cpu(), 1e-6, offset=offset)
        assert_close(rms_norm(x, weight, 1e-6, offset=offset), expected, dtype, f"rms_norm {width}")
        normed, total = add_rms_norm(x, residual, weight, 1e-6, offset=offset)
        expected, reference_total = add_rms_norm_torch(x, residual, weight, 1e-6, offset=offset)
        assert torch.equal(total, reference_total)
        assert_close(normed, expected, dtype, f"add_rms_norm {width}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activation(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    functional = torch.nn.functional
    for rows, width in ((1, 5), (3, 4864), (700, 1000)):
        gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype).cuda()
        gate, up = gate_up.double().chunk(2, -1)
        activated = functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")
        assert_close(glu(gate_up, kind), activated * up, dtype, f"{kind} {rows}x{width}")
    extreme = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]]).to(dtype).cuda()
    assert torch.equal(glu(extreme, kind), torch.tensor([[0.0, 0.0, 0.0, 200.0, 1e4]]).to(dtype).cuda())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (96, 96), (80, 32), (128, 128), (256, 256), (20, 6)])
def test_rope(head_dim: int, rotary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tables = torch.tensor([[5, 2, 7], [1, 4, 0]], dtype=torch.int32)
    batch = to_device(forward_batch(((1, 9), (4, 6)), tables, 4, 7), "cuda")
    fused = torch.randn(7, 8 * head_dim).to(dtype).cuda()
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in fused.split([n * head_dim for n in (4, 2, 2)], 1))
    kv = torch.full((8, 2, 4, 2, head_dim), math.nan, dtype=dtype, device="cuda")
    table = rope_table(16, rotary)
    out = rope_and_write(q, k, v, table.cuda(), batch, kv)
    assert_close(out, naive_rope(q, table, batch.positions), dtype, "q")
    flat = kv.transpose(1, 2).flatten(0, 1)
    assert_close(flat[batch.kv_slots[:5], 0], naive_rope(k, table, batch.positions)[:5], dtype, "k")
    assert torch.equal(flat[batch.kv_slots[:5], 1], v[:5])
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[batch.kv_slots.cpu()] = False
    assert flat[untouched.cuda()].isnan().all()


def test_pages() -> None:
    torch.manual_seed(0)
    kv = [torch.randn(6, 2, 4, 3, 5, device="cuda") for _ in range(2)]
    before = [layer.clone() for layer in kv]
    copy_pages([Copy(source=2, target=5, tokens=3), Copy(source=5, target=1, tokens=1)], kv)
    poison([3], kv)
    for layer, old in zip(kv, before, strict=True):
        assert torch.equal(layer[5, :, :3], old[2, :, :3])
        assert torch.equal(layer[5, :, 3:], old[5, :, 3:])
        assert torch.equal(layer[1, :, :1], old[2, :, :1])
        assert layer[3].isnan().all() and not layer[[0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap", "heads"), [(None, None, (14, 2)), (90, 20.0, (8, 4))])
def test_attention_bits_do_not_depend_on_batch(
    heads: tuple[int, int], window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    """Prefilled at once, in chunks beside others, or decoded alone: the same bits with `batch_invariant`."""
    lengths = (5, 300, 700)
    case = AttentionCase(name="invariance", sequences=tuple((n, n) for n in lengths), heads=heads, head_dim=128)
    q, kv, batch = attention_inputs(case, dtype, "cuda")
    flags = {"scale": case.head_dim**-0.5, "window": window, "softcap": softcap, "batch_invariant": True}
    whole = paged_attention(q, kv, batch, **flags)
    offsets = batch.query_starts.tolist()
    tables = batch.page_tables.cpu()
    compositions = (
        [(1, 1, 300)],
        [(0, 1, 5), (2, 1, 700), (1, 1, 140)],
        [(2, 40, 690), (1, 1, 300), (0, 5, 5)],
        [(1, 33, 64)],
    )
    for chunks in compositions:
        tokens = torch.cat([torch.arange(offsets[s] + end - n, offsets[s] + end) for s, n, end in chunks])
        part = forward_batch(
            tuple((n, end) for _, n, end in chunks), tables[[s for s, *_ in chunks]], case.page_size, len(tokens)
        )
        got = paged_attention(q[tokens.cuda()], kv, to_device(part, "cuda"), **flags)
        assert torch.equal(got, whole[tokens.cuda()]), chunks


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_bits_do_not_depend_on_batch(dtype: torch.dtype) -> None:
    slots = tuple(t % 4 - 1 for t in range(600))
    case = LoraCase(name="", ranks=((16, 8),) * 3, token_slots=slots, width=4864, slices=(896, 128))
    x, out, group, batch = lora_inputs(case, dtype, "cuda")
    whole = out.clone()
    lora_add(x, whole, group, batch)
    for begin, count in ((0, 1), (7, 9), (100, 64), (3, 300)):
        chosen = slice(begin, begin + count)
        part = LoraCase(name="", ranks=case.ranks, token_slots=slots[chosen], width=4864, slices=(896, 128))
        _, _, _, small = lora_inputs(part, dtype, "cuda")
        got = out[chosen].clone()
        lora_add(x[chosen], got, group, small)
        assert torch.equal(got, whole[chosen]), (begin, count)


@pytest.mark.parametrize("vocab", [17, 5003])
def test_sampling(vocab: int) -> None:
    raw, adjusted, parameters, keys = sampling_inputs(vocab, "cuda")
    for logits in (raw, adjusted):
        result = pick(raw, logits, parameters, keys, normaliser=True)
        assert_picked(result, raw, logits, parameters, keys)
        assert torch.equal(pick(raw, logits, parameters, keys, normaliser=False), result[:, :2])


def test_sampling_from_a_large_vocabulary_equals_torch() -> None:
    raw, adjusted, parameters, keys = sampling_inputs(152_064, "cuda")
    got = pick(raw, adjusted, parameters, keys, normaliser=True)
    expected = pick_torch(raw, adjusted, parameters, keys, normaliser=True)
    assert got[:, :2].tolist() == expected[:, :2].tolist()
    torch.testing.assert_close(got[:, 2].view(torch.float32), expected[:, 2].view(torch.float32), rtol=1e-5, atol=1e-4)
    alone = torch.cat(
        [
            pick(raw[i : i + 1], adjusted[i : i + 1], parameters[i : i + 1], keys[i : i + 1], normaliser=True)
            for i in range(len(raw))
        ]
    )
    assert torch.equal(alone, got), "a row's bits depend on the others"
