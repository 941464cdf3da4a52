import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from loramux_base.adapter import AdapterFormatError, read_layout, version_digest
from loramux_base.shapes import UnsupportedBase, base_shapes
from tests.support.adapters import (
    TINY_CONFIG,
    header_of,
    safetensors_bytes,
    tensor_name,
    tensors_of,
    tiny_base,
    write_adapter,
)

BASE = tiny_base()
Q0 = tensor_name(0, "q_proj", "A")


def refused(directory: Path, max_rank: int = 64) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as caught:
        read_layout(directory, BASE, max_rank=max_rank)
    assert caught.value.message == str(caught.value)
    assert str(directory) not in caught.value.message
    return caught.value


def test_layout_of_a_full_adapter(tmp_path: Path) -> None:
    tensors = tensors_of(BASE, rank=5)
    layout = read_layout(write_adapter(tmp_path / "a", tensors, r=5, lora_alpha=10), BASE, max_rank=8)
    assert len(layout.modules) == BASE.num_layers * 7
    first = layout.modules[0]
    assert (first.layer, first.module, first.rank, first.scale) == (0, "q_proj", 5, 2.0)
    assert (first.a_name, first.b_name) == (Q0, tensor_name(0, "q_proj", "B"))
    assert (layout.max_rank, layout.rank_units) == (5, 1)
    assert layout.tensor_bytes == sum(len(data) for _, _, data in tensors.values())
    assert [module.layer for module in layout.modules] == sorted(module.layer for module in layout.modules)


@pytest.mark.parametrize(("rank", "units"), [(1, 1), (16, 1), (17, 2), (64, 4)])
def test_rank_units(tmp_path: Path, rank: int, units: int) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE, rank=rank, modules=["o_proj"]), r=rank)
    assert read_layout(directory, BASE, max_rank=64).rank_units == units


def test_any_subset_of_modules_and_layers(tmp_path: Path) -> None:
    directory = write_adapter(
        tmp_path / "a",
        tensors_of(BASE, layers=[2], modules=["down_proj", "k_proj"]),
        layers_to_transform=[2],
        target_modules=["down_proj", "k_proj"],
    )
    layout = read_layout(directory, BASE, max_rank=8)
    assert [(part.layer, part.module) for part in layout.modules] == [(2, "k_proj"), (2, "down_proj")]


def test_language_model_prefix(tmp_path: Path) -> None:
    tensors = {
        name.replace("model.model.layers", "model.model.language_model.layers"): tensor
        for name, tensor in tensors_of(BASE, modules=["q_proj"]).items()
    }
    assert len(read_layout(write_adapter(tmp_path / "a", tensors), BASE, max_rank=8).modules) == BASE.num_layers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1, 2]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"a": 1}),
        ("target_parameters", ["mlp.w"]),
        ("use_qalora", True),
        ("use_bdlora", {"n": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 4.0),
        ("r", "4"),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(a+)+b": 4}),
        ("rank_pattern", {"(a|a)*b": 4}),
        ("rank_pattern", {".?" * 100: 4}),
        ("rank_pattern", {"(.|.)" * 40: 4}),
        ("rank_pattern", {"a)|(b": 4}),
        ("rank_pattern", {"(?=a)": 4}),
        ("rank_pattern", {r"(.)\1": 4}),
        ("rank_pattern", {"x" * 513: 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", "0"),
        ("some_future_method", {"on": True}),
    ],
)
def test_refused_settings(tmp_path: Path, field: str, value: Any) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE), **{field: value})
    error = refused(directory)
    assert (error.reason, error.field) == ("ADAPTER_INCOMPATIBLE", field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_alpha(tmp_path: Path, number: str) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE))
    (directory / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 4, "lora_alpha": {number}}}')
    assert refused(directory).reason == "ADAPTER_INCOMPATIBLE"


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "LORA", "r": 4, "r": 4}',
        "[]",
        "",
        "{",
        '{"a":' * 100_000,
        "\ufeff{}",
        '{"r": ' + "1" * 5000 + "}",
    ],
    ids=["duplicate", "list", "empty", "cut", "deep", "bom", "digits"],
)
def test_malformed_config(tmp_path: Path, text: str) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE))
    (directory / "adapter_config.json").write_text(text)
    assert refused(directory).field == "adapter_config.json"


def test_neutral_and_descriptive_settings_pass(tmp_path: Path) -> None:
    directory = write_adapter(
        tmp_path / "a",
        tensors_of(BASE),
        modules_to_save=[],
        init_lora_weights="gaussian",
        lora_dropout=0.1,
        base_model_name_or_path="some/base",
        task_type="CAUSAL_LM",
        loftq_config={},
        megatron_core="megatron.core",
        future_list=[],
        future_flag=False,
        target_modules="all-linear",
        exclude_modules=".*lm_head",
    )
    assert read_layout(directory, BASE, max_rank=4).max_rank == 4


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("base_model.model.lm_head.lora_A.weight", "lm_head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
        (Q0.replace("lora_A.weight", "lora_magnitude_vector"), "DoRA"),
        (Q0.replace("lora_A.weight", "lora_B.bias"), "bias"),
        ("base_model.model.lm_head.modules_to_save.weight", "lm_head"),
        ("base_model.model.score.modules_to_save.weight", "fully trained"),
        (Q0.replace("base_model.", ""), "base_model.model."),
        (Q0.replace("q_proj", "w_proj"), "may target"),
        (Q0.replace("self_attn", "mlp"), "may target"),
        (Q0.replace("layers.0", "layers.3"), "3 layers"),
        (Q0.replace("layers.0", "layers.00"), "unknown tensor"),
        (Q0.replace("layers.0", "layers.\u0660"), "unknown tensor"),
        (Q0 + "\n", "unknown tensor"),
        (Q0.replace("lora_A", "lora_A.default"), "unknown tensor"),
        ("../../etc/passwd", "unknown tensor"),
        ("\0", "unknown tensor"),
        ("\ud800", "unknown tensor"),
        ("x" * 3000, "unknown tensor"),
    ],
)
def test_refused_tensor_names(tmp_path: Path, name: str, match: str) -> None:
    tensors = tensors_of(BASE, modules=["q_proj"])
    tensors[name] = ("F32", [4, 32], bytes(4 * 32 * 4))
    error = refused(write_adapter(tmp_path / "a", tensors))
    assert error.field == ascii(name)[1:-1][:200]
    assert match in error.message
    assert len(error.message) < 400
    assert error.message.isascii()


def test_missing_half(tmp_path: Path) -> None:
    tensors = tensors_of(BASE)
    del tensors[tensor_name(1, "v_proj", "B")]
    error = refused(write_adapter(tmp_path / "a", tensors))
    assert error.field == tensor_name(1, "v_proj", "A")
    assert "lora_B" in error.message


def test_two_names_for_one_module(tmp_path: Path) -> None:
    tensors = tensors_of(BASE, modules=["q_proj"])
    name = tensor_name(0, "q_proj", "B")
    tensors[name.replace("model.model.layers", "model.model.language_model.layers")] = tensors.pop(name)
    assert "two names" in refused(write_adapter(tmp_path / "a", tensors)).message


def test_wrong_shapes_and_ranks(tmp_path: Path) -> None:
    tensors = tensors_of(BASE)
    assert "shape" in refused(write_adapter(tmp_path / "rank", tensors, r=5)).message
    swapped = {**tensors, Q0: ("F32", [32, 4], tensors[Q0][2])}
    assert refused(write_adapter(tmp_path / "shape", swapped)).field == Q0
    over = refused(write_adapter(tmp_path / "over", tensors_of(BASE, rank=9), r=9), max_rank=8)
    assert (over.field, "limit of 8" in over.message) == ("r", True)
    over = refused(write_adapter(tmp_path / "pattern", tensors, rank_pattern={"q_proj": 9}), max_rank=8)
    assert over.field == "rank_pattern"


def test_tensors_that_the_config_leaves_out(tmp_path: Path) -> None:
    tensors = tensors_of(BASE)
    for number, extra in enumerate(
        ({"layers_to_transform": [0, 1]}, {"target_modules": ["q_proj"]}, {"exclude_modules": ["mlp.up_proj"]})
    ):
        assert "leave it out" in refused(write_adapter(tmp_path / str(number), tensors, **extra)).message


def test_header_damage(tmp_path: Path) -> None:
    tensors = tensors_of(BASE, modules=["q_proj"], layers=[0])
    good = safetensors_bytes(tensors)
    b_name = tensor_name(0, "q_proj", "B")

    def with_header(**changes: Any) -> bytes:
        header = header_of(tensors)
        for name, change in changes.items():
            header[{"a": Q0, "b": b_name}[name]].update(change)
        return safetensors_bytes(tensors, header)

    raw = json.dumps(header_of(tensors))
    cases = {
        "empty": (b"", "no header"),
        "seven bytes": (good[:7], "no header"),
        "huge": (struct.pack("<Q", 2**63) + good[8:], "more than 1048576"),
        "mebibyte": (struct.pack("<Q", (1 << 20) + 1) + b"{" + b" " * (1 << 20), "more than 1048576"),
        "past end": (struct.pack("<Q", len(good)) + good[8:], "past the end"),
        "data cut": (good[:-1], "truncated"),
        "data over": (good + b"\0", "no tensor names"),
        "not an object": (safetensors_bytes(tensors, b"  " + raw.encode()), "does not begin"),
        "not json": (safetensors_bytes(tensors, b"{" + raw.encode()), "valid UTF-8 JSON"),
        "not utf-8": (safetensors_bytes(tensors, b'{"\xff": 1}'), "valid UTF-8 JSON"),
        "twice": (safetensors_bytes(tensors, (raw[:-1] + ", " + raw[1:]).encode()), "twice"),
        "metadata": (safetensors_bytes(tensors, b'{"__metadata__": {"a": 1}}'), "__metadata__"),
        "nothing": (safetensors_bytes({}, b"{}"), "no tensors"),
        "overlap": (with_header(b={"data_offsets": [0, 512]}), "overlaps"),
        "hole": (with_header(b={"data_offsets": [516, 1028]}), "hole"),
        "past eof": (with_header(b={"data_offsets": [2**40, 2**40 + 512]}), "hole"),
        "negative": (with_header(a={"data_offsets": [-512, 0]}), "do not span"),
        "bool": (with_header(a={"data_offsets": [False, 512]}), "do not span"),
        "float": (with_header(a={"shape": [4.0, 32]}), "non-empty matrix"),
        "vector": (with_header(a={"shape": [128]}), "non-empty matrix"),
        "zero": (with_header(a={"shape": [0, 32], "data_offsets": [0, 0]}), "non-empty matrix"),
        "overflow": (with_header(a={"shape": [2**40, 2**40]}), "do not span"),
        "dtype": (with_header(a={"dtype": "F8_E4M3"}), "dtype"),
        "int": (with_header(a={"dtype": "I32"}), "dtype"),
        "size": (with_header(a={"dtype": "F16"}), "do not span"),
        "extra key": (with_header(a={"x": 1}), "exactly"),
    }
    directory = write_adapter(tmp_path / "a", tensors)
    for label, (data, match) in cases.items():
        (directory / "adapter_model.safetensors").write_bytes(data)
        assert match in refused(directory).message, label


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "a.pt", "optimizer.PT", "x.pkl", "w.zip"])
def test_pickles_are_named(tmp_path: Path, name: str) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE))
    (directory / name).write_bytes(b"x")
    error = refused(directory)
    assert error.field == name
    assert "pickle" in error.message


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "modeling.py", "hook.so"])
def test_code_and_templates_are_refused(tmp_path: Path, name: str) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE))
    (directory / name).write_bytes(b"x")
    assert "base only" in refused(directory).message


def test_directory_contents(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE))
    (directory / "README.md").write_text("hello")
    (directory / "tokenizer.json").write_text("{}")
    read_layout(directory, BASE, max_rank=4)
    (directory / "adapter_model-00002.safetensors").write_bytes(b"x")
    assert "one adapter_model.safetensors" in refused(directory).message
    (directory / "adapter_model-00002.safetensors").unlink()
    (directory / "sub").mkdir()
    assert refused(directory).field == "sub"
    (directory / "sub").rmdir()
    secret = tmp_path / "secret"
    secret.write_text("{}")
    os.symlink(secret, directory / "notes.txt")
    assert "link" in refused(directory).message
    os.unlink(directory / "notes.txt")
    os.symlink(directory, tmp_path / "link")
    assert refused(tmp_path / "link").field == "directory"
    assert refused(tmp_path / "nowhere").field == "directory"
    for number in range(64):
        (directory / f"{number}.txt").write_text("")
    assert "64 entries" in refused(directory).message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    directory = write_adapter(tmp_path / "a", tensors_of(BASE))
    (directory / name).unlink()
    assert refused(directory).field == name


def test_digest_covers_what_decides_the_output(tmp_path: Path) -> None:
    tensors = tensors_of(BASE)
    plain = version_digest(write_adapter(tmp_path / "a", tensors))
    assert len(plain) == 64
    same = {
        "notes": {"task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "lora_dropout": 0.1},
        "float": {"lora_alpha": 8.0},
        "targets": {"target_modules": "all-linear"},
    }
    for label, config in same.items():
        assert version_digest(write_adapter(tmp_path / label, tensors, **config)) == plain, label
    other = {
        "alpha": {"lora_alpha": 9},
        "rslora": {"use_rslora": True},
        "alpha pattern": {"alpha_pattern": {"q_proj": 3}},
        "rank pattern": {"rank_pattern": {"q_proj": 4}},
        "layers": {"layers_to_transform": [0, 1, 2]},
        "manifest": {"manifest": {"format_version": 1, "base_fingerprint": "0" * 64}},
    }
    digests = {version_digest(write_adapter(tmp_path / label, tensors, **config)) for label, config in other.items()}
    digests.add(version_digest(write_adapter(tmp_path / "value", tensors_of(BASE, value=0.25))))
    assert len(digests | {plain}) == len(other) + 2
    (tmp_path / "a" / "README.md").write_text("not part of it")
    assert version_digest(tmp_path / "a") == plain


def test_digest_is_the_documented_function(tmp_path: Path) -> None:
    import hashlib

    directory = write_adapter(tmp_path / "a", tensors_of(BASE))
    config = (
        b'{"alpha_pattern":[],"layers_to_transform":null,"lora_alpha":8.0,"peft_type":"LORA","r":4,'
        b'"rank_pattern":[],"use_rslora":false}'
    )
    total = hashlib.sha256()
    for name, data in (
        (b"adapter_config.json", config),
        (b"adapter_model.safetensors", (directory / "adapter_model.safetensors").read_bytes()),
    ):
        total.update(struct.pack("<Q", len(name)) + name + struct.pack("<QQ", len(data), 32))
        total.update(hashlib.sha256(data).digest())
    assert version_digest(directory) == total.hexdigest()


def test_shapes() -> None:
    shapes = base_shapes(TINY_CONFIG)
    assert shapes.num_layers == 3
    assert shapes.modules["k_proj"] == (32, 16)
    assert shapes.modules["down_proj"] == (48, 32)
    wide = base_shapes({"text_config": {**TINY_CONFIG, "head_dim": 16}})
    assert (wide.modules["q_proj"], wide.modules["o_proj"]) == ((32, 64), (64, 32))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "phi3"},
        {"num_local_experts": 8},
        {"hidden_size": None},
        {"hidden_size": True},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 5},
    ],
)
def test_shapes_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedBase):
        base_shapes({**TINY_CONFIG, **change})
