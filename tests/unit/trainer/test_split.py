from pathlib import Path

import pytest

from loramux_trainer.data.conversation import Conversation, Message
from loramux_trainer.data.split import normalized, split, unique, with_default_system
from loramux_trainer.errors import ConfigError


def _talk(question: str, answer: str, group: str | None = None) -> Conversation:
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Conversation(messages=turns, file=Path("a.jsonl"), line=1, group=group)


def test_exact_duplicates_go_whatever_their_width_and_spaces() -> None:
    talks = [_talk("Where?", "Here"), _talk(" Where\uff1f ", "Here"), _talk("Where?", "here"), _talk("Where?", "Here")]
    assert unique(talks) == [talks[0], talks[2]]


def test_text_keeps_its_characters_unless_asked() -> None:
    talk = _talk("Cafe\u0301\uff1f", "m\u00b2")
    (nfc,) = normalized([talk], "nfc")
    assert [message.content for message in nfc.messages] == ["Caf\u00e9\uff1f", "m\u00b2"]
    (nfkc,) = normalized([talk], "nfkc")
    assert [message.content for message in nfkc.messages] == ["Caf\u00e9?", "m2"]
    assert normalized([talk], "none") == [talk]


def test_groups_stay_on_one_side() -> None:
    talks = [_talk(f"question {index // 3}", f"answer {index}") for index in range(90)]
    talks += [_talk(f"other {index}", "answer", group=f"customer {index % 5}") for index in range(30)]
    train, held = split(talks, share=0.2, seed=1)
    assert len(train) + len(held) == 120
    assert 18 <= len(held) <= 30
    keys = [{item.group or item.messages[0].content for item in side} for side in (train, held)]
    assert not keys[0] & keys[1]


def test_the_split_depends_on_content_and_seed_alone() -> None:
    talks = [_talk(f"question {index}", "answer") for index in range(50)]
    held = {item.messages[0].content for item in split(talks, share=0.1, seed=1)[1]}
    assert len(held) == 5
    assert held == {item.messages[0].content for item in split(talks[::-1], share=0.1, seed=1)[1]}
    assert held != {item.messages[0].content for item in split(talks, share=0.1, seed=2)[1]}


def test_one_group_cannot_be_split() -> None:
    talks = [_talk("same", "one"), _talk("Same", "two")]
    with pytest.raises(ConfigError, match="1 group"):
        split(talks, share=0.1, seed=1)
    assert split(talks, share=0, seed=1) == (talks, [])


def test_a_default_system_prompt_goes_where_there_is_none() -> None:
    own = Conversation(messages=(Message(role="system", content="own"),), file=Path("a"), line=1)
    first, second = with_default_system([_talk("a", "b"), own], "default")
    assert first.messages[0] == Message(role="system", content="default")
    assert second == own
