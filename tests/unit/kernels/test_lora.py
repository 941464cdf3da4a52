"""LoRA update, torch form: against a token-by-token reference, and bit for bit between batch compositions."""

import random

import pytest
import torch

from loramux_server.kernels.lora import lora_add
from tests.support.kernel_cases import LORA_CASES, LoraCase, assert_close, lora_batch, lora_inputs, naive_lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_matches_reference(case: LoraCase, dtype: torch.dtype) -> None:
    x, out, group, batch = lora_inputs(case, dtype)
    expected = naive_lora(x, out, group, case.token_slots)
    before = out.clone()
    lora_add(x, out, group, batch)
    assert_close(out, expected, dtype, case.name)
    base = [t for t, slot in enumerate(case.token_slots) if slot < 0]
    assert torch.equal(out[base], before[base])


def test_strided_operands() -> None:
    case = LORA_CASES[2]
    x, out, group, batch = lora_inputs(case, torch.float32)
    expected = naive_lora(x, out, group, case.token_slots)
    wide_x = torch.full((len(x), x.shape[1] + 5), torch.nan)
    wide_out = torch.zeros((len(x), out.shape[1] + 3))
    wide_x[:, : x.shape[1]] = x
    wide_out[:, : out.shape[1]] = out
    lora_add(wide_x[:, : x.shape[1]], wide_out[:, : out.shape[1]], group, batch)
    assert_close(wide_out[:, : out.shape[1]], expected, torch.float32)
    assert not wide_out[:, out.shape[1] :].any()


def test_segments_follow_refilled_tensors() -> None:
    case = LORA_CASES[2]
    x, out, group, batch = lora_inputs(case, torch.float32)
    lora_add(x, out.clone(), group, batch)
    slots = tuple(reversed(case.token_slots))
    swapped = lora_batch(slots, case.spare_segments)
    for name in ("token_slots", "order", "segment_slots", "segment_starts"):
        getattr(batch, name).copy_(getattr(swapped, name))
    expected = naive_lora(x, out, group, slots)
    lora_add(x, out, group, batch)
    assert_close(out, expected, torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("width", "slices"), [(896, (896, 128, 128)), (1200, (896,)), (130, (77, 33))])
def test_bits_do_not_depend_on_batch(width: int, slices: tuple[int, ...], threads: int) -> None:
    rng = random.Random(11)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ranks = tuple(tuple(rank for _ in slices) for rank in (16, 8, 5, 33))
        slots = tuple(rng.randint(-1, 3) for _ in range(90))
        case = LoraCase(name="invariance", ranks=ranks, token_slots=slots, width=width, slices=slices)
        x, out, group, batch = lora_inputs(case, torch.float32)
        whole = out.clone()
        lora_add(x, whole, group, batch)
        for _ in range(16):
            chosen = rng.sample(range(len(slots)), rng.choice([1, 2, 3, 5, 7, 9, 13, 33, 64]))
            part = out[chosen].clone()
            lora_add(x[chosen], part, group, lora_batch(tuple(slots[t] for t in chosen)))
            assert torch.equal(part, whole[chosen])
    finally:
        torch.set_num_threads(before)
