"""Times of device operations: in a CUDA graph over rotating operands, by CUDA events; and by a clock, for CPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]
"""One operation on one set of operands."""

REPLAYS = 9


class Timer(Protocol):
    """Takes the time of a list of calls."""

    def __call__(self, calls: Sequence[Call], *, graph: bool) -> float:
        """Seconds a call.

        Args:
            calls: Run one after another, each with operands of its own.
            graph: Whether they can be captured.
        """
        ...


class CudaTimer:
    """Median of several replays of one graph that holds all calls: no launch by the host is in it.

    Calls that cannot be captured are launched one by one; their time is the host's where that is the slower one.

    Args:
        device: The card.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, calls: Sequence[Call], *, graph: bool) -> float:
        """Seconds a call; see `Timer`."""

        def run() -> None:
            for call in calls:
                call()

        with torch.inference_mode():
            run()  # kernels compile, libraries take their workspaces
            torch.cuda.synchronize(self._device)
            launch: Call = run
            if graph:
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    run()
                launch = captured.replay
            launch()
            return statistics.median(self._between_events(launch) for _ in range(REPLAYS)) / len(calls)

    def _between_events(self, launch: Call) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


class ClockTimer:
    """Median of several runs by the host's clock."""

    def __call__(self, calls: Sequence[Call], *, graph: bool) -> float:
        """Seconds a call; see `Timer`."""
        times = []
        with torch.inference_mode():
            for _ in range(3):
                began = time.perf_counter()
                for call in calls:
                    call()
                times.append(time.perf_counter() - began)
        return statistics.median(times) / len(calls)
