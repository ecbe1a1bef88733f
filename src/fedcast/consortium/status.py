"""How a consortium is: whether its coordinator runs, until when its certificate holds, and which sites are there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from fedcast.consortium.certificates import read_certificate
from fedcast.consortium.kits import CONNECTION, CoordinatorKit
from fedcast.consortium.network import contact
from fedcast.consortium.registry import flower
from fedcast.errors import ConsortiumError, UnreachableError

State = Literal["online", "offline", "never joined", "not registered"]
_STATES: dict[object, State] = {"online": "online", "offline": "offline", "registered": "never joined"}


@dataclass(frozen=True)
class SiteStatus:
    """How a site is.

    Attributes
    ----------
    name
        The site.
    state
        ``online``: it was heard of in the last minute; ``offline``: not any more; ``never joined``: its key is registered;
        ``not registered``: the coordinator has not been started since the site was added.
    last_seen
        When it was heard of last, UTC, to the accuracy of a heartbeat (30 seconds).
    """

    name: str
    state: State
    last_seen: datetime | None


@dataclass(frozen=True)
class Status:
    """How a consortium is.

    Attributes
    ----------
    name
        The consortium.
    superlink
        Address of the SuperLink, which answered.
    proxy
        Whether the proxy answered too, on this machine.
    certificate_ends, authority_ends
        Until when the coordinator's certificate holds, and the authority that sites know.
    sites
        Every site, in the order of names.
    """

    name: str
    superlink: str
    proxy: bool
    certificate_ends: datetime
    authority_ends: datetime
    sites: tuple[SiteStatus, ...]


def status(kit: CoordinatorKit) -> Status:
    """Ask a coordinator on this machine how it is.

    Raises
    ------
    UnreachableError
        When its SuperLink does not run.
    CertificateError
        When its certificate is expired, or another program's.
    ConsortiumError
        When the kit is damaged.
    """
    try:
        shown = contact("127.0.0.1", kit.port, kit.authority).certificate
    except UnreachableError as error:
        hint = f"start it with: fedcast coordinator start --kit {kit.folder}"
        raise UnreachableError(f"the SuperLink of {kit.name} does not run: {error.message}", hint=hint) from error
    try:
        contact("127.0.0.1", kit.proxy_port, kit.authority)
        proxy = True
    except ConsortiumError:
        proxy = False
    listed = {str(node["node-id"]): node for node in flower(kit, "supernode", "list", CONNECTION)["nodes"]}
    numbers = kit.nodes()
    sites = tuple(_site(name, listed.get(str(numbers.get(name)), {})) for name in kit.sites)
    return Status(kit.name, kit.address, proxy, shown.ends, read_certificate(kit.authority).ends, sites)


def _site(name: str, node: dict[str, object]) -> SiteStatus:
    state = _STATES.get(node.get("status"), "not registered")
    if state == "online":
        return SiteStatus(name, state, datetime.now(UTC).replace(microsecond=0))
    try:
        return SiteStatus(name, state, datetime.fromisoformat(str(node.get("offline-at"))))
    except ValueError:  # "N/A"
        return SiteStatus(name, state, None)
