"""From the prompt of a request to token ids: chat template and tokenizer, off the event loop when the text is large."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loramux.v1 import generation_pb2 as pb
from loramux_base.template import ChatTemplate, TemplateError
from loramux_server.errors import InvalidRequest, Reason, ResourceExhausted
from loramux_server.rpc.validate import invalid
from loramux_server.text.tokenizer import Tokenizer

T = TypeVar("T")

_INLINE_BYTES = 4096
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
        return await self.encode_text(await self.render(request.chat, field=f"{prefix}chat"), add_special_tokens=False)

    async def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenize a text."""
        if len(text) <= _INLINE_BYTES:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await self.in_thread(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def render(self, chat: pb.ChatPrompt, *, field: str) -> str:
        """Render a conversation with the model's template.

        Raises:
            InvalidRequest: No template, or the template refuses these messages.
        """
        template = self.template
        if not template.available:
            raise invalid(field, "is set, but this model has no chat template", "use text or token_ids")
        messages: list[dict[str, object]] = []
        for message in chat.messages:
            entry: dict[str, object] = {"role": _ROLES[message.role], "content": message.content}
            if message.HasField("name"):
                entry["name"] = message.name
            messages.append(entry)
        generation = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        try:
            if sum(len(message.content) for message in chat.messages) <= _INLINE_BYTES:
                return template.render(messages, add_generation_prompt=generation)
            return await self.in_thread(lambda: template.render(messages, add_generation_prompt=generation))
        except TemplateError as error:
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
