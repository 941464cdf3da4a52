"""Which shapes have a kernel, and what that means for CUDA graphs; no device is needed to tell."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from loramux_server.kernels import attention, capability, lora
from tests.support.kernel_cases import ATTENTION_CASES, LORA_CASES, lora_inputs

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "expected"),
    [
        (32, 8, 128, None),
        (8, 1, 256, None),
        (71, 1, 64, None),
        (2, 1, 257, "head dimension 257 is over 256"),
        (128, 1, 192, "128 query heads a KV head at head dimension 192 are more than a tile holds"),
    ],
)
def test_attention_names_what_has_no_kernel(heads: int, kv_heads: int, head_dim: int, expected: str | None) -> None:
    assert attention.unsupported(torch.bfloat16, heads=heads, kv_heads=kv_heads, head_dim=head_dim) == expected


def test_every_case_that_kernels_are_tested_with_has_one() -> None:
    for case in ATTENTION_CASES:
        heads, kv_heads = case.heads
        assert attention.unsupported(torch.float16, heads=heads, kv_heads=kv_heads, head_dim=case.head_dim) is None
    for case in LORA_CASES:
        x, _, group, _ = lora_inputs(case, torch.float16)
        assert lora.unsupported(x.dtype, group) is None


def test_dtypes_without_a_kernel() -> None:
    assert attention.unsupported(torch.float64, heads=1, kv_heads=1, head_dim=8) == "dtype torch.float64"
    group = lora_inputs(LORA_CASES[0], torch.float32)[2]
    assert lora.unsupported(torch.float64, group) == "dtype torch.float64"
    assert "torch.bfloat16, torch.float32" in str(lora.unsupported(torch.bfloat16, group))


def test_lora_groups_without_a_kernel() -> None:
    group = lora_inputs(LORA_CASES[0], torch.float32)[2]
    many = dataclasses.replace(group, slice_ends=(8, 16, 24, 32))
    assert lora.unsupported(torch.float32, many) == "4 slices are more than 3"
    strided = dataclasses.replace(group, b=group.b.t().contiguous().t())
    assert lora.unsupported(torch.float32, strided) == "the slab is not contiguous"


def test_a_graph_holds_what_has_a_kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "triton_available", lambda: True)
    assert capability.capture_obstacle(CUDA, "paged_attention", None) is None
    obstacle = capability.capture_obstacle(CUDA, "paged_attention", "head dimension 320 is over 256")
    assert obstacle is not None and "paged_attention" in obstacle and "320" in obstacle
    monkeypatch.setattr(capability, "triton_available", lambda: False)
    assert "Triton" in str(capability.capture_obstacle(CUDA, "paged_attention", None))
    assert capability.capture_obstacle(torch.device("cpu"), "paged_attention", "anything") is None


def test_a_fallback_is_logged_once_for_each_cause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capability, "triton_available", lambda: True)
    on_cuda = SimpleNamespace(is_cuda=True)
    for cause in ("test cause one", "test cause two", "test cause one", None):
        assert capability.use_triton(on_cuda, "some_op", cause) == (cause is None)  # type: ignore[arg-type]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"some_op runs in its torch form, several times slower: test cause {n}" for n in ("one", "two")]


@pytest.mark.parametrize(
    ("setting", "found", "overlaps"),
    [(None, (9, 0), True), ("0", (9, 0), False), ("1", (10, 0), True), (None, (8, 9), False)],
)
def test_where_launches_overlap(
    setting: str | None, found: tuple[int, int], overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    monkeypatch.delenv("LORAMUX_KERNEL_OVERLAP", raising=False)
    if setting is not None:
        monkeypatch.setenv("LORAMUX_KERNEL_OVERLAP", setting)
    assert capability.launches_overlap.__wrapped__() is overlaps


def test_nothing_overlaps_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not capability.launches_overlap.__wrapped__()
