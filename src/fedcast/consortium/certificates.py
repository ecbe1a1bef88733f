"""Certificates of a consortium's own authority, and the keys by which its sites prove who they are.

Elliptic curve P-384 throughout: Flower takes node keys on a NIST curve only. Nothing here reads the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedcast.errors import CertificateError, ConsortiumError, MissingExtraError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

# A site whose clock is a little slow still finds a certificate that was made a moment ago valid.
_CLOCK_SLACK: Final = timedelta(hours=1)
_HOST: Final = re.compile(r"(?=.{1,253}\Z)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")
_OWN_AUTHORITY: Final = "use the ca/ folder that `fedcast consortium init` made with this kit"
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
"""Names that every server certificate carries beside the given host, since the coordinator's own programs connect over loopback."""


@dataclass(frozen=True)
class Certificate:
    """What a certificate file says.

    Attributes
    ----------
    names
        Host names and addresses that it holds for.
    begins, ends
        From when to when it is valid, UTC.
    fingerprint
        SHA-256 of its DER bytes, as 64 hexadecimal digits.
    """

    names: tuple[str, ...]
    begins: datetime
    ends: datetime
    fingerprint: str


def check_host(host: str) -> str:
    """Return a host name or an IP address that is well formed.

    Raises
    ------
    ConsortiumError
        When it is neither.
    """
    if _address(host) is None and not _HOST.fullmatch(host):
        raise ConsortiumError(f"{host!r} is no host name and no IP address", hint="use a name such as coordinator.example.org")
    return host


def new_authority(name: str, days: int, *, now: datetime | None = None) -> tuple[bytes, bytes]:
    """Make the authority of a consortium.

    Parameters
    ----------
    name
        The consortium's name.
    days
        How long the authority is valid.
    now
        When it begins; by default now.

    Returns
    -------
    tuple of bytes
        Certificate and private key, both PEM. Whoever has the key can pass for the coordinator.
    """
    _need_cryptography()
    from cryptography import x509

    key, subject = _new_key(), _named(f"{name} authority")
    begins = now or datetime.now(UTC)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_usage("key_cert_sign", "crl_sign"), True),
    ]
    dates = (begins - _CLOCK_SLACK, begins + timedelta(days=days))
    return _signed(subject, subject, key, key, dates, extensions), _private_pem(key)


def issue_server(authority: bytes, authority_key: bytes, host: str, days: int, *, now: datetime | None = None) -> tuple[bytes, bytes]:
    """Issue the coordinator's certificate, for its host and for loopback.

    Parameters
    ----------
    authority, authority_key
        The authority's certificate and private key, PEM.
    host
        Host name or IP address under which sites reach the coordinator.
    days
        How long it is valid; never longer than the authority itself.
    now
        When it begins; by default now.

    Returns
    -------
    tuple of bytes
        Certificate and private key, both PEM.

    Raises
    ------
    CertificateError
        When the key is not the authority's.
    """
    _need_cryptography()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        parent, signer = x509.load_pem_x509_certificate(authority), load_pem_private_key(authority_key, None)
    except (ValueError, TypeError) as error:
        raise ConsortiumError("the authority's certificate or private key cannot be read", hint=_OWN_AUTHORITY) from error
    if not isinstance(signer, EllipticCurvePrivateKey) or signer.public_key() != parent.public_key():
        raise CertificateError("the authority's private key does not belong to its certificate", hint=_OWN_AUTHORITY)
    key = _new_key()
    names = dict.fromkeys((check_host(host), *LOOPBACK))
    alternative = [x509.DNSName(each) if _address(each) is None else x509.IPAddress(ip_address(each)) for each in names]
    begins = now or datetime.now(UTC)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.SubjectAlternativeName(alternative), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ]
    dates = (begins - _CLOCK_SLACK, min(begins + timedelta(days=days), parent.not_valid_after_utc))
    return _signed(_named(host), parent.subject, key, signer, dates, extensions), _private_pem(key)


def new_node_key() -> tuple[bytes, str]:
    """Make the key pair of a site.

    Returns
    -------
    tuple
        The private key in OpenSSH's format, as ``ssh-keygen`` writes it, and the public key as one line ``ecdsa-sha2-nistp384 ...``.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization as form

    key = _new_key()
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    return private, key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode("ascii")


def check_public_key(line: str, whose: str) -> str:
    """Return a site's public key without its comment.

    Raises
    ------
    ConsortiumError
        When the line is not a public key in OpenSSH's format on the curve P-384.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(line.strip().encode("utf-8"))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        hint = "make one with: ssh-keygen -t ecdsa -b 384 -N '' -f node.key (its public half is node.key.pub)"
        raise ConsortiumError(f"{whose} is no public ECDSA key on the curve P-384 in OpenSSH's format", hint=hint)
    return " ".join(line.split()[:2])


def public_key_of(private: bytes, whose: str) -> str:
    """Return the public line of a site's private key.

    Raises
    ------
    ConsortiumError
        When the bytes are no private ECDSA key in OpenSSH's format without a passphrase.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as form

    try:
        line = form.load_ssh_private_key(private, None).public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        hint = "make one with: ssh-keygen -t ecdsa -b 384 -N '' -f node.key"
        raise ConsortiumError(f"{whose} is no private key in OpenSSH's format without a passphrase", hint=hint) from error
    return check_public_key(line.decode("ascii"), whose)


def read_certificate(path: Path) -> Certificate:
    """Read a certificate file.

    Raises
    ------
    ConsortiumError
        When it cannot be read as a PEM certificate.
    """
    return describe(_load(path))


def describe_der(der: bytes) -> Certificate:
    """Return what a certificate in DER says.

    Raises
    ------
    ValueError
        When the bytes are no certificate.
    """
    _need_cryptography()
    from cryptography import x509

    return describe(x509.load_der_x509_certificate(der))


def describe(certificate: x509.Certificate) -> Certificate:
    """Return what a certificate says."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    names: tuple[str, ...] = ()
    try:
        listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = (*listed.get_values_for_type(x509.DNSName), *(str(each) for each in listed.get_values_for_type(x509.IPAddress)))
    except x509.ExtensionNotFound:
        pass  # an authority holds for no host
    return Certificate(names, certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.fingerprint(SHA256()).hex())


def check_server(authority: Path, certificate: Path, key: Path, host: str, *, now: datetime | None = None) -> Certificate:
    """Check that a coordinator's certificate will be accepted by its sites.

    Parameters
    ----------
    authority, certificate, key
        The authority's certificate, the server's certificate and the server's private key, PEM files.
    host
        The name that sites use.
    now
        The moment it is checked for; by default now.

    Raises
    ------
    CertificateError
        When the certificate was signed by another authority, is expired or not yet valid, holds for another host, or the key is another's.
    ConsortiumError
        When a file cannot be read.
    """
    _need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    loaded, parent = _load(certificate), _load(authority)
    renew = "renew it with: fedcast consortium renew --kit DIR --authority CA"
    found = describe(loaded)
    try:
        loaded.verify_directly_issued_by(parent)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise CertificateError(f"{certificate} was not signed by {authority}", hint=renew) from error
    for each, facts in ((certificate, found), (authority, describe(parent))):
        check_dates(facts, str(each), hint=renew, now=now)
    try:
        own = load_pem_private_key(key.read_bytes(), None).public_key() == loaded.public_key()
    except (OSError, ValueError, TypeError) as error:
        raise ConsortiumError(f"{key} is no private key that can be read", hint=renew) from error
    if not own:
        raise CertificateError(f"{key} is not the private key of {certificate}", hint=renew)
    if not any(_same_host(host, name) for name in found.names):
        raise CertificateError(f"{certificate} holds for {', '.join(found.names)}, not for {host}", hint=renew)
    return found


def check_dates(facts: Certificate, whose: str, *, hint: str, now: datetime | None = None) -> None:
    """Refuse a certificate that is expired or not yet valid.

    Raises
    ------
    CertificateError
        When it is.
    """
    moment = now or datetime.now(UTC)
    if moment > facts.ends:
        raise CertificateError(f"{whose} expired on {facts.ends:%Y-%m-%d %H:%M} UTC", hint=hint)
    if moment < facts.begins:
        raise CertificateError(f"{whose} is not valid before {facts.begins:%Y-%m-%d %H:%M} UTC", hint="check this machine's clock")


def _load(path: Path) -> x509.Certificate:
    _need_cryptography()
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConsortiumError(f"{path} is no certificate that can be read", hint="put back the file that came with the kit") from error


def _need_cryptography() -> None:
    if find_spec("cryptography") is None:
        raise MissingExtraError.of("cryptography", "flower")


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _private_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def _named(name: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name[:64])])  # 64 characters are the standard's limit


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: EllipticCurvePrivateKey,
    signer: EllipticCurvePrivateKey,
    dates: tuple[datetime, datetime],
    extensions: list[tuple[x509.ExtensionType, bool]],
) -> bytes:
    """Return a certificate for ``key``, signed by ``signer``, PEM; each extension comes with whether it is critical."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.hazmat.primitives.serialization import Encoding

    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), *dates)
    identifiers: list[x509.ExtensionType] = [
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
    ]
    for extension, critical in (*extensions, *((each, False) for each in identifiers)):
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, SHA384()).public_bytes(Encoding.PEM)


def _usage(*uses: str) -> x509.KeyUsage:
    from cryptography import x509

    known = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
    )
    return x509.KeyUsage(**{use: use in uses for use in known}, encipher_only=False, decipher_only=False)


def _same_host(host: str, name: str) -> bool:
    return host.lower() == name.lower() if _address(host) is None else _address(host) == _address(name)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
