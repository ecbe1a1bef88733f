"""Makes the kits of a consortium, and changes them: a further site, a site less, a renewed certificate."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Final

from fedcast.consortium.certificates import (
    check_host,
    check_public_key,
    check_server,
    issue_server,
    new_authority,
    new_node_key,
    read_certificate,
)
from fedcast.consortium.kits import CoordinatorKit, SiteKit, check_name, check_names, write_private
from fedcast.errors import ConsortiumError
from fedcast.version import __version__

PORT: Final = 8000
"""The SuperLink's port, Flower's own default; on loopback alone."""
PROXY_PORT: Final = 8443
DAYS: Final = 365
# Sites carry the authority's certificate, so it outlives many of the coordinator's.
_AUTHORITY_DAYS: Final = 3650


@dataclass(frozen=True)
class Consortium:
    """What :func:`create` made.

    Attributes
    ----------
    folder
        The folder of it all.
    coordinator
        The coordinator's kit.
    kits
        Every site's packed kit (``.tar``), by name.
    authority
        Folder of the authority's private key; it belongs on no machine that is on the network.
    """

    folder: Path
    coordinator: CoordinatorKit
    kits: dict[str, Path]
    authority: Path


def create(
    folder: Path,
    *,
    name: str,
    host: str,
    sites: Sequence[str],
    port: int = PORT,
    proxy_port: int = PROXY_PORT,
    days: int = DAYS,
    now: datetime | None = None,
) -> Consortium:
    """Make certificates, keys and kits of a consortium.

    Parameters
    ----------
    folder
        Where to; it may not be there, or must be empty.
    name
        The consortium's name.
    host
        Host name or IP address under which sites reach the coordinator.
    sites
        Names of the sites.
    port, proxy_port
        The SuperLink's port on loopback, and the one that is open to sites.
    days
        How long the coordinator's certificate is valid.
    now
        When it begins; by default now.

    Raises
    ------
    ConsortiumError
        When a name, the host or a port cannot be used, or the folder is not empty.
    """
    folder = folder.absolute()
    check_name(name, "consortium")
    check_host(host)
    names = check_names(sites)
    if not names:
        raise ConsortiumError("a consortium has at least one site", hint="add --site NAME, once for each")
    if port == proxy_port:
        raise ConsortiumError(f"the SuperLink and the proxy cannot both have port {port}", hint="choose another --port or --proxy-port")
    aside = _aside(folder)
    try:
        certificate, key = _write_authority(aside / "ca", name, max(days, _AUTHORITY_DAYS), now)
        kit = CoordinatorKit(aside / "coordinator", name, host, port, proxy_port, {})
        kit.folder.mkdir(mode=0o700)
        write_private(kit.authority, certificate)
        _write_server(kit, certificate, key, days, now)
        _write_fillings(kit)
        for site in names:
            kit, _ = add_site(kit, site, aside / "sites")
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    made = CoordinatorKit.open(folder / "coordinator")
    made.write_connection()
    return Consortium(folder, made, {site: folder / "sites" / f"{site}.tar" for site in names}, folder / "ca")


def _aside(folder: Path) -> Path:
    """Return a new folder, closed to others, that becomes ``folder`` when it is complete."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConsortiumError(f"{folder} is there already", hint="choose another folder; keys are never overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConsortiumError(f"cannot make {folder}: {error.strerror}", hint="choose a folder that you may write") from error


def add_site(
    kit: CoordinatorKit, name: str, folder: Path, *, public_key: str | None = None, replaces: bool = False
) -> tuple[CoordinatorKit, Path]:
    """Add a site to a coordinator's kit and make the site's own.

    The coordinator registers the site when it is started the next time.

    Parameters
    ----------
    kit
        The coordinator's kit.
    name
        The site's name.
    folder
        Where the site's kit goes, as a folder and packed, both under the site's name.
    public_key
        The public line of a key that the site made itself; without it, a key is made here and its private half lies in the kit.
    replaces
        Whether the site is there already and gets this new key; the old one is refused from the next start on.

    Returns
    -------
    tuple
        The coordinator's kit as it is now, and the site's packed kit.

    Raises
    ------
    ConsortiumError
        When the name or the key cannot be used, is there already (for a replacement: is not), or the site's kit would overwrite another.
    """
    if (check_name(name) in kit.sites) != replaces:
        raise ConsortiumError(
            f"there is {'no' if replaces else 'already a'} site {name!r} in the consortium {kit.name}",
            hint="a site that is there gets a new key with --replace, a new one is added without",
        )
    check_names([*(site for site in kit.sites if site != name), name])
    private, line = (None, check_public_key(public_key, "what was given")) if public_key is not None else new_node_key()
    if line in kit.sites.values():
        raise ConsortiumError("that public key is another site's, or the one to be replaced", hint="every site has a key of its own")
    target, packed = folder / name, folder / f"{name}.tar"
    for each in (target, packed):
        if each.exists():
            raise ConsortiumError(f"{each} is there already", hint="move the old kit away, or choose another folder with -o")
    try:
        target.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise ConsortiumError(f"cannot make {target}: {error.strerror}", hint="choose a folder that you may write") from error
    _write_site(SiteKit(target, kit.name, name, kit.host, kit.proxy_port), kit, private, line)
    _pack(target, packed)
    changed = replace(kit, sites={**kit.sites, name: line})
    changed.write()
    return changed, packed


def remove_site(kit: CoordinatorKit, name: str) -> CoordinatorKit:
    """Take a site out of a coordinator's kit; its key is refused from the coordinator's next start on, for good.

    Raises
    ------
    ConsortiumError
        When there is no such site.
    """
    if name not in kit.sites:
        raise ConsortiumError(
            f"there is no site {name!r} in the consortium {kit.name}", hint=f"its sites: {', '.join(kit.sites) or 'none'}"
        )
    changed = replace(kit, sites={site: key for site, key in kit.sites.items() if site != name})
    changed.write()
    kit.public_key(name).unlink(missing_ok=True)
    return changed


def renew(kit: CoordinatorKit, authority: Path, days: int = DAYS, *, now: datetime | None = None) -> None:
    """Issue the coordinator's certificate anew, with a new key; sites notice nothing.

    Parameters
    ----------
    kit
        The coordinator's kit.
    authority
        Folder with the authority's ``ca.crt`` and ``ca.key``.
    days
        How long the new certificate is valid.
    now
        When it begins; by default now.

    Raises
    ------
    ConsortiumError
        When the authority cannot be read, is expired, or is not the one that the sites know.
    """
    try:
        certificate, key = (authority / "ca.crt").read_bytes(), (authority / "ca.key").read_bytes()
    except OSError as error:
        raise ConsortiumError(f"no authority at {authority}: {error.strerror}", hint="name the ca/ folder with --authority") from error
    if certificate != kit.authority.read_bytes():
        raise ConsortiumError(f"{authority} is another authority than the kit's", hint="its sites would refuse the certificate")
    _write_server(kit, certificate, key, days, now)


def _write_authority(folder: Path, name: str, days: int, now: datetime | None) -> tuple[bytes, bytes]:
    certificate, key = new_authority(name, days, now=now)
    folder.mkdir(mode=0o700)
    write_private(folder / "ca.crt", certificate)
    write_private(folder / "ca.key", key)
    return certificate, key


def _write_server(kit: CoordinatorKit, authority: bytes, authority_key: bytes, days: int, now: datetime | None) -> None:
    certificate, key = issue_server(authority, authority_key, kit.host, days, now=now)
    # The key first: a crash between the two leaves a pair that does not match, which the coordinator refuses by name when it starts.
    write_private(kit.key, key)
    write_private(kit.certificate, certificate)
    check_server(kit.authority, kit.certificate, kit.key, kit.host, now=now)


def _write_fillings(kit: CoordinatorKit) -> None:
    write_private(kit.proxy, _filled("nginx.conf", NAME=kit.name, PORT=kit.port, PROXY_PORT=kit.proxy_port))
    service = _filled("fedcast-coordinator.service", NAME=kit.name, HARDENING=_filled("hardening.txt").strip())
    write_private(kit.folder / "fedcast-coordinator.service", service)


def _write_site(site: SiteKit, kit: CoordinatorKit, private: bytes | None, public: str) -> None:
    site.write()
    write_private(site.authority, kit.authority.read_bytes())
    if private is not None:
        write_private(site.key, private)
    write_private(site.folder / "node.pub", f"{public} {site.site}\n")
    site.flower.mkdir(mode=0o700)
    service = _filled("fedcast-site.service", NAME=kit.name, SITE=site.site, HARDENING=_filled("hardening.txt").strip())
    write_private(site.folder / "fedcast-site.service", service)
    fingerprint = read_certificate(kit.authority).fingerprint
    text = _filled("README.txt", NAME=kit.name, SITE=site.site, VERSION=__version__, ADDRESS=site.address, FINGERPRINT=fingerprint)
    write_private(site.folder / "README.txt", text)


def _filled(template: str, **values: object) -> str:
    """Return a template with every ``@KEY@`` replaced."""
    text = files(__package__).joinpath("templates", template).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def _pack(folder: Path, packed: Path) -> None:
    """Pack a site's kit, without the names of who made it."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(folder, arcname=folder.name, filter=anonymous)
    write_private(packed, content.getvalue())
