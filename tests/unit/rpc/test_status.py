"""Every error class and reason becomes one status with bounded details."""

import grpc
import pytest
from google.rpc import error_details_pb2

from loramux_server.errors import (
    InvalidRequest,
    LoramuxServerError,
    NotFound,
    Reason,
    ResourceExhausted,
    from_reason,
)
from loramux_server.rpc.status import MAX_DETAILS_BYTES, STATUS_CODES, code_of, to_status, trailers_of
from tests.support.front_end import detail


def test_every_class_has_one_code() -> None:
    assert set(STATUS_CODES) == set(LoramuxServerError.__subclasses__())
    assert len(set(STATUS_CODES.values())) == len(STATUS_CODES)
    assert grpc.StatusCode.UNKNOWN not in STATUS_CODES.values()


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_mapped_with_its_name_and_domain(reason: Reason) -> None:
    error = from_reason(reason.value, "what and how out", retry_after=1.5)
    status = to_status(error)
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason.value, "loramux")
    assert status.code == code_of(error).value[0] != 0
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1500
    assert dict(trailers_of(status, error))["grpc-retry-pushback-ms"] == "1500"


def test_details_that_fit_the_error() -> None:
    status = to_status(InvalidRequest(Reason.INVALID_PARAMETER, "n is 0; use 1 to 16", field="sampling.n"))
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("sampling.n", "n is 0; use 1 to 16")
    assert detail(status, error_details_pb2.RetryInfo) is None
    assert "grpc-retry-pushback-ms" not in dict(trailers_of(status, from_reason("INTERNAL", "x")))
    found = detail(to_status(NotFound(Reason.ADAPTER_NOT_FOUND, "no")), error_details_pb2.ResourceInfo)
    assert found.resource_type == "loramux.v1/adapter"
    quota = detail(to_status(ResourceExhausted(Reason.TENANT_QUOTA, "over")), error_details_pb2.QuotaFailure)
    assert quota.violations[0].description == "over"


def test_details_stay_below_four_kibibytes() -> None:
    error = InvalidRequest(
        Reason.INVALID_PARAMETER,
        "ü" * 100_000,
        field="f" * 10_000,
        metadata={f"key-{n}" * 50: "v" * 10_000 for n in range(100)},
        retry_after=1,
    )
    status = to_status(error)
    assert status.ByteSize() <= MAX_DETAILS_BYTES and len(status.message) == 1024
    assert all(len(value) <= 8192 for _, value in trailers_of(status, error))
