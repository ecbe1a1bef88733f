"""The verbs ``consortium init``, ``add``, ``remove``, ``renew`` and ``status``: the kits of a consortium, and how it is."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import console, emit, note

Kit = Annotated[Path, typer.Option("--kit", help="The coordinator's kit", metavar="DIR")]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="How long the coordinator's certificate is valid")]
SiteName = Annotated[str, typer.Argument(help="Name of the site", metavar="SITE", show_default=False)]


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make", metavar="DIR", show_default=False)],
    host: Annotated[str, typer.Option("--host", help="Host name or address under which sites reach the coordinator", show_default=False)],
    site: Annotated[list[str], typer.Option("--site", help="Name of a site; once for each", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="Name of the consortium")] = "consortium",
    days: Days = 365,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The SuperLink's port, on loopback alone")] = 8000,
    proxy_port: Annotated[int, typer.Option("--proxy-port", min=1, max=65535, help="The port that is open to sites")] = 8443,
    json: Json = False,
) -> None:
    """Make the certificates and kits of a consortium: one for its coordinator, one for each site.

    Nothing is ever overwritten.
    """
    from fedcast.consortium.certificates import read_certificate
    from fedcast.consortium.provision import create

    made = create(folder, name=name, host=host, sites=site, port=port, proxy_port=proxy_port, days=days)
    certificate, authority = read_certificate(made.coordinator.certificate), read_certificate(made.coordinator.authority)
    if json:
        kits = {"coordinator": made.coordinator.folder, "sites": made.kits, "authority": made.authority}
        emit({"name": name, **kits, "certificate_ends": certificate.ends, "authority_sha256": authority.fingerprint})
        return
    typer.echo(f"coordinator: {made.coordinator.folder}")
    for each, kit in made.kits.items():
        typer.echo(f"site {each}: {kit}")
    typer.echo(f"authority: {made.authority} (needed only to renew the certificate, which ends on {certificate.ends:%Y-%m-%d})")
    typer.echo(f"SHA-256 of ca.crt: {authority.fingerprint}")
    note("next: move the authority to where no network leads, and send every site its kit by a way that others cannot read")
    note("then start the coordinator", hint=f"fedcast coordinator start --kit {made.coordinator.folder} --proxy")


def add(
    site: SiteName,
    kit: Kit = Path("coordinator"),
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="Public half of a key that the site made itself", metavar="FILE")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Give a site that is there a new key; the old one is refused")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the site's kit; by default sites/ beside the coordinator's", metavar="DIR"),
    ] = None,
    json: Json = False,
) -> None:
    """Add a site and make its kit; the coordinator lets it in from its next start on."""
    from fedcast.consortium.kits import CoordinatorKit
    from fedcast.consortium.provision import add_site
    from fedcast.errors import SourceError

    opened = CoordinatorKit.open(kit)
    try:
        line = None if public_key is None else public_key.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {public_key}", hint="name the .pub file that ssh-keygen wrote") from error
    _, packed = add_site(opened, site, output or opened.folder.parent / "sites", public_key=line, replaces=replace)
    if json:
        emit({"site": site, "kit": packed, "has_private_key": line is None})
        return
    typer.echo(f"site {site}: {packed}")
    note(
        "the kit lacks node.key, which the site puts into it" if line else "send the kit over a channel that others cannot read",
        hint="start the coordinator again, which registers the key",
    )


def remove(site: SiteName, kit: Kit = Path("coordinator"), json: Json = False) -> None:
    """Take a site out; its key is refused from the coordinator's next start on, for good."""
    from fedcast.consortium.kits import CoordinatorKit
    from fedcast.consortium.provision import remove_site

    left = remove_site(CoordinatorKit.open(kit), site)
    if json:
        emit({"removed": site, "sites": list(left.sites)})
        return
    typer.echo(f"{site} is out; {len(left.sites)} sites are left")
    note("the site is refused as soon as the coordinator starts again", hint=f"fedcast coordinator start --kit {kit}")


def renew(
    authority: Annotated[Path, typer.Option("--authority", help="The authority's folder (ca)", metavar="DIR", show_default=False)],
    kit: Kit = Path("coordinator"),
    days: Days = 365,
    json: Json = False,
) -> None:
    """Renew the coordinator's certificate; sites notice nothing."""
    from fedcast.consortium.certificates import read_certificate
    from fedcast.consortium.kits import CoordinatorKit
    from fedcast.consortium.provision import renew as renew_certificate

    opened = CoordinatorKit.open(kit)
    renew_certificate(opened, authority, days)
    ends = read_certificate(opened.certificate).ends
    if json:
        emit({"certificate": opened.certificate, "certificate_ends": ends})
        return
    typer.echo(f"{opened.certificate} holds until {ends:%Y-%m-%d}")
    note("the coordinator uses it from its next start on", hint=f"fedcast coordinator start --kit {kit}")


def status(kit: Kit = Path("coordinator"), json: Json = False) -> None:
    """Show whether the coordinator on this machine runs, and which sites are there.

    Exits with 46 when the SuperLink does not run.
    """
    from fedcast.consortium.kits import CoordinatorKit
    from fedcast.consortium.status import status as ask

    found = ask(CoordinatorKit.open(kit))
    if json:
        sites = [{"name": site.name, "state": site.state, "last_seen": site.last_seen} for site in found.sites]
        emit({**{key: value for key, value in vars(found).items() if key != "sites"}, "sites": sites})
        return
    from rich.table import Table

    table = Table("site", "state", "last seen", box=None, pad_edge=False, header_style="bold")
    for site in found.sites:
        table.add_row(site.name, site.state, _moment(site.last_seen))
    typer.echo(f"{found.name}: the SuperLink answers on {found.superlink}, the proxy {'answers too' if found.proxy else 'does not answer'}")
    typer.echo(f"the certificate holds until {found.certificate_ends:%Y-%m-%d}, the authority until {found.authority_ends:%Y-%m-%d}")
    console().print(table)


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"
