"""One face for both clients: the blocking one, run in threads, looks like the asyncio one.

A test body is written once, for asyncio, and runs on both.
"""

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

from loramux import Adapters, AdapterWatch, Client, GenerationStream


async def _next(iterator: Iterator[Any]) -> Any:
    """Read one value in a thread; StopIteration cannot leave a thread's future."""
    nothing = object()
    value = await asyncio.to_thread(next, iterator, nothing)
    if value is nothing:
        raise StopAsyncIteration
    return value


class StreamFace:
    """A blocking stream or watch as an asynchronous one."""

    def __init__(self, stream: GenerationStream | AdapterWatch) -> None:
        self._stream = stream

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._stream.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._stream.__exit__, kind, error, traceback)

    def __aiter__(self) -> Self:
        iter(self._stream)
        return self

    async def __anext__(self) -> Any:
        return await _next(self._stream)

    async def result(self) -> Any:
        assert isinstance(self._stream, GenerationStream)
        return await asyncio.to_thread(self._stream.result)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class IteratorFace:
    """A blocking iterator as an asynchronous one."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        return await _next(self._iterator)

    async def aclose(self) -> None:
        close: Callable[[], None] = self._iterator.close  # type: ignore[attr-defined]  # a generator
        await asyncio.to_thread(close)


class Face:
    """A blocking client, or its adapter calls, with the surface of the asyncio one."""

    def __init__(self, target: Client | Adapters) -> None:
        self._target = target

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert isinstance(self._target, Client)
        await asyncio.to_thread(self._target.close)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if isinstance(value, Adapters):
            return Face(value)
        if name in ("for_tenant", "with_adapter", "with_min_revision"):
            return lambda *args, **kwargs: Face(value(*args, **kwargs))
        if name in ("generate", "watch"):
            return lambda *args, **kwargs: StreamFace(value(*args, **kwargs))
        if name == "batch_generate" or inspect.isgeneratorfunction(value):
            return lambda *args, **kwargs: IteratorFace(value(*(_plain(arg) for arg in args), **kwargs))
        return lambda *args, **kwargs: asyncio.to_thread(value, *args, **kwargs)


def _plain(value: Any) -> Any:
    """The blocking client takes plain iterables only."""
    assert not isinstance(value, AsyncIterable), "a shared test body gives batch_generate a plain iterable"
    return value
