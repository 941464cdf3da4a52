"""Where the wheel keeps the base and the tenants' adapters."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""The quantized base: a whole model directory."""

ADAPTERS = Path(__file__).parent / "adapters"
"""One adapter directory a data set of `tenants.TENANTS`."""

EMBEDDED_ADAPTERS = {
    "acme": "acme",
    "globex": "globex",
    "initech-v1": "initech",
    "initech-v2": "initech",
}
"""Data set -> adapter that it is a version of; the first version of an adapter gets its traffic."""
