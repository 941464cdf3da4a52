import json
import os
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.files import read_conversations
from loramux_trainer.errors import DataError

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def _read(path: Path, shape: str = "auto", group_key: str | None = None) -> list[list[tuple[str, str]]]:
    found = read_conversations([path], shape=shape, group_key=group_key)
    return [[(message.role, message.content) for message in item.messages] for item in found]


def _turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "U"},
                {"role": "assistant", "content": "A"},
            ],
            "source": "metadata stays out",
        },
        {"system": "S", "dialogue": [{"user": "U", "assistant": "A"}]},
        {"system": "S", "conversation": [{"human": "U", "assistant": "A"}]},
    ],
)
def test_each_shape_gives_the_same_messages(tmp_path: Path, record: dict[str, Any]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + json.dumps(record) + "\n\n", encoding="utf-8")
    assert _read(file) == [[("system", "S"), ("user", "U"), ("assistant", "A")]]


def test_no_system_prompt_is_invented(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"dialogue": [{"user": "U", "assistant": "A"}]}]))
    assert _read(file) == [[("user", "U"), ("assistant", "A")]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "bad JSON: Expecting value at column 15"),
        ('{"messages": NaN}', "bad JSON: NaN is no JSON"),
        ('{"messages": [], "messages": []}', "key 'messages' is there twice"),
        ("[1]", "a record must be an object"),
        ("null", "a record must be an object, this is missing or null"),
        ("[" * 100_000, "bad JSON: lists or objects are nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "bad JSON: a number has 5000 digits, at most 1000 are taken"),
        ('{"messages": "a\0b"}', "bad JSON: Invalid control character at column 16"),
        ('{"dialogue": [{"user": "U", "assistant": "\\u200b\\u0007 \\ufeff"}]}', "empty turn: turn 1 (assistant)"),
        (
            '{"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A", "weight": 0}]}',
            "message 2 has weight 0; turns are not weighted yet",
        ),
        ("{}", "none of them is there"),
        ('{"messages": [], "dialogue": []}', "2 of them are there"),
        ('{"messages": []}', "no assistant turn"),
        (json.dumps(_turns("user")), "no assistant turn"),
        (json.dumps(_turns("system", "user")), "no assistant turn"),
        (json.dumps(_turns("assistant", "user")), "wrong role order: message 1 is assistant, expected user"),
        (json.dumps(_turns("user", "user", "assistant")), "wrong role order: message 2 is user, expected assistant"),
        (json.dumps(_turns("user", "system", "assistant")), "wrong role order: message 2 is a system message"),
        (json.dumps(_turns("user", "assistant", "user")), "ends with a user turn that nobody answers"),
        (json.dumps(_turns("user", "gpt")), "message 2 has role 'gpt'"),
        ('{"messages": [{"role": "user", "content": " "}]}', "empty turn: message 1 (user) has no text"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 (user) must be text, it is a number"),
        ('{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "tools are not trained yet"),
        ('{"dialogue": [{"user": "U", "assistant": ""}]}', "empty turn: turn 1 (assistant)"),
        ('{"dialogue": [{"human": "U", "assistant": "A"}]}', "unknown key 'human'"),
        ('{"dialogue": [{"user": "U"}]}', "turn 1 has no 'assistant'"),
        ('{"conversation": [{"human": "U", "assistant": "A"}], "system": ""}', "empty turn: 'system'"),
        ('{"dialogue": [{"user": "\\ud800", "assistant": "A"}]}', "half a surrogate pair"),
    ],
)
def test_a_broken_record_is_named_with_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(DataError) as caught:
        _read(file)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == (file, 3)
    assert reason in problem.reason
    assert str(caught.value).startswith(f"{file}:3: ")


@pytest.mark.parametrize(
    "line", ['{"KEY": 1, "KEY": 2}', '{"messages": [{"role": "KEY"}]}', '{"dialogue": [{"KEY": 1}]}']
)
def test_a_huge_value_is_not_repeated_in_the_message(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line.replace("KEY", "k" * 100_000))
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*kkk\.\.\.") as caught:
        _read(file)
    assert len(str(caught.value)) < 500


def test_what_is_no_regular_file_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.jsonl", "zero.jsonl", "folder.json"):
        with pytest.raises(DataError, match=f"{name}: is no regular file"):
            _read(tmp_path / name)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match=r"loop\.jsonl: cannot be read \(Too many levels of symbolic links\)"):
        _read(tmp_path / "loop.jsonl")


def test_all_problems_are_named_and_many_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text("x\n" * 30)
    with pytest.raises(DataError) as caught:
        _read(file)
    assert len(caught.value.problems) == 30
    assert "broken.jsonl:20:" in str(caught.value)
    assert str(caught.value).endswith("... and 10 more")


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: is not UTF-8"):
        _read(file)
    whole = tmp_path / "a.json"
    whole.write_bytes(b'[\n{"dialogue": "\xff"}]')
    with pytest.raises(DataError, match=r"a\.json:2: is not UTF-8 \(invalid start byte at byte 15 of the line\)"):
        _read(whole)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"dialogue": []},\n]', 2, "a comma with no conversation behind it"),
        ("[\n" + "[" * 100_000, 2, "nested too deeply"),
        ('[{"a": 1,\n"a": 2}]', 1, "key 'a' is there twice"),
        ('[\n{"messages": []},\n{"dialogue": 1}]', 3, "'dialogue' must be a list"),
        ('[\n{"dialogue": [\n', 3, "bad JSON"),
        ('[{"dialogue": []}\n{}]', 2, "expected ',' or ']'"),
        ('{"dialogue": []}', 1, "must hold a list"),
        ("[]", 0, "holds no conversation"),
    ],
)
def test_a_json_list_has_lines_too(tmp_path: Path, text: str, line: int, reason: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        _read(file)
    assert caught.value.problems[-1].line == line
    assert reason in caught.value.problems[-1].reason


@pytest.mark.parametrize("name", ["missing.jsonl", "table.csv"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    if name.endswith("csv"):
        (tmp_path / name).write_text("a,b")
    with pytest.raises(DataError, match=name):
        _read(tmp_path / name)


def test_a_record_without_its_group_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**GOOD, "customer": "c1"}) + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: group_key 'customer'"):
        _read(file, group_key="customer")
