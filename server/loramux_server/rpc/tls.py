"""Credentials of the listener, which follow their files: a new pair serves new connections without a restart."""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import grpc

from loramux_server.rpc.certificate import Certificate, CertificateError, CertificateFiles, load_certificate
from loramux_server.telemetry.metrics import CertificateStats

_log = logging.getLogger(__name__)


class TlsRotation:
    """The certificate in use, and the last that was read.

    Files are compared by content, so that a rename, a changed symlink and a file written in place are all seen. Those
    that cannot serve leave the certificate in use as it is; connections that are open keep theirs in any case.
    """

    def __init__(self, files: CertificateFiles, *, interval: float = 1.0) -> None:
        """Load the files.

        Args:
            files: Where they lie.
            interval: Seconds between two looks at them.

        Raises:
            CertificateError: They cannot serve.
        """
        self.certificate = load_certificate(files, allow_expired=True)
        self._files = files
        self._interval = interval
        self._given: Certificate | None = None
        self._reloads = 0
        self._failure: str | None = None
        self._reported: str | None = None
        _tell(self.certificate)

    def credentials(self) -> grpc.ServerCredentials:
        """Build credentials that ask for the newest certificate at each handshake."""
        self._given = self.certificate
        # Their types do not know that None is an answer: nothing new.
        fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], self._fetch)
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self.certificate), fetch, require_client_authentication=self._files.client_ca is not None
        )

    def stats(self) -> CertificateStats:
        """What metrics tell of it."""
        return CertificateStats(
            expires=self.certificate.not_after, stale=self._reported is not None, reloads=self._reloads
        )

    async def run(self) -> None:
        """Follow the files until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()

    async def refresh(self) -> None:
        """Look at the files once.

        A failure is reported when two looks in a row find it: between them, whoever replaces two files has done both.
        """
        try:
            found = await asyncio.to_thread(self._look)
        except CertificateError as error:
            message = str(error)
            if message == self._failure and message != self._reported:
                self._reported = message
                _log.error("%s; the last good certificate stays in use (%s)", message, self.certificate.shown())
            self._failure = message
            return
        if self._reported is not None:
            _log.info("the files of the certificate can be used again")
        self._failure = self._reported = None
        if found is not self.certificate:
            self.certificate = found
            self._reloads += 1
            _tell(found)

    def _look(self) -> Certificate:
        current = self.certificate
        if self._files.read() == current.contents:
            return current
        # At the start, an expired certificate is what there is; later there is the one in use.
        return load_certificate(self._files, allow_expired=False)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Give gRPC a certificate that it has not got yet; it calls from threads of its own, one at a time."""
        current = self.certificate
        if current is self._given:
            return None
        self._given = current
        return _configuration(current)


def _configuration(certificate: Certificate) -> grpc.ServerCertificateConfiguration:
    chain, key, client_ca = certificate.contents
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=client_ca)


def _tell(certificate: Certificate) -> None:
    _log.info("TLS with a certificate of %s", certificate.shown())
    for warning in certificate.warnings:
        _log.warning("%s", warning)
