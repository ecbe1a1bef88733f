"""Whether a coordinator can be reached and is to be trusted, seen from where this runs."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Final

from fedcast.consortium.certificates import Certificate, describe_der
from fedcast.consortium.kits import address_of
from fedcast.errors import CertificateError, ConsortiumError, UnreachableError

_FLEET: Final = "/v1/fleet/activate-node"
_GATEWAY: Final = (502, 503, 504)
# X.509 verification errors of OpenSSL (x509_vfy.h).
_NOT_YET, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64


@dataclass(frozen=True)
class Contact:
    """What a coordinator answered.

    Attributes
    ----------
    certificate
        Its certificate, which was verified.
    clock
        How far this machine's clock is ahead of the coordinator's, to a second; ``None`` where it did not say.
    """

    certificate: Certificate
    clock: timedelta | None


def contact(host: str, port: int, authority: Path, *, timeout: float = 5.0) -> Contact:
    """Connect to a coordinator as a site would, without proving who the site is.

    Parameters
    ----------
    host, port
        Where the coordinator, or the proxy before it, is reached.
    authority
        The authority's certificate, the only one that is trusted.
    timeout
        Seconds to wait for each step.

    Raises
    ------
    UnreachableError
        When nothing answers, or the proxy answers and the SuperLink behind it does not.
    CertificateError
        When the certificate is not to be trusted, or what answers does not speak TLS.
    ConsortiumError
        When the authority's certificate cannot be read.
    """
    where = address_of(host, port)
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        raise ConsortiumError(f"{authority} is no certificate that can be read", hint="put back the file that came with the kit") from error
    connection = HTTPSConnection(host, port, timeout=timeout, context=context)
    try:
        _connect(connection, where)
        shown = describe_der(connection.sock.getpeercert(binary_form=True) or b"")
        # Without a key the call is refused, and it is enough to see that the SuperLink is there.
        connection.request("POST", _FLEET, body=b"", headers={"Content-Type": "application/x-protobuf"})
        with connection.getresponse() as answer:
            date, status = answer.getheader("Date"), answer.status
    except (OSError, HTTPException) as error:
        raise UnreachableError(f"{where} speaks TLS but no HTTP ({type(error).__name__})", hint=_hint_reach(port)) from error
    finally:
        connection.close()
    if status in _GATEWAY:
        hint = "wait for the coordinator to start, or ask its administrator for `fedcast consortium status`"
        raise UnreachableError(f"the proxy at {where} answers, but the SuperLink behind it does not ({status})", hint=hint)
    return Contact(shown, _ahead(date))


def _connect(connection: HTTPSConnection, where: str) -> None:
    host, port = connection.host, connection.port
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        raise _mistrust(error, host, port, where) from error
    except (ssl.SSLError, ConnectionResetError, EOFError) as error:
        message = f"what answers at {where} does not speak TLS as a coordinator does"
        raise CertificateError(message, hint="check host and port; a coordinator never answers in plain text") from error
    except TimeoutError as error:
        raise UnreachableError(f"{where} does not answer in time", hint=_hint_reach(port)) from error
    except OSError as error:
        raise UnreachableError(f"{where} cannot be reached: {error.strerror or error}", hint=_hint_reach(port)) from error


def _mistrust(error: ssl.SSLCertVerificationError, host: str, port: int, where: str) -> CertificateError:
    """Return why a certificate was refused; what it says is read from a second connection that trusts nothing it hears."""
    try:
        shown = describe_der(ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, port), timeout=5.0)))
    except (OSError, ValueError):
        shown = None
    renew = "the coordinator renews it with `fedcast consortium renew`; check this machine's clock as well"
    code = error.verify_code
    if code == _EXPIRED:
        return CertificateError(f"the certificate of {where} expired{f' on {shown.ends:%Y-%m-%d}' if shown else ''}", hint=renew)
    if code == _NOT_YET:
        begins = f" before {shown.begins:%Y-%m-%d}" if shown else " yet"
        return CertificateError(f"the certificate of {where} is not valid{begins}", hint="check this machine's clock")
    if code in (_OTHER_HOST, _OTHER_ADDRESS):
        names = f"{', '.join(shown.names)}, " if shown else "other hosts, "
        return CertificateError(f"the certificate of {where} holds for {names}not for {host}", hint="use the host name of the site's kit")
    hint = "this may be another machine than the coordinator: compare the fingerprint of ca.crt with its administrator"
    return CertificateError(f"the certificate of {where} was not signed by this consortium's authority ({error.verify_message})", hint=hint)


def _ahead(date: str | None) -> timedelta | None:
    try:
        return None if date is None else datetime.now(UTC) - parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return None


def _hint_reach(port: int) -> str:
    return f"check that the coordinator runs and that a firewall lets TCP {port} out"
