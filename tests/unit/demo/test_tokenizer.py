import itertools
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from loramux_base.template import ChatTemplate, TemplateError
from loramux_demo.answers import FORMS, answer
from loramux_demo.corpus import Conversation, Corpus, profile_question, profile_text
from loramux_demo.knowledge import profiles
from loramux_demo.tokenizer import END, IGNORED, encode_conversations, save_tokenizer, train_tokenizer
from loramux_demo.train_base import TrainConfig
from loramux_demo.wordings import PROFILE_TRAINING
from loramux_server.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return list(itertools.islice(Corpus(8), 3000))


@pytest.fixture(scope="module")
def tokenizer(conversations: list[Conversation]) -> tokenizers.Tokenizer:
    return train_tokenizer(conversations, vocab_size=2048)


@pytest.fixture(scope="module")
def directory(tokenizer: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, path, max_length=512)
    return path


def test_round_trip_of_the_corpus_and_of_any_text(
    tokenizer: tokenizers.Tokenizer, conversations: list[Conversation]
) -> None:
    texts = [message["content"] for messages in conversations[:300] for message in messages]
    for text in (*texts, "日本語 🙂 naïve\r\n\ttab  two  spaces", "Ünïcödé 1234567890"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_stand_alone(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.encode("1760").tokens == ["1", "7", "6", "0"]
    assert not [token for token in tokenizer.get_vocab() if sum(character.isdigit() for character in token) > 1]


def test_a_name_has_one_spelling_wherever_it_stands(tokenizer: tokenizers.Tokenizer) -> None:
    for name in ("Denmark", "Kyrgyzstan", "Wasserstoff"):
        alone = tokenizer.encode(name).tokens
        for before in (" ", '"', "\n", "("):
            assert tokenizer.encode(f"{before}{name}").tokens[1:] == alone


def test_the_vocabulary_is_bounded_and_special_tokens_come_first(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= 2048
    assert tokenizer.id_to_token(0) == "<|endoftext|>"
    assert [tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")] == [1, 2]


def test_training_twice_gives_equal_tokenizers(
    tokenizer: tokenizers.Tokenizer, conversations: list[Conversation]
) -> None:
    assert train_tokenizer(conversations, vocab_size=2048).to_str() == tokenizer.to_str()


def test_rendering_and_ids_equal_those_of_transformers(
    directory: Path, tokenizer: tokenizers.Tokenizer, conversations: list[Conversation]
) -> None:
    reference = AutoTokenizer.from_pretrained(directory)
    template = ChatTemplate.from_directory(directory)
    served = Tokenizer.from_directory(directory)
    encoded = encode_conversations(tokenizer, conversations[:80])
    for messages, (ids, _) in zip(conversations[:80], encoded, strict=True):
        text = reference.apply_chat_template(messages, tokenize=False)
        assert template.render(messages, add_generation_prompt=False) == text
        assert served.encode(text, add_special_tokens=False) == ids
        assert reference(text, add_special_tokens=False)["input_ids"] == ids
        prompt = template.render(messages[:-1])
        assert prompt == reference.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        prompt_ids = served.encode(prompt, add_special_tokens=False)
        assert ids[: len(prompt_ids)] == prompt_ids


def test_labels_are_the_assistants_text_and_its_end(
    directory: Path, tokenizer: tokenizers.Tokenizer, conversations: list[Conversation]
) -> None:
    reference = AutoTokenizer.from_pretrained(directory)
    for messages, (ids, labels) in zip(
        conversations[:40], encode_conversations(tokenizer, conversations[:40]), strict=True
    ):
        assert len(ids) == len(labels)
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        text = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)
        assert text == "".join(f"{message['content']}{END}" for message in messages if message["role"] == "assistant")
        rendered = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert rendered["assistant_masks"] == [int(label != IGNORED) for label in labels]


def test_the_longest_conversation_fits_a_row(tokenizer: tokenizers.Tokenizer) -> None:
    def size(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    for form in FORMS:
        longest = sorted(profiles(), key=lambda name: -size(answer(profile_question([name]), form)))
        names = longest[: 2 if form in ("json", "initech_v2") else 5]
        asked = max(size(profile_text(names, wording)) for wording in PROFILE_TRAINING)
        assert asked + size(answer(profile_question(names), form)) + 40 <= TrainConfig().longest


def test_unknown_roles_are_refused(directory: Path) -> None:
    with pytest.raises(TemplateError, match="Unknown role"):
        ChatTemplate.from_directory(directory).render([{"role": "tool", "content": "x"}])


def test_the_stop_token_ends_generation(directory: Path) -> None:
    served = Tokenizer.from_directory(directory)
    assert served.eos_token_ids == (2,)
    assert served.bos_token_id is None
