"""The bound on waiting requests."""

import asyncio

import pytest

from loramux_server.errors import Reason, ResourceExhausted
from loramux_server.rpc.admission import AdmissionGate


def test_a_full_gate_refuses_and_takes_nothing() -> None:
    gate = AdmissionGate(max_queued=2, retry_after=3.0)
    tickets = [gate.enter(), gate.enter()]
    with pytest.raises(ResourceExhausted, match="2 requests wait") as error:
        gate.enter()
    assert error.value.reason is Reason.QUEUE_FULL and error.value.retry_after == 3.0
    tickets[0].leave()
    tickets[0].leave()
    assert gate.queued == 1
    gate.enter()
    assert gate.queued == 2


async def test_the_patient_wait_for_half_and_keep_their_order() -> None:
    gate = AdmissionGate(max_queued=4)
    first, second = gate.enter(), gate.enter()
    order: list[int] = []

    async def patient(number: int) -> None:
        ticket = await gate.enter_when_calm()
        order.append(number)
        await asyncio.sleep(0)
        ticket.leave()

    tasks = [asyncio.create_task(patient(number)) for number in range(3)]
    await asyncio.sleep(0.01)
    assert order == [] and gate.queued == 2
    third = gate.enter()
    second.leave()
    await asyncio.sleep(0.01)
    assert order == [], "still half taken"
    first.leave()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]
    third.leave()
    assert gate.queued == 0


async def test_a_patient_that_leaves_passes_its_turn_on() -> None:
    gate = AdmissionGate(max_queued=2)
    ticket = gate.enter()
    leaver = asyncio.create_task(gate.enter_when_calm())
    stayer = asyncio.create_task(gate.enter_when_calm())
    await asyncio.sleep(0)
    ticket.leave()
    leaver.cancel()
    async with asyncio.timeout(2):
        (await stayer).leave()
    assert leaver.cancelled() and gate.queued == 0
