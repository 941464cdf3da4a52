"""Python SDK of loramux, a gRPC server of one base model with many LoRA adapters.

```python
from loramux import Client

with Client("localhost:50051") as client:
    with client.generate("Hello", max_tokens=64, temperature=0) as stream:
        for delta in stream:
            print(delta.text, end="")
```

`Client` blocks, `AsyncClient` is for asyncio; both have the same calls. Errors are under `LoramuxError`, drawn in
`loramux._errors`. `loramux.testing` has a server for the tests of programs that use this SDK.
"""

from loramux._adapter_types import (
    Adapter,
    AdapterEvent,
    AdapterEventKind,
    AdapterFile,
    AdapterPin,
    AdapterResidency,
    AdapterVersion,
    Grant,
    ResidencyLevel,
    TrafficTarget,
    UsageEntry,
    VersionState,
)
from loramux._adapters import Adapters
from loramux._async_adapters import AsyncAdapters
from loramux._async_client import AsyncClient
from loramux._async_streaming import AsyncAdapterWatch, AsyncGenerationStream
from loramux._client import Client
from loramux._connection import TLSConfig
from loramux._errors import (
    AdapterIncompatible,
    AdapterNotFound,
    Cancelled,
    ClientStateError,
    Conflict,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    LoramuxError,
    NotAuthenticated,
    NotFound,
    NotServedYet,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ServerError,
    StreamInterrupted,
    Unavailable,
)
from loramux._model_types import (
    BaseFingerprint,
    Limits,
    LoadLevel,
    Model,
    ReplicaLoad,
    ServerState,
    ServerStatus,
    TenantLoad,
    WeightFormat,
)
from loramux._prompt_types import (
    BatchRequest,
    ChatMessage,
    ChatPrompt,
    Prompt,
    ResponseFormat,
    SamplingFields,
    SamplingParams,
    Tool,
    ToolCall,
)
from loramux._retry import RetryPolicy
from loramux._streaming import AdapterWatch, GenerationStream
from loramux._types import (
    AdapterVersionRef,
    BatchItem,
    Delta,
    Finished,
    FinishReason,
    GenerationResult,
    MatchedStop,
    Output,
    PositionLogprobs,
    Started,
    Tokenization,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from loramux._version import __version__

for _error in list(vars().values()):
    if isinstance(_error, type) and issubclass(_error, LoramuxError):
        # Tracebacks and pickles name what users can import.
        _error.__module__ = __name__
del _error

__all__ = [
    "Adapter",
    "AdapterEvent",
    "AdapterEventKind",
    "AdapterFile",
    "AdapterIncompatible",
    "AdapterNotFound",
    "AdapterPin",
    "AdapterResidency",
    "AdapterVersion",
    "AdapterVersionRef",
    "AdapterWatch",
    "Adapters",
    "AsyncAdapterWatch",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncGenerationStream",
    "BaseFingerprint",
    "BatchItem",
    "BatchRequest",
    "Cancelled",
    "ChatMessage",
    "ChatPrompt",
    "Client",
    "ClientStateError",
    "Conflict",
    "DeadlineExceeded",
    "Delta",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "GenerationResult",
    "GenerationStream",
    "Grant",
    "InvalidRequest",
    "Limits",
    "LoadLevel",
    "LoramuxError",
    "MatchedStop",
    "Model",
    "NotAuthenticated",
    "NotFound",
    "NotServedYet",
    "Output",
    "Overloaded",
    "PermissionDenied",
    "PositionLogprobs",
    "Prompt",
    "QuotaExceeded",
    "ReplicaLoad",
    "ResidencyLevel",
    "ResponseFormat",
    "RetryPolicy",
    "SamplingFields",
    "SamplingParams",
    "ServerError",
    "ServerState",
    "ServerStatus",
    "Started",
    "StreamInterrupted",
    "TLSConfig",
    "TenantLoad",
    "TokenLogprob",
    "Tokenization",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "TrafficTarget",
    "Unavailable",
    "Usage",
    "UsageEntry",
    "VersionState",
    "WeightFormat",
    "__version__",
]
