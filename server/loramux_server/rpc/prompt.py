"""From the prompt of a request to token ids: chat template and tokenizer, off the event loop when the text is large."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loramux.v1 import generation_pb2 as pb
from loramux_base.template import ChatTemplate, TemplateError
from loramux_server.errors import InvalidRequest, Reason, ResourceExhausted
from loramux_server.rpc.validate import invalid
from loramux_server.text.control_tokens import ControlTokenError, ControlTokens
from loramux_server.text.tokenizer import Encoding, Tokenizer

T = TypeVar("T")

# More than this takes too long for the event loop when many requests come at once.
_INLINE_CHARS = 1024
_THREADS = 2
_MAX_PENDING = 1024

_ROLES = {
    pb.CHAT_ROLE_SYSTEM: "system",
    pb.CHAT_ROLE_USER: "user",
    pb.CHAT_ROLE_ASSISTANT: "assistant",
}


class PromptEncoder:
    """Renders and tokenizes prompts that `validate` has accepted."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        """Create the encoder.

        Args:
            tokenizer: Of the served model.
            template: Chat template of the model.
        """
        self.tokenizer = tokenizer
        self.template = template
        self._control = ControlTokens(tokenizer)
        self._pending = 0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="loramux-tokenize")

    def close(self) -> None:
        """Stop the threads; running work is waited for."""
        self._threads.shutdown()

    async def encode(self, request: pb.GenerateRequest, *, prefix: str = "") -> list[int]:
        """Return the token ids of a prompt, untruncated.

        Args:
            request: Checked by `check_request`.
            prefix: Put before field names.

        Raises:
            InvalidRequest: A chat for a model without a chat template, or one that the template refuses.
        """
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            return list(request.token_ids.ids)
        if kind == "text":
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            return await self.encode_text(request.text, add_special_tokens=special)
        return (await self.encode_chat(request.chat, field=f"{prefix}chat")).ids

    async def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenize a text."""
        if len(text) <= _INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await self.in_thread(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> Encoding:
        """Tokenize a text and tell which part of it each token covers."""
        return await self.in_thread(lambda: self.tokenizer.encode_with_offsets(text, add_special_tokens))

    async def encode_chat(self, chat: pb.ChatPrompt, *, field: str, offsets: bool = False) -> Encoding:
        """Render a conversation with the model's template and tokenize it.

        Special tokens that the template writes become tokens; inside of messages they stay text.

        Args:
            chat: Checked by `check_request`.
            field: Name of the request's field, for errors.
            offsets: Whether the encoding needs offsets, in code points of the rendered chat.

        Raises:
            InvalidRequest: No template, or the template refuses these messages.
        """
        if not self.template.available:
            raise invalid(field, "is set, but this model has no chat template", "use text or token_ids")
        messages: list[dict[str, str]] = []
        for message in chat.messages:
            entry = {"role": _ROLES[message.role], "content": message.content}
            if message.HasField("name"):
                entry["name"] = message.name
            messages.append(entry)
        generation = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True

        def mask() -> list[dict[str, str]]:
            return [{key: self._control.mask(text) for key, text in entry.items()} for entry in messages]

        def work(masked: list[dict[str, str]]) -> Encoding:
            rendered = self.template.render(masked, add_generation_prompt=generation)
            if masked != messages:
                return self._control.encode(rendered, offsets=offsets)
            if offsets:
                return self.tokenizer.encode_with_offsets(rendered, add_special_tokens=False)
            return Encoding(ids=self.tokenizer.encode(rendered, add_special_tokens=False), offsets=[])

        try:
            short = sum(len(message.content) for message in chat.messages) <= _INLINE_CHARS
            if short and not offsets and (masked := mask()) == messages:
                return work(masked)
            return await self.in_thread(lambda: work(mask()))
        except (TemplateError, ControlTokenError) as error:
            raise InvalidRequest(Reason.INVALID_PARAMETER, f"{field}: {error}", field=field) from error

    def word_sequences(self, words: list[str]) -> list[list[int]]:
        """Return the token sequences of bad words, each with and without a leading space."""
        sequences: list[list[int]] = []
        for word in words:
            for text in (word, f" {word.lstrip(' ')}"):
                ids = self.tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in sequences:
                    sequences.append(ids)
        return sequences

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run work that would block the loop; at most two at a time.

        Raises:
            ResourceExhausted: QUEUE_FULL, too much work waits.
        """
        if self._pending >= _MAX_PENDING:
            raise ResourceExhausted(
                Reason.QUEUE_FULL,
                f"{self._pending} texts wait for the tokenizer, which is the limit; retry later or on another replica",
                retry_after=1.0,
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= 1
