"""Where the time of a decode step goes: kernels by name and by part, their sum against the step, and the gaps."""

import dataclasses
from collections.abc import Sequence

PARTS = {
    "LoRA": ("_shrink", "_expand", "_plan"),
    "attention": ("_attend", "_combine"),
    "sampler": ("_pick", "topk", "argmax", "ArgMax", "radix", "Radix", "bitonic", "logsumexp"),
    "norm, rope, activation": ("_rms_norm", "_rope", "_glu"),
    "copies": ("Memcpy", "Memset", "copy", "Copy", "index"),
    "dequantize": ("equantize",),
    "NF4 product": ("4bit", "nf4", "NF4"),
    "dense product": ("gemm", "cutlass", "nvjet", "gemv", "splitK", "wgmma", "addmm", "::mm", "linear"),
}
"""Parts of a step, each with pieces of its kernels' names; the first that fits counts."""

MOST_GAPS = 0.05
"""Share of a step in which the device may do nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One launch, in microseconds of the profiler's clock."""

    name: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """One decode step, the mean of several.

    Attributes:
        rows: Sequences.
        adapters: Distinct adapters.
        weights: As served.
        step_ms: A step by the host's clock, without the profiler.
        kernel_ms: All kernels, added up; those that overlap count twice.
        busy_ms: Time in which at least one kernel ran.
        timeline_gap_share: Share of the profiled timeline in which none ran; the profiler's own cost is in it.
        launches: Kernels.
        parts: Milliseconds by part, of `kernel_ms`.
        kernels: (name, launches, milliseconds), the longest first.
    """

    rows: int
    adapters: int
    weights: str
    step_ms: float
    kernel_ms: float
    busy_ms: float
    timeline_gap_share: float
    launches: float
    parts: dict[str, float]
    kernels: list[tuple[str, float, float]]

    @property
    def gap_ms(self) -> float:
        """What of the step no kernel fills."""
        return max(0.0, self.step_ms - self.busy_ms)

    @property
    def gap_share(self) -> float:
        """The same as a share of the step."""
        return self.gap_ms / self.step_ms

    def plain(self) -> dict[str, object]:
        """For JSON."""
        return {**dataclasses.asdict(self), "gap_ms": self.gap_ms, "gap_share": self.gap_share}

    def report(self, *, most: int = 18) -> str:
        """Lines of text: the sum against the step, gaps, parts, the longest kernels.

        Args:
            most: Kernels that are listed.
        """
        verdict = "within" if self.gap_share <= MOST_GAPS else "MORE THAN"
        lines = [
            f"{self.rows} rows, {self.adapters or 'no'} adapters, {self.weights}: {self.step_ms:.2f} ms a step",
            f"  kernels: {self.kernel_ms:.2f} ms in {self.launches:.0f} launches = {self.kernel_ms / self.step_ms:.1%} "
            f"of the step; busy {self.busy_ms:.2f} ms, overlaps counted once",
            f"  gaps: {self.gap_ms:.2f} ms = {self.gap_share:.1%} of the step, {verdict} the {MOST_GAPS:.0%} allowed; "
            f"{self.timeline_gap_share:.1%} of the profiled timeline",
            "  by part:",
        ]
        for name, spent in sorted(self.parts.items(), key=lambda part: -part[1]):
            lines.append(f"  {spent:8.3f} ms {spent / self.step_ms:7.1%}  {name}")
        lines.append("  by kernel:")
        for name, launches, spent in self.kernels[:most]:
            each = 1000 * spent / launches
            lines.append(f"  {spent:8.3f} ms {spent / self.step_ms:7.1%} {launches:6.0f} x {each:8.1f} us  {name[:90]}")
        if rest := self.kernels[most:]:
            spent = sum(spent for _, _, spent in rest)
            lines.append(
                f"  {spent:8.3f} ms {spent / self.step_ms:7.1%}  {len(rest)} other{'s' if len(rest) > 1 else ''}"
            )
        return "\n".join(lines)


def step_profile(
    kernels: Sequence[Kernel], *, steps: int, step_s: float, rows: int, adapters: int, weights: str
) -> StepProfile:
    """Add up.

    Args:
        kernels: Launches of all profiled steps.
        steps: How many those were.
        step_s: Seconds a step, without the profiler.
        rows: As the attribute.
        adapters: As the attribute.
        weights: As the attribute.

    Raises:
        ValueError: There are no kernels.
    """
    if not kernels:
        raise ValueError("the profiler saw no kernel; see that nothing else profiles this device")
    sums: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        launches, spent = sums.get(kernel.name, (0, 0.0))
        sums[kernel.name] = (launches + 1, spent + kernel.end - kernel.begin)
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for name, (_, spent) in sums.items():
        parts[part_of(name)] += spent / steps / 1000
    busy, span = _busy(kernels)
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return StepProfile(
        rows=rows,
        adapters=adapters,
        weights=weights,
        step_ms=1000 * step_s,
        kernel_ms=sum(spent for _, spent in sums.values()) / steps / 1000,
        busy_ms=busy / steps / 1000,
        timeline_gap_share=1 - busy / span if span else 0.0,
        launches=len(kernels) / steps,
        parts={part: value for part, value in parts.items() if value},
        kernels=[(name, launches / steps, spent / steps / 1000) for name, (launches, spent) in ordered],
    )


def part_of(name: str) -> str:
    """The part of a step that a kernel belongs to; `other` where none fits."""
    return next((part for part, pieces in PARTS.items() if any(piece in name for piece in pieces)), "other")


def _busy(kernels: Sequence[Kernel]) -> tuple[float, float]:
    """Microseconds in which at least one kernel ran, and from the first begin to the last end."""
    ordered = sorted(kernels, key=lambda kernel: kernel.begin)
    busy, until = 0.0, ordered[0].begin
    for kernel in ordered:
        busy += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return busy, until - ordered[0].begin
