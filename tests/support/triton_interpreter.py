"""Check the Triton kernels against the naive references under Triton's interpreter, on CPU.

Run as a process of its own with TRITON_INTERPRET=1 set before anything imports Triton. Prints one JSON object: a list
of failures by operation. float32 and float16 only: the interpreter computes bfloat16 products wrongly without an error.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from triton.runtime import interpreter

from loramux_server.kernels.activation_triton import glu_triton
from loramux_server.kernels.attention_triton import paged_attention_triton
from loramux_server.kernels.lora_triton import lora_add_triton
from loramux_server.kernels.norm import add_rms_norm_torch, rms_norm_torch
from loramux_server.kernels.norm_triton import add_rms_norm_triton, rms_norm_triton
from loramux_server.kernels.rope_triton import rope_and_write_triton
from loramux_server.kernels.sampling_triton import pick_triton
from tests.support.kernel_cases import (
    ATTENTION_CASES,
    LORA_CASES,
    assert_close,
    attention_inputs,
    forward_batch,
    lora_inputs,
    naive_attention,
    naive_lora,
    naive_rope,
    rope_table,
)
from tests.support.sampling_cases import assert_picked, sampling_inputs


def repair_interpreter() -> None:
    """Let scalars bound loops under NumPy 2.4, which no longer turns arrays of one element into an int.

    Triton 3.6.0 relies on that in a private function; a release without the function needs no repair.
    """
    original = getattr(interpreter, "_patch_lang_tensor", None)
    if original is None:
        return

    def patched(tensor: type, scope: object) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


T = TypeVar("T")
DTYPES = (torch.float32, torch.float16)


def _chosen(cases: Sequence[T], dtype: torch.dtype) -> Sequence[T]:
    """All cases in float32, every third in float16: the interpreter is slow."""
    return cases if dtype == torch.float32 else cases[::3]


def check_attention(dtype: torch.dtype) -> None:
    """Attention cases, tuned and batch invariant."""
    for case in _chosen(ATTENTION_CASES, dtype):
        q, kv, batch = attention_inputs(case, dtype)
        expected = naive_attention(q, kv, batch, case)
        for invariant in (False, True):
            out = paged_attention_triton(
                q,
                kv,
                batch,
                scale=case.head_dim**-0.5,
                window=case.window,
                softcap=case.softcap,
                batch_invariant=invariant,
            )
            assert_close(out, expected, dtype, f"{case.name} invariant={invariant}")


def check_lora(dtype: torch.dtype) -> None:
    """LoRA cases."""
    for case in _chosen(LORA_CASES, dtype):
        x, out, group, batch = lora_inputs(case, dtype)
        expected = naive_lora(x, out, group, case.token_slots)
        lora_add_triton(x, out, group, batch)
        assert_close(out, expected, dtype, case.name)


def check_norm(dtype: torch.dtype) -> None:
    """Both norms and cast orders."""
    torch.manual_seed(0)
    for shape in ((1, 8), (3, 97)):
        x, residual, weight = (
            torch.randn(shape).to(dtype),
            torch.randn(shape).to(dtype),
            torch.randn(shape[1]).to(dtype),
        )
        for offset in (0.0, 1.0):
            expected = rms_norm_torch(x, weight, 1e-6, offset=offset)
            assert_close(rms_norm_triton(x, weight, 1e-6, offset=offset), expected, dtype, "rms_norm")
            expected, total = add_rms_norm_torch(x, residual, weight, 1e-6, offset=offset)
            normed, sum_ = add_rms_norm_triton(x, residual, weight, 1e-6, offset=offset)
            assert torch.equal(sum_, total)
            assert_close(normed, expected, dtype, "add_rms_norm")


def check_activation(dtype: torch.dtype) -> None:
    """Both activations."""
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(3, 202)).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert_close(glu_triton(gate_up, "silu"), torch.nn.functional.silu(gate) * up, dtype, "silu")
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert_close(glu_triton(gate_up, "gelu_tanh"), expected, dtype, "gelu_tanh")


def check_rope(dtype: torch.dtype) -> None:
    """Full and partial rotation, cache writes."""
    torch.manual_seed(0)
    tables = torch.tensor([[5, 2, 7], [1, 4, 0]], dtype=torch.int32)
    batch = forward_batch(((1, 9), (4, 6)), tables, 4, 6)
    for head_dim, rotary in ((64, 64), (96, 96), (80, 32)):
        fused = torch.randn(6, 7 * head_dim).to(dtype)
        q, k, v = (part.unflatten(1, (-1, head_dim)) for part in fused.split([n * head_dim for n in (3, 2, 2)], 1))
        kv = torch.full((8, 2, 4, 2, head_dim), torch.nan, dtype=dtype)
        table = rope_table(16, rotary)
        out = rope_and_write_triton(q, k, v, table, batch, kv)
        assert_close(out, naive_rope(q, table, batch.positions), dtype, "q")
        flat = kv.transpose(1, 2).flatten(0, 1)
        assert_close(flat[batch.kv_slots[:5], 0], naive_rope(k, table, batch.positions)[:5], dtype, "k")
        assert torch.equal(flat[batch.kv_slots[:5], 1], v[:5])
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[batch.kv_slots] = False
        assert flat[untouched].isnan().all()


def check_sampling(dtype: torch.dtype) -> None:
    """Tokens and log-probabilities; rows that are not finite or have nothing left."""
    if dtype != torch.float32:
        return
    for vocab in (17, 1000, 5003):
        raw, adjusted, parameters, keys = sampling_inputs(vocab)
        for logits in (raw, adjusted):
            for normaliser in (False, True):
                result = pick_triton(raw, logits, parameters, keys, normaliser=normaliser)
                assert_picked(result, raw, logits, parameters, keys)
    for value in (torch.nan, torch.inf, -torch.inf):
        raw, adjusted, parameters, keys = sampling_inputs(100)
        raw[4, 50] = value
        result = pick_triton(raw, raw, parameters, keys, normaliser=False)
        assert result[:, 1].tolist() == [int(row != 4) for row in range(len(raw))]
        assert bool(((result[:, 0] >= 0) & (result[:, 0] < 100)).all())
        adjusted[:] = -torch.inf
        tokens = pick_triton(raw, adjusted, parameters, keys, normaliser=True)[:, 0]
        assert bool(((tokens >= 0) & (tokens < 100)).all())


CHECKS: dict[str, Callable[[torch.dtype], None]] = {
    "attention": check_attention,
    "lora": check_lora,
    "norm": check_norm,
    "activation": check_activation,
    "rope": check_rope,
    "sampling": check_sampling,
}


def main() -> None:
    """Run every check and print the failures."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("TRITON_INTERPRET=1 must be set")
    repair_interpreter()
    failures: dict[str, list[str]] = {}
    report, sys.stdout = sys.stdout, sys.stderr
    for name, check in CHECKS.items():
        failures[name] = []
        for dtype in DTYPES:
            try:
                check(dtype)
            except Exception:  # noqa: BLE001 - reported to the parent process
                failures[name].append(f"{dtype}\n{traceback.format_exc()}")
    json.dump(failures, report)


if __name__ == "__main__":
    main()
