import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.errors import InvalidRequest, Reason
from loramux_server.tenancy import names

DIGEST = "0123456789abcdef" * 4
SHORT = DIGEST[:16]

ATTACKS = [
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "a/../b",
    "a\0b",
    "bot\n",
    " bot",
    "Bot",
    "böt",
    "ｂot",
    "-bot",
    "_bot",
    "a" * 64,
    "a" * 300,
    "a" * 100_000,
    "tenants/default/adapters/../x",
    "tenants/default/adapters/",
    "tenants//adapters/bot",
    "tenants/default/adapters/bot/versions/",
    "tenants/default/adapters/bot/versions/../../x",
    f"tenants/default/adapters/bot@{SHORT}/versions/{SHORT}",
    f"bot@{SHORT}@{SHORT}",
    "bot@",
    "bot@latest",
    f"bot@{SHORT.upper()}",
    f"bot@{SHORT}0",
    "\u202ebot",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_a_hostile_name_is_refused_with_its_field_and_a_short_ascii_echo(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        names.parse_reference(text, "default", "adapter")
    assert caught.value.reason is Reason.INVALID_PARAMETER
    assert caught.value.field == "adapter"
    assert caught.value.message.isascii() and len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("text", "tenant", "adapter", "version"),
    [
        ("bot", "default", "bot", None),
        ("a" * 63, "default", "a" * 63, None),
        ("0.b_c-d", "default", "0.b_c-d", None),
        (f"bot@{SHORT}", "default", "bot", SHORT),
        (f"bot@{DIGEST}", "default", "bot", DIGEST),
        ("tenants/acme/adapters/bot", "acme", "bot", None),
        (f"tenants/acme/adapters/bot@{SHORT}", "acme", "bot", SHORT),
        (f"tenants/acme/adapters/bot/versions/{SHORT}", "acme", "bot", SHORT),
        (f"tenants/acme/adapters/bot/versions/{DIGEST}", "acme", "bot", DIGEST),
    ],
)
def test_every_form_of_a_reference(text: str, tenant: str, adapter: str, version: str | None) -> None:
    expected = names.AdapterReference(tenant=tenant, adapter=adapter, version=version)
    assert names.parse_reference(text, "default", "adapter") == expected


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="adapter is empty"):
        names.parse_reference("", "default", "adapter")


def test_adapter_and_version_are_told_apart() -> None:
    with pytest.raises(InvalidRequest, match="without a version"):
        names.parse_adapter(f"bot@{SHORT}", "default", "name")
    with pytest.raises(InvalidRequest, match="name a version"):
        names.parse_version("bot", "default", "name")


def test_not_found_reads_the_same_for_unknown_and_foreign() -> None:
    own = names.parse_reference("bot", "default", "adapter")
    foreign = names.parse_reference("tenants/acme/adapters/bot", "default", "adapter")
    assert names.adapter_not_found(own).message == names.adapter_not_found(foreign).message
    assert "acme" not in names.adapter_not_found(foreign).message


def test_a_version_key_shows_as_the_short_name() -> None:
    key = names.version_key("acme", "bot", DIGEST)
    assert names.split_version_key(key) == ("acme", "bot", DIGEST)
    assert names.shown_version(key) == f"tenants/acme/adapters/bot/versions/{SHORT}"


@given(st.text(max_size=100))
def test_what_passes_is_safe_as_one_path_part(text: str) -> None:
    try:
        reference = names.parse_reference(text, "default", "adapter")
    except InvalidRequest:
        return
    for part in (reference.tenant, reference.adapter):
        assert part.isascii() and part[0].isalnum() and not set(part) & set("/\\\0\n ")
        assert len(part) <= 63


@given(st.from_regex(names.NAME, fullmatch=True), st.from_regex(names.NAME, fullmatch=True))
def test_full_names_round_trip(tenant: str, adapter: str) -> None:
    reference = names.parse_reference(names.adapter_name(tenant, adapter), "default", "adapter")
    assert (reference.tenant, reference.adapter) == (tenant, adapter)
