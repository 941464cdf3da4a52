"""Runs requests on a real engine in this process and returns their tokens."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from loramux_base.adapter import version_digest
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.graphs import Recorder
from loramux_server.engine.messages import Add, Done, PutVersion, SamplingSpec, Tokens, VersionSpec
from loramux_server.engine.runner import build_runner


@dataclasses.dataclass(frozen=True)
class EagerGraph:
    """Stands in for a captured graph on CPU: replaying runs the same launches on the same static tensors."""

    launches: Callable[[], None]

    def replay(self) -> None:
        """Launch again."""
        self.launches()


def record_eagerly(launches: Callable[[], None]) -> EagerGraph:
    """A `Recorder` without a device: runs once, as a capture does, and keeps the launches."""
    launches()
    return EagerGraph(launches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One request: prompt, adapter index (None = base), sampling fields."""

    prompt: tuple[int, ...]
    adapter: int | None = None
    fields: tuple[tuple[str, object], ...] = ()


class RealEngine:
    """An engine over a checkpoint and PEFT directories."""

    def __init__(self, config: EngineConfig, adapters: Sequence[Path] = (), *, record: Recorder | None = None) -> None:
        self.runner = build_runner(config, record=record)
        self.engine = Engine.serving(config, self.runner, self.runner.ready)
        self._versions = [f"tenants/default/adapters/a{index}/versions/0" for index in range(len(adapters))]
        self.engine.handle(
            PutVersion(spec=VersionSpec(version=version, digest=version_digest(path), path=str(path)))
            for version, path in zip(self._versions, adapters, strict=True)
        )
        self._number = 0

    def requests(self, jobs: Sequence[Job]) -> list[Add]:
        """The jobs as commands, each under a number of its own."""
        requests = []
        for job in jobs:
            self._number += 1
            sampling = SamplingSpec(**{"max_tokens": 12, "temperature": 0.0, **dict(job.fields)})  # type: ignore[arg-type]
            requests.append(
                Add(
                    request_id=str(self._number),
                    prompt_token_ids=list(job.prompt),
                    sampling=sampling,
                    version=None if job.adapter is None else self._versions[job.adapter],
                )
            )
        return requests

    def run(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Send all jobs at once; their output tokens, in order."""
        requests = self.requests(jobs)
        outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
        self.engine.handle(requests)
        done = 0
        while done < len(jobs):
            for event in self.engine.step():
                if isinstance(event, Tokens):
                    outputs[event.request_id].extend(event.token_ids)
                elif isinstance(event, Done):
                    assert event.status == "finished", event
                    done += 1
            self.engine.check_integrity()
        return list(outputs.values())

    def close(self) -> None:
        """End the loader thread."""
        self.runner.close()


def random_jobs(count: int, *, adapters: int, vocab: int, seed: int, longest: int = 90) -> list[Job]:
    """Greedy and seeded requests over base and adapters."""
    generator = random.Random(seed)
    jobs: list[Job] = []
    for index in range(count):
        fields: tuple[tuple[str, object], ...] = ()
        if index % 2:
            fields = (("temperature", 0.9), ("top_p", 0.9), ("top_k", 40), ("seed", index))
        which = generator.randrange(-1, adapters)
        prompt = tuple(generator.randrange(3, vocab) for _ in range(generator.randrange(1, longest)))
        jobs.append(Job(prompt=prompt, adapter=None if which < 0 else which, fields=fields))
    return jobs
