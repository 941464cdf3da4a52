"""From a conversation to token ids and labels, by the template and the tokenizer that the server runs.

Where the server renders a chat, encodes it and generates until a stop token, training sees the same ids: the prompt of
each assistant turn is encoded as the server would encode it, the answer follows, and the loss counts the answer's
tokens up to and with the stop token. What the template writes behind the stop token (a line feed, say) carries no loss:
the server never generates it. A turn whose prompt does not continue the sequence so far, because the template drops
something from earlier turns or tokens merge across the border, gets a sequence of its own.
"""

import dataclasses
from pathlib import Path

import tokenizers

from loramux_base.template import ChatTemplate, TemplateError
from loramux_base.tokenizer_files import TokenizerFileError, read_tokenizer_files
from loramux_trainer.data.conversation import Conversation
from loramux_trainer.errors import ConfigError

IGNORED = -100
"""Label of a token without loss."""


class EncodingError(ValueError):
    """A conversation that the base's template or tokenizer does not take as it is; the text says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    """One training sequence.

    Attributes:
        input_ids: Token ids.
        labels: The same ids where the loss counts, `IGNORED` elsewhere.
        conversation: Index of its conversation.
        place: `file name:line` of it.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    conversation: int
    place: str

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


class Codec:
    """Template and tokenizer of a base.

    Args:
        backend: The tokenizer.
        template: The chat template.
        stop_ids: Ids that end a generation.
        pad_id: Id that fills short rows up; masked everywhere.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, template: ChatTemplate, *, stop_ids: frozenset[int], pad_id: int
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        self._special = tuple(token.content for token in backend.get_added_tokens_decoder().values() if token.special)

    @classmethod
    def from_directory(cls, directory: Path) -> "Codec":
        """Read tokenizer, template and stop tokens of a checkpoint.

        Raises:
            ConfigError: A file is missing or unreadable, or the base has no template or no stop token.
        """
        try:
            files = read_tokenizer_files(directory)
        except TokenizerFileError as error:
            raise ConfigError(f"base: {directory}: {error}") from error
        try:
            template = ChatTemplate.from_directory(directory)
        except TemplateError as error:
            raise ConfigError(f"base: {directory}: {error}") from error
        if not template.available:
            raise ConfigError(f"base: {directory}: the base has no chat template, so conversations cannot be rendered")
        stop_ids = frozenset(files.eos_token_ids)
        if not stop_ids:
            raise ConfigError(f"base: {directory}: neither configuration nor tokenizer names an end-of-sequence token")
        pad = files.pad_token_id
        return cls(files.backend, template, stop_ids=stop_ids, pad_id=min(stop_ids) if pad is None else pad)

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text, as the server encodes it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def special_in(self, text: str) -> str | None:
        """The first special token that text would be encoded to, if any."""
        return next((token for token in self._special if token in text), None)

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """What the server renders before it generates.

        Raises:
            TemplateError: The template refuses the messages.
        """
        return self._template.render(messages, add_generation_prompt=True)

    def sequences(self, conversation: Conversation, index: int) -> list[Sequence]:
        """Training sequences of a conversation: one, unless the template keeps its turns apart.

        Args:
            conversation: The conversation.
            index: Its index, kept in the sequences.

        Raises:
            EncodingError: The template refuses it, or it cannot be trained as it would be served.
        """
        messages = conversation.plain()
        for number, message in enumerate(messages, start=1):
            if token := self.special_in(message["content"]):
                raise EncodingError(f"message {number} contains the special token {token}; remove it from the text")
        result: list[Sequence] = []
        ids: list[int] = []
        labels: list[int] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, answer, counted = self._turn(messages, turn)
            if ids and prompt[: len(ids)] != ids:
                result.append(_sequence(ids, labels, conversation, index))
                ids, labels = [], []
            labels += [IGNORED] * (len(prompt) - len(ids))
            ids += prompt[len(ids) :]
            labels += answer[:counted] + [IGNORED] * (len(answer) - counted)
            ids += answer
        result.append(_sequence(ids, labels, conversation, index))
        return result

    def _turn(self, messages: list[dict[str, str]], turn: int) -> tuple[list[int], list[int], int]:
        """Ids of the prompt and of the answer, and how many of the answer's carry loss."""
        try:
            before = self.prompt(messages[:turn])
            after = self._template.render(messages[: turn + 1], add_generation_prompt=False)
        except TemplateError as error:
            raise EncodingError(str(error)) from error
        if not after.startswith(before):
            raise EncodingError(
                f"message {turn + 1}: the template writes another text before a given answer than before one that is "
                "generated, so training would differ from serving"
            )
        prompt, answer = self.encode(before), self.encode(after[len(before) :])
        stop = next((position for position, token in enumerate(answer) if token in self.stop_ids), None)
        if stop is None:
            raise EncodingError(
                f"message {turn + 1}: the template writes no stop token behind the answer, so the model would never "
                "learn to stop; correct the base's chat template or its eos_token_id"
            )
        if not prompt or stop == 0:
            raise EncodingError(f"message {turn + 1}: the template leaves nothing of the prompt or of the answer")
        return prompt, answer, stop + 1


def _sequence(ids: list[int], labels: list[int], conversation: Conversation, index: int) -> Sequence:
    return Sequence(input_ids=tuple(ids), labels=tuple(labels), conversation=index, place=conversation.place)
