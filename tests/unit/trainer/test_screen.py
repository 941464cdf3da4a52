import errno
import io
import sys

import pytest
from rich.progress import Progress

from loramux_trainer.screen import console


class _Failing(io.StringIO):
    number = 0

    def write(self, text: str) -> int:
        if self.number:
            raise OSError(self.number, "no")
        return super().write(text)

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("gone", [errno.EIO, errno.EPIPE])
def test_a_reader_that_has_gone_fails_nobody(monkeypatch: pytest.MonkeyPatch, gone: int) -> None:
    stream = _Failing()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = console("stderr")
    shown.print("before")
    stream.number = gone
    shown.print("after")
    stream.number = errno.ENOSPC
    with pytest.raises(OSError, match="no"):
        shown.print("full")
    stream.number = 0
    assert stream.getvalue() == "before\n"


def test_a_live_display_that_stands_in_for_the_stream_writes_to_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Failing()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    shown = console("stderr")
    assert shown.is_terminal
    with Progress(console=shown) as bar:
        bar.add_task("training", total=1, completed=1)
        print("from elsewhere", file=sys.stderr)
    assert stream.getvalue().count("from elsewhere") == 1
    assert "training" in stream.getvalue()
