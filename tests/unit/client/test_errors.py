"""The error tree: codes, reasons, details, pickling."""

import pickle  # noqa: TID251  errors cross process pools; these bytes are our own
import re

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import loramux
from loramux import _errors as errors
from loramux import _requests, _status
from loramux.testing import FakeError


def failure(
    code: str, *, status: status_pb2.Status | None = None, pushback: str | None = None, headers_seen: bool = False
) -> _status.Failure:
    trailers: list[tuple[str, str | bytes]] = []
    if status is not None:
        trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    if pushback is not None:
        trailers.append(("grpc-retry-pushback-ms", pushback))
    return _status.failure_from_call(code, "text", trailers, headers_seen=headers_seen, request_id="r1")


def tree() -> list[type[loramux.LoramuxError]]:
    found, todo = [], [loramux.LoramuxError]
    while todo:
        cls = todo.pop()
        found.append(cls)
        todo.extend(cls.__subclasses__())
    return found


class TestTree:
    def test_every_class_is_public_and_drawn(self) -> None:
        drawing = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
        names = {cls.__name__ for cls in tree()} - {"LoramuxError"}
        assert drawing == names
        assert names <= set(loramux.__all__)

    def test_names_of_the_contract(self) -> None:
        for name in [
            "InvalidRequest",
            "NotAuthenticated",
            "PermissionDenied",
            "AdapterNotFound",
            "AdapterIncompatible",
            "Conflict",
            "QuotaExceeded",
            "Overloaded",
            "Unavailable",
            "DeadlineExceeded",
            "StreamInterrupted",
        ]:
            assert issubclass(getattr(loramux, name), loramux.LoramuxError)
        assert issubclass(loramux.DeadlineExceeded, TimeoutError)
        assert issubclass(loramux.InvalidRequest, ValueError)
        assert issubclass(loramux.AdapterNotFound, loramux.NotFound)

    @pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
    def test_pickling_keeps_everything(self, cls: type[loramux.LoramuxError]) -> None:
        error = cls(
            "text",
            code="ABORTED",
            reason="WHY",
            metadata={"a": "b"},
            retry_after=1.5,
            generation_id="g",
            request_id="r",
            field_violations=(loramux.FieldViolation(field="f", description="d"),),
        )
        if isinstance(error, loramux.StreamInterrupted):
            error.partial, error.tokens_received = "Hel", 3
            error.outputs = (
                loramux.Output(
                    index=0, text="Hel", token_ids=(1, 2, 3), finish_reason=loramux.FinishReason.INTERRUPTED
                ),
            )
        again = pickle.loads(pickle.dumps(error))  # noqa: S301  made one line above
        assert type(again) is cls
        assert again.__dict__ == error.__dict__
        assert str(again) == str(error)
        assert again.args == error.args

    def test_text_names_reason_request_and_fields(self) -> None:
        error = loramux.InvalidRequest(
            "no",
            reason="INVALID_PARAMETER",
            request_id="r1",
            field_violations=(loramux.FieldViolation(field="sampling.n", description="is 0"),),
        )
        assert str(error) == "no [INVALID_PARAMETER] (request r1) sampling.n: is 0"

    def test_text_says_nothing_twice(self) -> None:
        error = _requests.invalid("sampling.n", "is 0; use 1 to 16")
        assert str(error) == "sampling.n is 0; use 1 to 16 [INVALID_PARAMETER]"

    def test_names_are_those_that_users_import(self) -> None:
        errors = [value for value in vars(loramux).values() if isinstance(value, type) and issubclass(value, Exception)]
        assert len(errors) > 10
        assert {error.__module__ for error in errors} == {"loramux"}

    def test_a_deadline_of_our_own_says_what_to_do(self) -> None:
        error = failure("DEADLINE_EXCEEDED").error
        assert "allow more time" in error.message


class TestMapping:
    def test_every_code_of_grpc_has_a_class(self) -> None:
        assert set(_status.CODE_NAMES) == {code.name for code in grpc.StatusCode}
        for code in grpc.StatusCode:
            assert _status.CODE_NAMES[code.value[0]] == code.name
            if code is not grpc.StatusCode.OK:
                error = failure(code.name).error
                assert type(error) is not loramux.LoramuxError
                assert (error.code, error.reason) == (code.name, "") and "text" in error.message

    @pytest.mark.parametrize(
        ("code", "reason", "cls"),
        [
            ("NOT_FOUND", "ADAPTER_NOT_FOUND", loramux.AdapterNotFound),
            ("NOT_FOUND", "UPLOAD_NOT_FOUND", loramux.NotFound),
            ("NOT_FOUND", "", loramux.NotFound),
            ("FAILED_PRECONDITION", "ADAPTER_INCOMPATIBLE", loramux.AdapterIncompatible),
            ("INVALID_ARGUMENT", "ADAPTER_NUMERICS", loramux.AdapterIncompatible),
            ("FAILED_PRECONDITION", "VERSION_IN_USE", loramux.Conflict),
            ("ABORTED", "VERSION_CONFLICT", loramux.Conflict),
            ("ALREADY_EXISTS", "ADAPTER_EXISTS", loramux.Conflict),
            ("RESOURCE_EXHAUSTED", "TENANT_QUOTA", loramux.QuotaExceeded),
            ("RESOURCE_EXHAUSTED", "QUEUE_FULL", loramux.Overloaded),
            ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", loramux.Overloaded),
            ("RESOURCE_EXHAUSTED", "SLOW_READER", loramux.Overloaded),
            ("UNAVAILABLE", "ADAPTER_LOADING", loramux.Unavailable),
            ("UNAUTHENTICATED", "UNAUTHENTICATED", loramux.NotAuthenticated),
            ("PERMISSION_DENIED", "PERMISSION_DENIED", loramux.PermissionDenied),
            ("INVALID_ARGUMENT", "PROMPT_TOO_LONG", loramux.InvalidRequest),
            ("UNIMPLEMENTED", "NOT_SERVED_YET", loramux.NotServedYet),
            ("DEADLINE_EXCEEDED", "", loramux.DeadlineExceeded),
            ("INTERNAL", "INTERNAL", loramux.ServerError),
            ("UNAVAILABLE", "A_REASON_OF_TOMORROW", loramux.Unavailable),
        ],
    )
    def test_reason_then_code(self, code: str, reason: str, cls: type[loramux.LoramuxError]) -> None:
        error = failure(code, status=FakeError(code, reason).status()).error
        assert type(error) is cls
        assert error.reason == reason

    def test_details_arrive(self) -> None:
        scripted = FakeError(
            "RESOURCE_EXHAUSTED",
            "TENANT_QUOTA",
            "too much",
            metadata={"quota": "tokens"},
            retry_after=1.25,
            field_violations=[("sampling.max_tokens", "is 9")],
        )
        error = failure("RESOURCE_EXHAUSTED", status=scripted.status()).error
        assert error.message == "too much"
        assert error.metadata == {"quota": "tokens"}
        assert error.retry_after == 1.25
        assert error.field_violations == (loramux.FieldViolation(field="sampling.max_tokens", description="is 9"),)
        assert error.request_id == "r1"

    def test_details_that_are_not_ours_do_not_hide_the_status(self) -> None:
        trailers = [("grpc-status-details-bin", b"\xff\xff\xff")]
        error = _status.failure_from_call("NOT_FOUND", "text", trailers, headers_seen=False).error
        assert (type(error), error.message) == (loramux.NotFound, "text")

    def test_details_of_another_code_are_left_out(self) -> None:
        error = failure("UNAVAILABLE", status=FakeError("NOT_FOUND", "ADAPTER_NOT_FOUND").status()).error
        assert (type(error), error.reason, error.message) == (loramux.Unavailable, "", "text")

    def test_a_detail_that_cannot_be_read_is_left_out(self) -> None:
        status = status_pb2.Status(code=5, message="gone")
        status.details.add(
            type_url=f"type.googleapis.com/{error_details_pb2.ErrorInfo.DESCRIPTOR.full_name}", value=b"\xff"
        )
        assert failure("NOT_FOUND", status=status).error.message == "gone"

    @pytest.mark.parametrize(("text", "seconds"), [("250", 0.25), ("-1", -1.0), ("soon", -1.0)])
    def test_pushback(self, text: str, seconds: float) -> None:
        assert failure("UNAVAILABLE", pushback=text).pushback == seconds

    def test_a_code_that_grpc_does_not_know(self) -> None:
        assert _status.error_from_status(status_pb2.Status(code=99, message="?")).code == "UNKNOWN"
