"""Properties of the pure parts, over random inputs."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loramux import BatchRequest, FinishReason, SamplingParams, StreamInterrupted
from loramux._batch import BatchFold, GroupBuilder
from loramux._events import GenerationFold
from loramux._requests import batch_item, duration, sampling_message
from loramux._upload import UploadPosition
from loramux.v1 import adapter_pb2
from loramux.v1 import generation_pb2 as pb

STARTED = pb.GenerateResponse(started=pb.Started(generation_id="g", replica_id="r"))
USAGE = pb.GenerateResponse(usage=pb.Usage(output_tokens=1))


def delta(index: int, text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=[ord(c) for c in text]))


def finished(index: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(index=index, reason=pb.FINISH_REASON_STOP))


@given(pieces=st.lists(st.tuples(st.integers(0, 2), st.text(max_size=5)), max_size=20), cut=st.integers(0, 30))
def test_any_split_of_a_stream_folds_to_the_same(pieces: list[tuple[int, str]], cut: int) -> None:
    events = [STARTED, *(delta(*piece) for piece in pieces), *(finished(i) for i in range(3)), USAGE]
    expected = ["".join(text for i, text in pieces if i == index) for index in range(3)]
    fold = GenerationFold(3)
    for event in events:
        assert not fold.complete
        fold.apply(event)
    assert fold.complete
    assert [output.text for output in fold.result().outputs] == expected

    broken = GenerationFold(3)
    taken = events[: min(cut, len(events) - 1)]
    for event in taken:
        broken.apply(event)
    error = broken.failed(None)
    assert isinstance(error, StreamInterrupted)
    assert error.tokens_received == sum(len(event.delta.token_ids) for event in taken)
    ends = sum(event.HasField("finished") for event in taken)
    assert sum(output.finish_reason is not FinishReason.INTERRUPTED for output in error.outputs) == ends


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 2_000_000), max_size=12), size=st.integers(1, 5))
def test_groups_keep_order_and_limits(sizes: list[int], size: int) -> None:
    builder = GroupBuilder(size, adapter=None)
    groups = []
    for length in sizes:
        while builder.full:
            groups.append(builder.take())
        assert builder.add("x" * length) is None
    while builder.items:
        groups.append(builder.take())
    assert [item.item_id for group in groups for item in group] == [str(index) for index in range(len(sizes))]
    for group in groups:
        assert 1 <= len(group) <= size
        assert pb.BatchGenerateRequest(items=group, pin_versions=True).ByteSize() <= 4 * 1024 * 1024


@given(data=st.data(), count=st.integers(1, 6))
def test_every_item_of_a_group_gets_one_answer(data: st.DataObject, count: int) -> None:
    items = [batch_item(index, BatchRequest("x"), None) for index in range(count)]
    fold = BatchFold(items)
    script: list[pb.BatchGenerateResponse] = []
    for item in items:
        kind = data.draw(st.sampled_from(["good", "failed", "cut", "silent"]))
        events = {"good": [STARTED, finished(0), USAGE], "failed": [STARTED], "cut": [STARTED], "silent": []}[kind]
        script += [pb.BatchGenerateResponse(item_id=item.item_id, event=event) for event in events]
        if kind == "failed":
            script.append(pb.BatchGenerateResponse(item_id=item.item_id))
            script[-1].status.code = 8
    script.append(pb.BatchGenerateResponse(item_id="unknown", event=STARTED))
    answers = [answer for message in script if (answer := fold.apply(message, request_id="r")) is not None]
    answers += fold.rest(None)
    assert sorted(answer.item_id for answer in answers) == sorted(item.item_id for item in items)
    assert all((answer.result is None) != (answer.error is None) for answer in answers)


@given(st.floats(-1e9, 1e9, allow_nan=False))
def test_durations_are_exact_to_a_nanosecond(seconds: float) -> None:
    message = duration("timeout", seconds)
    assert 0 <= message.nanos < 1_000_000_000
    assert abs(message.seconds + message.nanos / 1e9 - seconds) <= 1e-6


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 10, width=32),
    "top_k": st.integers(0, 2**32 - 1),
    "seed": st.integers(0, 2**64 - 1),
    "priority": st.integers(-(2**31), 2**31 - 1),
    "stop": st.lists(st.text(max_size=4), max_size=3),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 20),
}


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_only_what_is_given_is_sent(values: dict[str, Any]) -> None:
    message = sampling_message(SamplingParams(**values))
    present = {field.name for field, _ in message.ListFields()}
    assert present == {name for name, value in values.items() if value != []}
    for name in present:
        assert getattr(message, name) == values[name]


@given(st.lists(st.integers(0, 100), max_size=20))
def test_an_upload_gets_further_only_past_its_best(commits: list[int]) -> None:
    position = UploadPosition(adapter_pb2.AdapterUpload(upload_id="u", committed_bytes=0, total_bytes=100))
    best = 0
    for committed in commits:
        further = position.move(adapter_pb2.AdapterUpload(committed_bytes=committed))
        assert further == (committed > best)
        best = max(best, committed)
        assert position.committed == committed
        assert position.complete == (committed == 100)
