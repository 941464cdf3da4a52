"""The methods that the SDK calls: path and messages, one table for both clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from loramux.v1 import adapter_pb2 as adapter
from loramux.v1 import generation_pb2 as generation
from loramux.v1 import model_pb2 as model

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, R]):
    """A method of the API.

    Attributes:
        service: Name of the service in `loramux.v1`.
        name: Name of the method.
        request: Class of the request.
        response: Class of the response.
    """

    service: str
    name: str
    request: type[Q]
    response: type[R]

    @property
    def path(self) -> str:
        """Full path, as in HTTP/2."""
        return f"/loramux.v1.{self.service}/{self.name}"


_G, _A, _M = "GenerationService", "AdapterService", "ModelService"

GENERATE = Method(_G, "Generate", generation.GenerateRequest, generation.GenerateResponse)
BATCH_GENERATE = Method(_G, "BatchGenerate", generation.BatchGenerateRequest, generation.BatchGenerateResponse)
TOKENIZE = Method(_G, "Tokenize", generation.TokenizeRequest, generation.TokenizeResponse)
DETOKENIZE = Method(_G, "Detokenize", generation.DetokenizeRequest, generation.DetokenizeResponse)
CANCEL_GENERATION = Method(
    _G, "CancelGeneration", generation.CancelGenerationRequest, generation.CancelGenerationResponse
)

START_UPLOAD = Method(_A, "StartAdapterUpload", adapter.StartAdapterUploadRequest, adapter.StartAdapterUploadResponse)
WRITE_UPLOAD = Method(_A, "WriteAdapterUpload", adapter.WriteAdapterUploadRequest, adapter.WriteAdapterUploadResponse)
GET_UPLOAD = Method(_A, "GetAdapterUpload", adapter.GetAdapterUploadRequest, adapter.GetAdapterUploadResponse)
FINISH_UPLOAD = Method(
    _A, "FinishAdapterUpload", adapter.FinishAdapterUploadRequest, adapter.FinishAdapterUploadResponse
)
GET_ADAPTER = Method(_A, "GetAdapter", adapter.GetAdapterRequest, adapter.GetAdapterResponse)
LIST_ADAPTERS = Method(_A, "ListAdapters", adapter.ListAdaptersRequest, adapter.ListAdaptersResponse)
GET_VERSION = Method(_A, "GetAdapterVersion", adapter.GetAdapterVersionRequest, adapter.GetAdapterVersionResponse)
LIST_VERSIONS = Method(
    _A, "ListAdapterVersions", adapter.ListAdapterVersionsRequest, adapter.ListAdapterVersionsResponse
)
UPDATE_ADAPTER = Method(_A, "UpdateAdapter", adapter.UpdateAdapterRequest, adapter.UpdateAdapterResponse)
DELETE_ADAPTER = Method(_A, "DeleteAdapter", adapter.DeleteAdapterRequest, adapter.DeleteAdapterResponse)
DELETE_VERSION = Method(
    _A, "DeleteAdapterVersion", adapter.DeleteAdapterVersionRequest, adapter.DeleteAdapterVersionResponse
)
PRELOAD_ADAPTER = Method(_A, "PreloadAdapter", adapter.PreloadAdapterRequest, adapter.PreloadAdapterResponse)
UNLOAD_ADAPTER = Method(_A, "UnloadAdapter", adapter.UnloadAdapterRequest, adapter.UnloadAdapterResponse)
WATCH_ADAPTERS = Method(_A, "WatchAdapters", adapter.WatchAdaptersRequest, adapter.WatchAdaptersResponse)
CREATE_GRANT = Method(_A, "CreateGrant", adapter.CreateGrantRequest, adapter.CreateGrantResponse)
LIST_GRANTS = Method(_A, "ListGrants", adapter.ListGrantsRequest, adapter.ListGrantsResponse)
DELETE_GRANT = Method(_A, "DeleteGrant", adapter.DeleteGrantRequest, adapter.DeleteGrantResponse)
GET_USAGE = Method(_A, "GetTenantUsage", adapter.GetTenantUsageRequest, adapter.GetTenantUsageResponse)

GET_MODEL = Method(_M, "GetModel", model.GetModelRequest, model.GetModelResponse)
GET_STATUS = Method(_M, "GetServerStatus", model.GetServerStatusRequest, model.GetServerStatusResponse)
