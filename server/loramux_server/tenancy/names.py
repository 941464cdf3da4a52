"""Resource names: the only way in which a caller's text becomes a key or part of a path.

`tenants/{t}/adapters/{a}/versions/{v}`: {t} and {a} match `NAME`, {v} is the digest of the version in 64 lower-case
hexadecimal digits, or its first 16. The API shows 16; keys (registry, store, engine) hold all 64.
"""

import re
from dataclasses import dataclass

from loramux_server.errors import InvalidRequest, NotFound, Reason

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
SHORT_DIGITS = 16
_VERSION = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}", re.ASCII)
_LONGEST = 512
_ECHO = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReference:
    """An adapter that a caller named, with or without a version; syntax checked, existence not.

    Attributes:
        tenant: {t}, as named or the acted-for one.
        adapter: {a}.
        version: 16 or 64 digits, or None.
    """

    tenant: str
    adapter: str
    version: str | None = None


def adapter_name(tenant: str, adapter: str) -> str:
    """Full name of an adapter; also the engine's alias key."""
    return f"tenants/{tenant}/adapters/{adapter}"


def version_name(tenant: str, adapter: str, digest: str) -> str:
    """Full name of a version as the API shows it: 16 digits."""
    return f"tenants/{tenant}/adapters/{adapter}/versions/{digest[:SHORT_DIGITS]}"


def version_key(tenant: str, adapter: str, digest: str) -> str:
    """The engine's key of a version: the name with all 64 digits, so that no prefix collision can mix two versions."""
    return f"tenants/{tenant}/adapters/{adapter}/versions/{digest}"


def split_version_key(key: str) -> tuple[str, str, str]:
    """Take a `version_key` apart: (tenant, adapter, digest)."""
    _, tenant, _, adapter, _, digest = key.split("/")
    return tenant, adapter, digest


def shown_version(key: str) -> str:
    """The API's name of a version whose `version_key` the engine reported."""
    return version_name(*split_version_key(key))


def echo(text: str) -> str:
    """Quote a caller's text for an error message: printable ASCII, at most 80 characters."""
    quoted = ascii(text[:_ECHO])
    return quoted if len(text) <= _ECHO else f"{quoted}... ({len(text)} characters)"


def check_name(text: str, field: str) -> str:
    """Check {a} or {t}.

    Args:
        text: What the caller sent.
        field: Request field for the error.

    Raises:
        InvalidRequest: It does not match `NAME`.
    """
    if not NAME.fullmatch(text):
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"{field}: {echo(text)} is no valid name; use 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "starting with a letter or digit",
            field=field,
        )
    return text


def check_version(text: str, field: str) -> str:
    """Check {v}: 16 or 64 lower-case hexadecimal digits.

    Raises:
        InvalidRequest: It is neither.
    """
    if not _VERSION.fullmatch(text):
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"{field}: {echo(text)} is no version; use the first 16 or all 64 hexadecimal digits of its digest",
            field=field,
        )
    return text


def parse_reference(text: str, tenant: str, field: str) -> AdapterReference:
    """Parse `{a}`, `{a}@{v}`, `tenants/{t}/adapters/{a}`, the same with `@{v}` or with `/versions/{v}`.

    Args:
        text: What the caller sent.
        tenant: The acted-for tenant, used when the text names none.
        field: Request field for the error.

    Raises:
        InvalidRequest: The text is empty or matches none of the forms.
    """
    if not text:
        raise InvalidRequest(Reason.INVALID_PARAMETER, f"{field} is empty; name an adapter", field=field)
    if len(text) > _LONGEST:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"{field} has {len(text)} characters; a name has at most {_LONGEST}",
            field=field,
        )
    match text.split("/"):
        case [name]:
            owner = tenant
        case ["tenants", owner, "adapters", name]:
            check_name(owner, field)
        case ["tenants", owner, "adapters", name, "versions", version] if "@" not in name:
            check_name(owner, field)
            return AdapterReference(
                tenant=owner, adapter=check_name(name, field), version=check_version(version, field)
            )
        case _:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                f"{field}: {echo(text)} is no adapter name; use NAME, NAME@VERSION, tenants/T/adapters/NAME or "
                "tenants/T/adapters/NAME/versions/VERSION",
                field=field,
            )
    name, at, version = name.partition("@")
    return AdapterReference(
        tenant=owner,
        adapter=check_name(name, field),
        version=check_version(version, field) if at else None,
    )


def parse_adapter(text: str, tenant: str, field: str) -> AdapterReference:
    """Parse the name of an adapter, which must not carry a version.

    Raises:
        InvalidRequest: As `parse_reference`, or there is a version.
    """
    reference = parse_reference(text, tenant, field)
    if reference.version is not None:
        raise InvalidRequest(Reason.INVALID_PARAMETER, f"{field}: name the adapter without a version", field=field)
    return reference


def parse_version(text: str, tenant: str, field: str) -> AdapterReference:
    """Parse the name of a version: `{a}@{v}` or the full name.

    Raises:
        InvalidRequest: As `parse_reference`, or there is no version.
    """
    reference = parse_reference(text, tenant, field)
    if reference.version is None:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"{field}: name a version, NAME@VERSION or tenants/T/adapters/NAME/versions/VERSION",
            field=field,
        )
    return reference


def adapter_not_found(reference: AdapterReference) -> NotFound:
    """The one answer for an adapter that is unknown, foreign or forbidden.

    It names only {a} and {v}, which the caller sent, so that the text cannot tell the cases apart.
    """
    shown = reference.adapter if reference.version is None else f"{reference.adapter}@{reference.version}"
    return NotFound(
        Reason.ADAPTER_NOT_FOUND,
        f"adapter {shown!r} is not known to this tenant; ListAdapters and ListAdapterVersions name what it has",
        metadata={"adapter": shown},
    )
