"""A fork under the feet of a client, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import os, warnings
from loramux import Client, ClientStateError
from loramux.testing import FakeServer

warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads: that is the point
with FakeServer() as server:
    unused, used = Client(server.address), Client(server.address)
    used.model()
    child = os.fork()
    if child == 0:
        try:
            used.model()
        except ClientStateError as error:
            os._exit(0 if "fork" in str(error) else 3)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    assert used.model().name == "fake"
    used.close()
    unused.close()
    print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_use_after_fork_raises_in_the_child_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PYTHONPATH": str(ROOT / "client"), "GRPC_VERBOSITY": "NONE"},
    )
    assert done.stdout.strip() == "child 0", done.stderr
