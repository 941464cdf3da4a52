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
from workload import Adapters

from loramux import AsyncClient
from loramux_base.adapter import version_digest
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import (
    Abort,
    Add,
    Done,
    DropVersion,
    PutVersion,
    SamplingSpec,
    Started,
    Tokens,
    Unload,
    VersionSpec,
)
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.runner import build_runner


class EngineBench:
    """An engine in this process.

    Args:
        config: Settings.
        adapters: PEFT directories, in the order of their indices.
        runner: A loaded runner whose former engine was left with `leave`; None = load one.
        digests: Version digest of each adapter, if known already; hashing gigabytes takes seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        adapters: Sequence[Path],
        *,
        runner: ModelRunner | None = None,
        digests: Sequence[str] | None = None,
    ) -> None:
        self.runner = build_runner(config) if runner is None else runner
        self.engine = Engine.serving(config, self.runner, self.runner.ready)
        self.digests = [version_digest(path) for path in adapters] if digests is None else list(digests)
        self.versions = [f"tenants/default/adapters/a{index}/versions/{index:064x}" for index in range(len(adapters))]
        self.engine.handle(
            PutVersion(spec=VersionSpec(version=version, digest=digest, path=str(path)))
            for version, digest, path in zip(self.versions, self.digests, adapters, strict=True)
        )
        self._paths = list(adapters)
        self.load_seconds: dict[str, float] = {}
        self._runs = 0
        self._streams: dict[str, StreamTimes] = {}
        self._open: set[str] = set()

    def run(
        self, *, concurrency: int, adapters: Adapters, prompt: int, new: int, spec: dict[str, object]
    ) -> list[StreamTimes]:
        """Send `concurrency` requests at once and step until all are done.

        Args:
            concurrency: Requests.
            adapters: Whose adapters they use.
            prompt: Prompt tokens, random, so that no prefix is shared.
            new: Output tokens each.
            spec: Further sampling fields.
        """
        self.start(concurrency=concurrency, adapters=adapters, prompt=prompt, new=new, **spec)
        while self._open:
            self.pump()
        return list(self._streams.values())

    def closed_loop(
        self, *, clients: int, adapters: Adapters, prompt: int, new: int, requests: int, spec: dict[str, object]
    ) -> tuple[float, list[StreamTimes]]:
        """`clients` requests at a time, each replaced when it ends; returns (seconds, streams)."""
        picks = self._begin(requests, adapters, prompt)
        began = time.perf_counter()
        for index, pick in enumerate(picks):
            while len(self._open) >= clients:
                self.pump()
            self._send(index, pick, new, spec)
        while self._open:
            self.pump()
        return time.perf_counter() - began, list(self._streams.values())

    def start(self, *, concurrency: int, adapters: Adapters, prompt: int, new: int, **spec: object) -> None:
        """Send the requests of a run."""
        for index, pick in enumerate(self._begin(concurrency, adapters, prompt)):
            self._send(index, pick, new, spec)

    def one(self, adapter: int | None, *, prompt: int) -> float:
        """Seconds to the first and only token of a request of its own; `load_seconds` has its load's part."""
        self._begin(1, Adapters(count=0), prompt)
        self._send(0, adapter, 1, {})
        while self._open:
            self.pump()
        [stream] = self._streams.values()
        return stream.first - stream.begun

    def pump(self) -> None:
        """One step; notes the times of its tokens."""
        events = self.engine.step()
        if self.engine.stalled:
            time.sleep(0.001)  # everybody waits for a load: leave the interpreter to the loader thread
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Tokens):
                self._streams[event.request_id].arrivals.append((now, len(event.token_ids)))
            elif isinstance(event, Started):
                self.load_seconds[event.request_id] = event.load_time
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

    def unload(self, adapter: int) -> None:
        """Take an adapter out of the slab; what the host keeps of it stays."""
        self.engine.handle([Unload(operation_id=f"u{adapter}", version=self.versions[adapter])])
        self._settle()

    def forget(self, adapter: int) -> None:
        """Drop an adapter and make it known again: whatever the engine kept of it is given up."""
        version = self.versions[adapter]
        self.engine.handle([DropVersion(version=version)])
        self._settle()
        spec = VersionSpec(version=version, digest=self.digests[adapter], path=str(self._paths[adapter]))
        self.engine.handle([PutVersion(spec=spec)])

    def leave(self) -> None:
        """Empty the slab, so that another engine can take the runner over."""
        self.engine.handle([DropVersion(version=version) for version in self.versions])
        self._settle()

    def step_parts(self) -> dict[str, float]:
        """Milliseconds a step by part since the engine started."""
        return parts_between({}, 0, *self.step_seconds())

    def step_seconds(self) -> tuple[dict[str, float], int]:
        """Seconds by part and steps since the engine started."""
        stats = self.engine.stats()
        return dict(stats.step_seconds), stats.steps

    def _settle(self) -> None:
        self.pump()
        while self.engine.has_work:
            self.pump()

    def _begin(self, requests: int, adapters: Adapters, prompt: int) -> list[int | None]:
        self._runs += 1
        self._streams, self._open = {}, set()
        # Before any clock starts: drawing thousands of tokens takes the interpreter a while.
        self._prompts = random_prompts(requests, prompt, vocab=self.runner.ready.vocab_size, seed=self._runs)
        return adapters.picks(requests, seed=self._runs)

    def _send(self, index: int, adapter: int | None, new: int, spec: dict[str, object]) -> None:
        name, tokens = f"r{self._runs}-{index}", self._prompts[index]
        fields = {"max_tokens": new, "ignore_eos": True, "temperature": 0.0, "seed": index, **spec}
        version = None if adapter is None else self.versions[adapter]
        add = Add(request_id=name, prompt_token_ids=tokens, sampling=SamplingSpec(**fields), version=version)
        self._streams[name] = StreamTimes(begun=time.perf_counter(), prompt_tokens=len(tokens))
        self._open.add(name)
        self.engine.handle([add])


def random_prompts(requests: int, tokens: int, *, vocab: int, seed: int) -> list[list[int]]:
    """Prompts that share no prefix; ids below 3 are special tokens of the random checkpoints."""
    generator = random.Random(seed)
    return [generator.choices(range(3, vocab), k=tokens) for _ in range(requests)]


def parts_between(
    before: dict[str, float], steps_before: int, after: dict[str, float], steps_after: int
) -> dict[str, float]:
    """Milliseconds a step by part between two readings of `EngineBench.step_seconds`."""
    steps = max(1, steps_after - steps_before)
    return {name: 1000 * (seconds - before.get(name, 0.0)) / steps for name, seconds in after.items()}


class ServerBench:
    """A server process and an SDK client.

    Args:
        model: Checkpoint directory.
        arguments: Further flags of `loramux-server serve`.
        adapters: PEFT directories, uploaded and promoted at start.
        vocab: Token ids of the prompts are below it.
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
            self.close()
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
        self, *, concurrency: int, adapters: Adapters, prompt: int, new: int, spec: dict[str, object]
    ) -> list[StreamTimes]:
        """As `EngineBench.run`, through gRPC."""
        self._runs += 1
        picks = adapters.picks(concurrency, seed=self._runs)
        prompts = random_prompts(concurrency, prompt, vocab=self._vocab, seed=10_000 + self._runs)
        async with AsyncClient(self._address) as client:
            return await asyncio.gather(
                *(
                    _stream(client, tokens, pick, new, {"seed": index, **spec})
                    for index, (tokens, pick) in enumerate(zip(prompts, picks, strict=True))
                )
            )

    async def closed_loop(
        self, *, clients: int, adapters: Adapters, prompt: int, new: int, requests: int, spec: dict[str, object]
    ) -> tuple[float, list[StreamTimes]]:
        """`clients` callers, each sending its next request when the last one ended; returns (seconds, streams)."""
        self._runs += 1
        prompts = random_prompts(requests, prompt, vocab=self._vocab, seed=20_000 + self._runs)
        waiting = collections.deque(enumerate(adapters.picks(requests, seed=self._runs)))
        streams: list[StreamTimes] = []
        async with AsyncClient(self._address) as client:

            async def caller() -> None:
                while waiting:
                    index, pick = waiting.popleft()
                    streams.append(await _stream(client, prompts[index], pick, new, {"seed": index, **spec}))

            began = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(clients)))
            return time.perf_counter() - began, streams

    def close(self) -> None:
        """Stop the server."""
        self._process.terminate()
        try:
            self._process.wait(timeout=60)
        finally:
            self._process.kill()
            self._store.cleanup()


async def _stream(
    client: AsyncClient, tokens: list[int], adapter: int | None, new: int, spec: dict[str, object]
) -> StreamTimes:
    times = StreamTimes(begun=time.perf_counter(), prompt_tokens=len(tokens))
    fields = {"max_tokens": new, "ignore_eos": True, "temperature": 0.0, **spec}
    name = None if adapter is None else f"a{adapter}"
    async with client.generate(tokens, adapter=name, **fields) as stream:
        async for delta in stream:
            if delta.token_ids:
                times.arrivals.append((time.perf_counter(), len(delta.token_ids)))
    return times
