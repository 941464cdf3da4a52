# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Launches that overlap: on compute capability 9.0 a kernel may start while the one in front of it ends.

A kernel that is launched with `launch_options()` calls `wait_for_front` before it touches memory. Until then it has
only come onto the card; from then on everything in front of it is over and visible, and the next one may come. That
holds for kernels further in front, too: each ends after its own wait.
"""

import functools

import triton
import triton.language as tl

from loramux_server.kernels.capability import launches_overlap

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4
    gdc_wait = gdc_launch_dependents = None

OVERLAPS: tl.constexpr = tl.constexpr(gdc_wait is not None and launches_overlap())


@triton.jit
def wait_for_front():
    """Wait for the kernels in front, let the next one come."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def launch_options() -> dict[str, bool]:
    """Options of a launch whose only kernel in front is on the same stream."""
    return {"launch_pdl": True} if OVERLAPS.value else {}
