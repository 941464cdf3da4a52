"""`publish`: sends an adapter to a running server and gives it the traffic."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from loramux import AdapterVersion, BaseFingerprint, Client, LoramuxError, Unavailable
from loramux_base.adapter import AdapterFormatError, read_manifest
from loramux_base.manifest import MANIFEST_NAME, AdapterManifest
from loramux_trainer.digests import check_files
from loramux_trainer.errors import PublishRefused

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Where an adapter goes.

    Attributes:
        server: `host:port`.
        name: Adapter that the version belongs to; made if needed.
        tenant: Tenant to act for; None = the credential's own.
        token: Bearer token; None for none.
        promote: Whether the version gets all traffic at once.
        allow_other_template: Publish although the server renders chats by another template than training did.
    """

    server: str
    name: str
    tenant: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    promote: bool = True
    allow_other_template: bool = False


def publish(adapter: Path, target: Target, *, progress: Progress | None = None) -> AdapterVersion:
    """Upload, have the server validate, and promote.

    The base is compared before a byte is sent; the server compares again.

    Args:
        adapter: Adapter directory with our manifest.
        target: Where to.
        progress: Called with bytes sent and bytes in all.

    Raises:
        PublishRefused: No manifest, another base, or the server's refusal.
    """
    try:
        manifest = read_manifest(adapter)
    except AdapterFormatError as error:
        raise PublishRefused(f"{adapter}: {error}") from error
    if manifest is None:
        raise PublishRefused(
            f"{adapter}: has no {MANIFEST_NAME}, so nothing says which base it was trained on; publish the directory "
            "`adapter` of a run of this trainer"
        )
    try:
        check_files(adapter, manifest)
        with Client(target.server, token=target.token, tenant=target.tenant) as client:
            _check_served(manifest, client.model().fingerprint, target)
            return client.adapters.upload(adapter, name=target.name, promote=target.promote, progress=progress)
    except AdapterFormatError as error:
        raise PublishRefused(f"{adapter}: {error}") from error
    except Unavailable as error:
        raise PublishRefused(
            f"{target.server}: no server answers there ({error}); start it or correct --server"
        ) from error
    except LoramuxError as error:
        raise PublishRefused(f"{target.server}: {error}") from error


def _check_served(manifest: AdapterManifest, served: BaseFingerprint, target: Target) -> None:
    """Compare with what the server serves.

    Raises:
        AdapterFormatError: Another base.
        PublishRefused: Another chat template, which the base's digest leaves out.
    """
    trained = manifest.base_parts
    parts = {
        "config": served.config_digest,
        "weights": served.weights_digest,
        "tokenizer": served.tokenizer_digest,
        "chat_template": served.chat_template_digest,
    }
    if trained.keys() > parts.keys() and all(trained[name] == value for name, value in parts.items()):
        parts["quantization"] = ""  # the server tells it in words; with all else equal it is what differs
    else:
        parts["quantization"] = trained.get("quantization", "")
    manifest.check_base(served.digest, parts)
    if trained.get("chat_template") != served.chat_template_digest and not target.allow_other_template:
        raise PublishRefused(
            f"{target.server} renders chats by another template than the one trained with, so the model would see "
            "other prompts than in training; serve the template of the base, train again, or pass "
            "--allow-other-template"
        )
