"""Drives an engine in-process and a server through gRPC with the same requests, and takes the times."""

import asyncio
import collections
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measure import StreamTimes

from loramux import AsyncClient
from loramux_base.adapter import version_digest
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import Abort, Add, Done, PutVersion, SamplingSpec, Tokens, VersionSpec
from loramux_server.engine.runner import build_runner


class EngineBench:
    """An engine in this process.

    Args:
        config: Settings.
        adapters: PEFT directories; request i of a run uses adapter i modulo the count asked for.
    """

    def __init__(self, config: EngineConfig, adapters: Sequence[Path]) -> None:
        self.runner = build_runner(config)
        self.engine = Engine.serving(config, self.runner, self.runner.ready)
        self._versions = [f"tenants/default/adapters/a{index}/versions/{index:064x}" for index in range(len(adapters))]
        self.engine.handle(
            PutVersion(spec=VersionSpec(version=version, digest=version_digest(path), path=str(path)))
            for version, path in zip(self._versions, adapters, strict=True)
        )
        self._runs = 0
        self._streams: dict[str, StreamTimes] = {}
        self._open: set[str] = set()

    def run(
        self, *, concurrency: int, adapters: int, prompt: int, new: int, spec: dict[str, object]
    ) -> list[StreamTimes]:
        """Send `concurrency` requests at once and step until all are done.

        Args:
            concurrency: Requests.
            adapters: Distinct adapters, round robin; 0 = base.
            prompt: Prompt tokens, random, so that no prefix is shared.
            new: Output tokens each.
            spec: Further sampling fields.
        """
        self.start(concurrency=concurrency, adapters=adapters, prompt=prompt, new=new, **spec)
        while self._open:
            self.pump()
        return list(self._streams.values())

    def start(self, *, concurrency: int, adapters: int, prompt: int, new: int, **spec: object) -> None:
        """Send the requests of a run."""
        self._runs += 1
        generator = random.Random(self._runs)
        vocab = self.runner.ready.vocab_size
        self._streams = {}
        for index in range(concurrency):
            name = f"r{self._runs}-{index}"
            tokens = [generator.randrange(3, vocab) for _ in range(prompt)]
            fields = {"max_tokens": new, "ignore_eos": True, "temperature": 0.0, "seed": index, **spec}
            version = self._versions[index % adapters] if adapters else None
            self._streams[name] = StreamTimes(begun=time.perf_counter(), prompt_tokens=prompt)
            add = Add(request_id=name, prompt_token_ids=tokens, sampling=SamplingSpec(**fields), version=version)
            self.engine.handle([add])
        self._open = set(self._streams)

    def pump(self) -> None:
        """One step; notes the times of its tokens."""
        events = self.engine.step()
        if self.engine.stalled:
            time.sleep(0.001)  # everybody waits for a load: leave the interpreter to the loader thread
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Tokens):
                self._streams[event.request_id].arrivals.append((now, len(event.token_ids)))
            elif isinstance(event, Done):
                if event.status == "failed":
                    raise RuntimeError(f"request failed: {event.error}")
                self._open.discard(event.request_id)

    @property
    def decoding(self) -> int:
        """Streams that have given a token."""
        return sum(bool(stream.arrivals) for stream in self._streams.values())

    def abort(self) -> None:
        """Cancel what is left of the run."""
        self.engine.handle([Abort(request_id=name) for name in self._open])
        while self._open:
            self.pump()

    def step_parts(self) -> dict[str, float]:
        """Milliseconds a step by part since the engine started."""
        stats = self.engine.stats()
        return {name: 1000 * seconds / max(stats.steps, 1) for name, seconds in stats.step_seconds.items()}


class ServerBench:
    """A server process and an SDK client.

    Args:
        model: Checkpoint directory.
        arguments: Further flags of `loramux-server serve`.
        adapters: PEFT directories, uploaded and promoted at start.
    """

    def __init__(self, model: Path, arguments: Sequence[str], adapters: Sequence[Path], *, vocab: int) -> None:
        self._store = tempfile.TemporaryDirectory(prefix="loramux-bench-")
        command = [sys.executable, "-m", "loramux_server", "serve", "--model", str(model), "--port", "0"]
        command += ["--store", self._store.name, "--allow-unverified-adapters", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        match = re.search(r"serving on (\S+)", line)
        if match is None:
            raise RuntimeError(f"the server did not start: {line!r}")
        self._address = match.group(1)
        self._adapters = list(adapters)
        self._vocab = vocab
        self._runs = 0

    async def upload(self) -> None:
        """Upload and promote the adapters."""
        async with AsyncClient(self._address) as client:
            for index, path in enumerate(self._adapters):
                await client.adapters.upload(path, name=f"a{index}", promote=True)

    async def run(
        self, *, concurrency: int, adapters: int, prompt: int, new: int, spec: dict[str, object]
    ) -> list[StreamTimes]:
        """As `EngineBench.run`, through gRPC."""
        self._runs += 1
        generator = random.Random(10_000 + self._runs)
        async with AsyncClient(self._address) as client:
            prompts = [[generator.randrange(3, self._vocab) for _ in range(prompt)] for _ in range(concurrency)]
            return await asyncio.gather(
                *(
                    _stream(client, tokens, f"a{index % adapters}" if adapters else None, new, {"seed": index, **spec})
                    for index, tokens in enumerate(prompts)
                )
            )

    async def closed_loop(
        self, *, clients: int, adapters: int, prompt: int, new: int, requests: int
    ) -> tuple[float, list[StreamTimes]]:
        """`clients` callers, each sending its next request when the last one ended; returns (seconds, streams)."""
        self._runs += 1
        generator = random.Random(20_000 + self._runs)
        waiting = collections.deque(range(requests))
        streams: list[StreamTimes] = []
        async with AsyncClient(self._address) as client:

            async def caller() -> None:
                while waiting:
                    index = waiting.popleft()
                    tokens = [generator.randrange(3, self._vocab) for _ in range(prompt)]
                    adapter = f"a{index % adapters}" if adapters else None
                    streams.append(await _stream(client, tokens, adapter, new, {"seed": index}))

            began = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(clients)))
            return time.perf_counter() - began, streams

    def close(self) -> None:
        """Stop the server."""
        self._process.terminate()
        self._process.wait(timeout=60)
        self._store.cleanup()


async def _stream(
    client: AsyncClient, tokens: list[int], adapter: str | None, new: int, spec: dict[str, object]
) -> StreamTimes:
    times = StreamTimes(begun=time.perf_counter(), prompt_tokens=len(tokens))
    fields = {"max_tokens": new, "ignore_eos": True, "temperature": 0.0, **spec}
    async with client.generate(tokens, adapter=adapter, **fields) as stream:
        async for delta in stream:
            if delta.token_ids:
                times.arrivals.append((time.perf_counter(), len(delta.token_ids)))
    return times
