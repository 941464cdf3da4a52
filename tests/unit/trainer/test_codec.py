import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loramux_server.text.tokenizer import Tokenizer
from loramux_trainer.data.codec import IGNORED, Codec, EncodingError, Sequence
from loramux_trainer.data.files import read_conversations
from loramux_trainer.errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = {
    "openai": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!\n"},
            {"role": "user", "content": "你好？"},
            {"role": "assistant", "content": "Köln, naïve"},
        ]
    },
    "dialogue": {
        "system": "Be brief.",
        "dialogue": [{"user": "Hi", "assistant": "Hello!\n"}, {"user": "你好？", "assistant": "Köln, naïve"}],
    },
    "conversation": {
        "system": "Be brief.",
        "conversation": [{"human": "Hi", "assistant": "Hello!\n"}, {"human": "你好？", "assistant": "Köln, naïve"}],
    },
}
GOLDEN = [
    ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
    ("Hello!\n<|im_end|>", True),
    ("\n<|im_start|>user\n你好？<|im_end|>\n<|im_start|>assistant\n", False),
    ("Köln, naïve<|im_end|>", True),
    ("\n", False),
]
"""What is rendered, in pieces, and whether a piece carries loss; written by hand."""


def _sequences(codec: Codec, record: dict[str, Any], directory: Path) -> list[Sequence]:
    file = directory / "one.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (conversation,) = read_conversations([file], shape="auto", group_key=None)
    return codec.sequences(conversation, 3)


def _pieces(codec: Codec, sequence: Sequence) -> list[tuple[str, bool]]:
    """Runs of tokens with and without loss, decoded."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        assert label in (token, IGNORED)
        if not runs or runs[-1][1] != (label != IGNORED):
            runs.append(([], label != IGNORED))
        runs[-1][0].append(token)
    return [(codec.decode(ids), counted) for ids, counted in runs]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_labels_equal_the_golden_mask(base: Path, tmp_path: Path, shape: str) -> None:
    codec = Codec.from_directory(base)
    (sequence,) = _sequences(codec, SHAPES[shape], tmp_path)
    assert _pieces(codec, sequence) == GOLDEN
    assert (sequence.conversation, sequence.place) == (3, "one.jsonl:1")


def test_the_prompt_is_what_the_server_encodes_and_the_stop_token_is_learned(base: Path, tmp_path: Path) -> None:
    codec, served = Codec.from_directory(base), Tokenizer.from_directory(base)
    (sequence,) = _sequences(codec, SHAPES["openai"], tmp_path)
    messages = SHAPES["openai"]["messages"]
    for turns in (2, 4):
        prompt = served.encode(codec.prompt(messages[:turns]), add_special_tokens=False)
        assert list(sequence.input_ids[: len(prompt)]) == prompt
        assert sequence.labels[len(prompt) - 1] == IGNORED
        assert sequence.labels[len(prompt)] != IGNORED
    assert codec.stop_ids == frozenset(served.eos_token_ids)
    assert [label for label in sequence.labels if label in codec.stop_ids] == [*codec.stop_ids] * 2


def _with_template(base: Path, directory: Path, template: str) -> Codec:
    shutil.copytree(base, directory)
    (directory / "chat_template.jinja").write_text(template)
    return Codec.from_directory(directory)


def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_a_turn(base: Path, tmp_path: Path) -> None:
    # As templates of reasoning models: earlier answers lose a part that the last one still has.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{{ m.content.split('#')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    codec = _with_template(base, tmp_path / "base", template)
    record = {"dialogue": [{"user": "a", "assistant": "think#b"}, {"user": "c", "assistant": "think#d"}]}
    first, second = _sequences(codec, record, tmp_path)
    assert [text for text, counted in _pieces(codec, first) if counted] == ["think#b<|im_end|>"]
    assert [text for text, counted in _pieces(codec, second) if counted] == ["think#d<|im_end|>"]
    assert "think#b" not in codec.decode(list(second.input_ids))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "no stop token"),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "another text before a given answer",
        ),
        ("{{ raise_exception('no') }}", "refuses this chat"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(base: Path, tmp_path: Path, template: str, reason: str) -> None:
    codec = _with_template(base, tmp_path / "base", template)
    with pytest.raises(EncodingError, match=reason):
        _sequences(codec, SHAPES["dialogue"], tmp_path)


def test_special_tokens_in_the_text_are_refused(base: Path, tmp_path: Path) -> None:
    record = {"dialogue": [{"user": "a", "assistant": "b<|im_end|>c"}]}
    with pytest.raises(EncodingError, match=r"message 2 contains the special token <\|im_end\|>"):
        _sequences(Codec.from_directory(base), record, tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"), [("tokenizer.json", "no tokenizer.json"), ("tokenizer_config.json", "no chat template")]
)
def test_a_base_without_its_files_is_refused(base: Path, tmp_path: Path, name: str, reason: str) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    with pytest.raises(ConfigError, match=reason):
        Codec.from_directory(tmp_path / "base")
