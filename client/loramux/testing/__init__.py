"""A server for tests of programs that use the SDK: in this process, on a real port, without a model.

```python
from loramux import Client
from loramux.testing import FakeServer, Reply

with FakeServer() as server, Client(server.address) as client:
    server.reply(Reply(["Hel", "lo"]))
    assert client.generate("Hi").result().text == "Hello"
    assert server.calls_of("Generate")[0].request.text == "Hi"
```

Without a script it answers a prompt with the prompt's own text. One token is one byte of UTF-8. Adapters can be
uploaded, promoted and deleted as on a real server; their state is kept in memory.
"""

from loramux.testing._script import FakeError, RecordedCall, Reply
from loramux.testing._server import FakeServer

__all__ = ["FakeError", "FakeServer", "RecordedCall", "Reply"]
