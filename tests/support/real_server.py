"""A server with a real engine for tests that do not care which server they talk to."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.real_server import real_server
from tests.support.tiny_models import make_adapter, make_checkpoint


@dataclass(frozen=True)
class RunningServer:
    """A server and the base that its adapters are for."""

    address: str
    base: Path

    def write_adapter(self, directory: Path, seed: int) -> None:
        """Write a PEFT directory that this server takes; another seed is another version."""
        make_adapter(directory, self.base, rank=4, seed=seed)


@contextlib.contextmanager
def running_server() -> Iterator[RunningServer]:
    """Run a server of a tiny random model with an empty store until the block ends."""
    with tempfile.TemporaryDirectory() as root:
        base = make_checkpoint(Path(root) / "base", "qwen2")
        with real_server(base, Path(root) / "store", "--kv-pages", "256") as server:
            yield RunningServer(server.address, base)
