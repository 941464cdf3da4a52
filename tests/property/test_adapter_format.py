"""Damaged adapters: refused with our own error, never with another one, and what we take the library takes too."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loramux_base.adapter import AdapterConfig, AdapterFormatError, read_layout
from loramux_base.manifest import AdapterManifest
from tests.support.adapters import header_of, safetensors_bytes, tensors_of, tiny_base, write_adapter

BASE = tiny_base()
TENSORS = tensors_of(BASE, layers=[0], modules=["q_proj", "o_proj"])
GOOD = safetensors_bytes(TENSORS)
HEADER = json.dumps(header_of(TENSORS)).encode()
SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(directory: Path, data: bytes) -> None:
    write_adapter(directory, TENSORS)
    path = directory / "adapter_model.safetensors"
    path.write_bytes(data)
    try:
        layout = read_layout(directory, BASE, max_rank=8)
    except AdapterFormatError as error:
        assert error.message.isascii()
        assert len(error.message) < 500
        return
    with safe_open(path, framework="np") as file:
        for part in layout.modules:
            assert tuple(file.get_slice(part.a_name).get_shape()) == (part.rank, BASE.modules[part.module][0])
            assert tuple(file.get_slice(part.b_name).get_shape()) == (BASE.modules[part.module][1], part.rank)


@SETTINGS
@given(changes=st.lists(st.tuples(st.integers(0, len(HEADER) + 8), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, byte in changes:
        data[place] = byte
    check(tmp_path, bytes(data))


@SETTINGS
@given(cut=st.integers(0, len(GOOD)), tail=st.binary(max_size=8))
def test_cut_and_extended(tmp_path: Path, cut: int, tail: bytes) -> None:
    check(tmp_path, GOOD[:cut] + tail)


SIZES = st.one_of(st.integers(-1, 600), st.sampled_from([2**31, 2**53, 2**63, 2**64, True, None, 1.0, "4"]))


@SETTINGS
@given(
    name=st.sampled_from(sorted(TENSORS)),
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.one_of(st.lists(SIZES, max_size=3), st.sampled_from(["F16", "BF16", "F64", "BOOL", "", None, {}])),
)
def test_changed_header_fields(tmp_path: Path, name: str, field: str, value: Any) -> None:
    header = header_of(TENSORS)
    header[name][field] = value
    raw = json.dumps(header).encode()
    check(tmp_path, struct.pack("<Q", len(raw)) + raw + GOOD[8 + len(HEADER) :])


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
KEYS = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"]
OTHER_KEYS = ["target_modules", "exclude_modules", "bias", "init_lora_weights", "modules_to_save", "use_dora", "x"]


@settings(max_examples=400, deadline=None)
@given(values=st.dictionaries(st.sampled_from(KEYS + OTHER_KEYS), JSON, max_size=3))
def test_any_configuration(values: dict[str, Any]) -> None:
    data = json.dumps({"peft_type": "LORA", **values}).encode()
    try:
        config = AdapterConfig.from_json(data)
    except AdapterFormatError as error:
        assert error.message.isascii()
        return
    path = "model.layers.0.self_attn.q_proj"
    assert config.rank_of(path) > 0
    assert abs(config.scale_of(path)) < 1e39
    again = AdapterConfig.from_json(json.dumps(json.loads(data)).encode())
    assert again.canonical() == config.canonical()


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_manifest(data: bytes) -> None:
    with pytest.raises(AdapterFormatError):
        AdapterManifest.from_json(data)


@settings(max_examples=300, deadline=None)
@given(pattern=st.text(alphabet="ab.*+?()|[]{}^$\\1,2<!=:", max_size=24))
def test_any_pattern_ends_soon(pattern: str) -> None:
    """No pattern that is taken can backtrack for long; a timeout of the whole test would show it."""
    data = json.dumps({"peft_type": "LORA", "alpha_pattern": {pattern: 2}}).encode()
    try:
        config = AdapterConfig.from_json(data)
    except AdapterFormatError:
        return
    config.scale_of("model.layers.0." + "ab" * 16 + ".q_proj")
