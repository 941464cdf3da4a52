"""The asyncio client."""

# A timeout here is the deadline of a call, which the server gets too.
# ruff: noqa: ASYNC109
from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, Unpack

from loramux import _methods as methods
from loramux import _model_events as model_events
from loramux._async_adapters import AsyncAdapters
from loramux._async_batching import batch_generate
from loramux._async_streaming import AsyncGenerationStream
from loramux._async_transport import AsyncStreamCall, AsyncTransport
from loramux._batch import DEFAULT_WINDOW, group_size
from loramux._connection import ChannelOption, TLSConfig, checked_timeout, checked_token, connection
from loramux._model_types import Model, ServerStatus
from loramux._prompt_types import BatchRequest, Prompt, SamplingFields, SamplingParams
from loramux._requests import build, invalid, tokenize_request
from loramux._retry import RetryPolicy
from loramux._types import BatchItem, Tokenization
from loramux._views import ClientViews
from loramux.v1 import generation_pb2 as pb
from loramux.v1 import model_pb2


class AsyncClient(ClientViews):
    """A client for asyncio, on one event loop.

    It connects at the first call. `for_tenant`, `with_adapter` and `with_min_revision` give cheap immutable views on
    the same connection; only the client that was constructed closes it.

    Args:
        address: `host:port`, or a gRPC target such as `dns:///host:port` or `unix:/run/loramux.sock`.
        token: Bearer token, or a callable, also a coroutine function, that returns it and is asked before each attempt.
        tenant: Tenant to act for, if the credential may act for several.
        adapter: Adapter of generations that name none.
        tls: True, False or a `TLSConfig`; None is on for everything but this machine.
        allow_plaintext_token: Allows a token without TLS to another machine, on a network that is trusted.
        timeout: Seconds that calls other than generations and uploads may take, all tries together; `math.inf` for
            no limit.
        generate_timeout: Seconds that a generation may take, queueing and all tries included; `math.inf` for no limit.
        retry: How often and how fast calls are tried again; None for the defaults.
        channel_options: gRPC channel options, which win over the client's own.

    Raises:
        InvalidRequest: An argument cannot be used.
    """

    _transport: AsyncTransport

    def __init__(
        self,
        address: str,
        *,
        token: str | Callable[[], str | Awaitable[str]] | None = None,
        tenant: str | None = None,
        adapter: str | None = None,
        tls: bool | TLSConfig | None = None,
        allow_plaintext_token: bool = False,
        timeout: float = 60.0,
        generate_timeout: float = 600.0,
        retry: RetryPolicy | None = None,
        channel_options: Sequence[ChannelOption] = (),
    ) -> None:
        target = connection(
            address,
            has_token=token is not None,
            tls=tls,
            allow_plaintext_token=allow_plaintext_token,
            options=channel_options,
        )
        if token is not None and not callable(token):
            checked_token(token)
        self._transport = AsyncTransport(
            target, token=token, policy=retry or RetryPolicy(), timeout=checked_timeout(timeout, None)
        )
        self._generate_timeout = checked_timeout(generate_timeout, None)
        self._begin(tenant=tenant, adapter=adapter)

    @property
    def adapters(self) -> AsyncAdapters:
        """Calls on the adapters of the tenant."""
        return AsyncAdapters(self._transport, self._view)

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        add_special_tokens: bool | None = None,
        request_id: str | None = None,
        **fields: Unpack[SamplingFields],
    ) -> AsyncGenerationStream:
        """Prepare a generation. Nothing is sent before its block is entered or its `result` is asked for.

        Args:
            prompt: Text, token ids, chat messages, or a `ChatPrompt`.
            adapter: Adapter to use; None takes this client's, or else the tenant's default.
            sampling: How to sample.
            timeout: Seconds that all of it may take; None takes the client's, `math.inf` means no limit.
            add_special_tokens: Whether special tokens are added to a text prompt; None is yes.
            request_id: Correlation id for logs; None mints one.
            **fields: Fields of `SamplingParams`, which win over `sampling`.

        Raises:
            InvalidRequest: The request can never be served.
        """
        made = self._generation(
            prompt,
            adapter=adapter,
            sampling=sampling,
            timeout=timeout,
            add_special_tokens=add_special_tokens,
            request_id=request_id,
            fields=fields,
        )
        return AsyncGenerationStream(
            lambda: AsyncStreamCall(
                self._transport,
                methods.GENERATE,
                made.request,
                made.view,
                timeout=made.timeout,
                request_id=made.request_id,
            ),
            made.n,
        )

    def batch_generate(
        self,
        requests: Iterable[BatchRequest | Prompt] | AsyncIterable[BatchRequest | Prompt],
        *,
        window: int = DEFAULT_WINDOW,
        timeout: float = math.inf,
        pin_versions: bool = False,
    ) -> AsyncGenerator[BatchItem, None]:
        """Run many requests and iterate over the answers as they come, in no order.

        At most `window` requests are pulled from `requests` and not yet answered, so that it may be endless. They are
        sent in groups of a quarter of it. A failed item has an `error` and leaves the others alone; so do the items of
        a group whose call fails. Closing the iterator ends what is open; `contextlib.aclosing` does so at once.

        Args:
            requests: Prompts or `BatchRequest`s, from a plain or an asynchronous iterable.
            window: Most open requests, 1 to 4,096.
            timeout: Seconds that a group may take; see `BatchRequest.timeout` for single items.
            pin_versions: Whether each group resolves adapters without a version once, on arrival.

        Raises:
            InvalidRequest: The window or the timeout is out of range.
            NotAuthenticated: The credential is not valid. So with PermissionDenied, NotServedYet and
                ClientStateError; everything else is about items.
        """
        limit = checked_timeout(timeout, None)
        group_size(window)  # refused here, not at the first answer
        return batch_generate(
            self._transport, self._view, requests, window=window, timeout=limit, pin_versions=pin_versions
        )

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool | None = None, offsets: bool = False
    ) -> Tokenization:
        """Turn text or chat messages into the token ids that a generation would run.

        Args:
            prompt: Text, chat messages, or a `ChatPrompt`.
            add_special_tokens: Whether special tokens are added to text; None is yes.
            offsets: Whether to tell which part of the text each token covers.
        """
        request = tokenize_request(prompt, add_special_tokens=add_special_tokens, offsets=offsets)
        answer = await self._transport.unary(methods.TOKENIZE, request, self._view)
        return Tokenization(
            token_ids=tuple(answer.token_ids),
            offsets=tuple((offset.start, offset.end) for offset in answer.offsets),
            max_model_len=answer.max_model_len,
        )

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn token ids into text.

        Args:
            token_ids: Token ids.
            skip_special_tokens: Whether special tokens are left out.
        """
        request = build(
            "token_ids", lambda: pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        )
        return (await self._transport.unary(methods.DETOKENIZE, request, self._view)).text

    async def cancel(self, generation_id: str) -> bool:
        """End a generation from outside of its stream, which then ends well with reason CANCELLED.

        Returns:
            Whether it was running on the replica that got the call.
        """
        if not generation_id:
            raise invalid("generation_id", "is empty; it is in Started")
        request = pb.CancelGenerationRequest(generation_id=generation_id)
        return (await self._transport.unary(methods.CANCEL_GENERATION, request, self._view)).cancelled

    async def model(self) -> Model:
        """Describe the base model and the limits of the server."""
        return model_events.model(
            (await self._transport.unary(methods.GET_MODEL, model_pb2.GetModelRequest(), self._view)).model
        )

    async def status(self) -> ServerStatus:
        """Describe the load of a replica."""
        return model_events.status(
            (await self._transport.unary(methods.GET_STATUS, model_pb2.GetServerStatusRequest(), self._view)).status
        )

    async def close(self) -> None:
        """Close the connection; running calls end with an error. A view does nothing."""
        if self._owner:
            await self._transport.close()

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        await self.close()
