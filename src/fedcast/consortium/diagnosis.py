"""Why a site cannot join: the network, the certificate, the clock, or its key, in the order in which they matter."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from fedcast.consortium.certificates import public_key_of
from fedcast.consortium.kits import SiteKit
from fedcast.consortium.network import contact
from fedcast.errors import ConsortiumError, IdentityError

# A SuperNode proves itself by a signed time stamp, which a SuperLink takes 5 seconds early and 305 seconds late.
_EARLY: Final = timedelta(seconds=5)
_LATE: Final = timedelta(seconds=305)
# What flower-supernode 1.41 writes when the SuperLink does not take its key (exit code 305, API code 2004), when it asked it to stop
# because of the signed time stamp, and when it cannot read the key itself (302).
_NOT_ACTIVATED: Final = ("[code: 2004]",)
_NOT_AUTHENTICATED: Final = ("401 Unauthorized", "Invalid SuperNode authentication")
_KEY_UNREADABLE: Final = "Exit Code: 302"


def diagnose(kit: SiteKit, output: str = "") -> ConsortiumError | None:
    """Find out why a site cannot join its consortium.

    Parameters
    ----------
    kit
        The site's kit.
    output
        What ``flower-supernode`` wrote; without it, only network, certificate, clock and key file are looked at.

    Returns
    -------
    ConsortiumError or None
        The reason, for the caller to raise: :class:`~fedcast.errors.UnreachableError`, :class:`~fedcast.errors.CertificateError`,
        :class:`~fedcast.errors.IdentityError`, or a damaged kit; ``None`` where nothing is wrong from here.
    """
    try:
        public_key_of(_key(kit), str(kit.key))
        clock = contact(kit.host, kit.port, kit.authority).clock
    except ConsortiumError as error:
        return error
    if clock is not None and not -_LATE < clock < _EARLY:
        by = f"{abs(clock.total_seconds()):.0f} seconds {'ahead of' if clock > timedelta() else 'behind'}"
        return IdentityError(f"this machine's clock is {by} the coordinator's, so its signature is refused", hint="set the clock by NTP")
    if _KEY_UNREADABLE in output:
        return ConsortiumError(f"Flower cannot read {kit.key}", hint="put back the key, or ask for a new kit")
    if any(words in output for words in (*_NOT_ACTIVATED, *_NOT_AUTHENTICATED)):
        message = f"the coordinator {kit.address} does not take the key of site {kit.site!r}"
        hint = (
            f"compare {kit.folder / 'node.pub'} with the coordinator's sites/{kit.site}.pub and have the coordinator restarted; "
            "after a crash of this site, its old connection is given up only after a minute"
        )
        return IdentityError(message, hint=hint)
    return None


def _key(kit: SiteKit) -> bytes:
    try:
        return kit.key.read_bytes()
    except OSError as error:
        raise ConsortiumError(f"{kit.key} cannot be read: {error.strerror}", hint="put back the key, or ask for a new kit") from error
