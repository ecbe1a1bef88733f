"""The sum of the vectors of many sites, of which the server sees no part (Bonawitz et al., CCS 2017, figure 4, semi-honest server).

Four steps a round; everything passes through the server.

1. **keys**: every site draws two key pairs and sends the public ones.
2. **shares**: every site draws a seed, splits the seed and its private mask key into shares, one of each for every site, and seals them
   so that only that site can open them.
3. **mask**: every site opens the shares it was sent and adds to its vector a mask of its seed, and for every other site whose shares
   came a mask that the other takes off.
4. **reveal**: the server says whose vectors arrived. Every site then reveals its shares of their seeds, and of the mask keys of the
   others, never both of one site. ``threshold`` of the shares give the secrets, with which the server takes off what is left of the masks.

All keys of a round are bound to a digest of the run, the round, the threshold and all public keys: a server that shows two sites
different lists, or brings a share from another round or for another site, brings what does not open.

This protects against a server that keeps to the protocol and wants to know more. One that invents sites, or puts keys of its own in the
place of theirs, is not held off: nothing here says whose a key is.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from fedcast.errors import QuorumError, SecureSumError
from fedcast.federated.secure.masks import KEY_BYTES, KeyPair, Words, add_mask, derive
from fedcast.federated.secure.shares import SECRET_BYTES, SHARE_BYTES, join, split

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

_NONCE_BYTES, _TAG_BYTES = 12, 16
SEALED_BYTES = _NONCE_BYTES + 2 * SHARE_BYTES + _TAG_BYTES
"""Bytes of the sealed shares that one site has for another."""
_SEAL, _PAIR, _SELF = "seal", "pair", "self"


@dataclass(frozen=True)
class PublicKeys:
    """What a site tells the others: the key that shares for it are sealed with, and the one of its masks, 32 bytes each."""

    seal: bytes
    mask: bytes


@dataclass(frozen=True)
class Rule:
    """How many sites a sum takes.

    Attributes
    ----------
    share
        Share of the sites that must stay to the end, above a half: a server that asks two groups of sites for different shares of one
        site then has too few of both.
    least
        Fewest sites in a sum.
    """

    share: float
    least: int

    def threshold(self, sites: int) -> int:
        """Return how many of so many sites must stay to the end."""
        return max(ceil(round(self.share * sites, 9)), sites // 2 + 1, self.least)


@dataclass(frozen=True)
class Setting:
    """What all sites of a round must agree on.

    Attributes
    ----------
    run, round
        The run's fingerprint and the round.
    threshold
        How many sites must stay to the end.
    keys
        The public keys of the sites that take part, by name.
    """

    run: str
    round: int
    threshold: int
    keys: Mapping[str, PublicKeys]

    @property
    def sites(self) -> list[str]:
        """The sites that take part, sorted; the shares of the first are the values at 1."""
        return sorted(self.keys)

    def digest(self) -> bytes:
        """Return what all keys of the round are bound to, 32 bytes."""
        keys = [[name, self.keys[name].seal.hex(), self.keys[name].mask.hex()] for name in self.sites]
        return hashlib.sha256(json.dumps([self.run, self.round, self.threshold, keys]).encode()).digest()


@dataclass
class Revealed:
    """Shares that a site reveals: of the seeds of sites whose vectors arrived, and of the mask keys of the others."""

    seeds: dict[str, bytes] = field(default_factory=dict)
    masks: dict[str, bytes] = field(default_factory=dict)


class SiteRound:
    """A site's side of one round; its secrets are in memory only.

    Parameters
    ----------
    site
        The site's own name.
    run, round
        The run's fingerprint and the round.
    rule
        How many sites the site wants a sum to be over.
    """

    def __init__(self, site: str, run: str, round: int, rule: Rule) -> None:
        self.site, self.run, self.round = site, run, round
        self._rule = rule
        self._seal, self._mask = KeyPair(), KeyPair()
        self._seed = secrets.token_bytes(SECRET_BYTES)
        self._setting: Setting | None = None
        self._digest = b""
        self._sealed: dict[str, bytes] = {}
        self._received: dict[str, bytes] = {}
        self._held: dict[str, bytes] = {}
        self._masked: bytes | None = None
        self._opened: tuple[frozenset[str], frozenset[str]] | None = None

    def public(self) -> PublicKeys:
        """Return the public keys."""
        return PublicKeys(self._seal.public, self._mask.public)

    def share(self, keys: Mapping[str, PublicKeys], threshold: int) -> dict[str, bytes]:
        """Return the sealed shares for each of the other sites.

        Parameters
        ----------
        keys
            The public keys of all sites that take part.
        threshold
            How many shares give a secret.

        Raises
        ------
        SecureSumError
            When another list was given before, it lacks the site's own keys or has a key twice, or the threshold is too low.
        """
        asked = Setting(self.run, self.round, threshold, dict(keys))
        if self._setting is not None:
            if asked != self._setting:
                raise self._refusal("shares were asked for twice")
            return dict(self._sealed)  # a message that came twice
        every = [key for pair in keys.values() for key in (pair.seal, pair.mask)]
        if keys.get(self.site) != self.public() or len(set(every)) < len(every):
            raise self._refusal("the list of public keys is not right")
        if not self._rule.threshold(len(keys)) <= threshold <= len(keys):
            raise self._refusal(f"a threshold of {threshold} of {len(keys)} sites is not what the spec says")
        self._setting, self._digest = asked, asked.digest()
        seeds, masks = (split(secret, len(keys), threshold) for secret in (self._seed, self._mask.secret))
        for name, seed, mask in zip(asked.sites, seeds, masks, strict=True):
            if name == self.site:
                self._held[name] = seed + mask
            else:
                nonce = secrets.token_bytes(_NONCE_BYTES)
                box = self._cipher(name, self.site, name).encrypt(nonce, seed + mask, self._bound(self.site, name))
                self._sealed[name] = nonce + box
        return dict(self._sealed)

    def receive(self, sealed: Mapping[str, bytes]) -> None:
        """Open the shares of the other sites that take part from here on.

        Raises
        ------
        SecureSumError
            When they are too few, others came before, or one does not open: it was altered, or is of another round or site.
        """
        from cryptography.exceptions import InvalidTag

        setting = self._agreed()
        if self._received:
            if dict(sealed) != self._received:
                raise self._refusal("shares came twice")
            return
        if not sealed.keys() <= setting.keys.keys() - {self.site} or len(sealed) + 1 < setting.threshold:
            raise self._refusal(f"shares came of {len(sealed)} other sites, and {setting.threshold - 1} are needed")
        opened = {}
        for name, payload in sealed.items():
            nonce, text = payload[:_NONCE_BYTES], payload[_NONCE_BYTES:]
            try:
                opened[name] = self._cipher(name, name, self.site).decrypt(nonce, text, self._bound(name, self.site))
            except (InvalidTag, ValueError) as error:
                raise self._refusal(f"the shares of site {name} do not open: they were altered, or are of another round") from error
        self._held |= opened
        self._received = dict(sealed)

    def mask(self, values: Words) -> None:
        """Add the site's masks to its integers ``[n]``, in place.

        Raises
        ------
        SecureSumError
            When it masked other integers in this round before: their difference would be open.
        """
        setting = self._agreed()
        if len(self._held) < setting.threshold:
            raise self._refusal("it was sent no shares of the other sites")
        digest = hashlib.sha256(values.view(np.uint8).data).digest()
        if self._masked not in (None, digest):
            raise self._refusal("it masked another update in this round before")
        self._masked = digest
        add_mask(values, derive(self._seed, self._digest, _SELF, self.site))
        for name in sorted(self._held.keys() - {self.site}):
            key = _pair_key(self._mask, self._digest, setting.keys, self.site, name)
            add_mask(values, key, subtract=name < self.site)

    def reveal(self, arrived: Collection[str], missing: Collection[str]) -> Revealed:
        """Return the shares that take the masks off a sum.

        Parameters
        ----------
        arrived
            The sites whose masked vectors are in the sum; their seeds are to be taken off.
        missing
            The sites that shared but whose vectors are not in it; what the others masked for them is to be taken off.

        Raises
        ------
        SecureSumError
            When too few arrived, a site is named twice or is not one that shared, or another sum of this round was opened before.
        """
        setting = self._agreed()
        sums = frozenset(arrived), frozenset(missing)
        if self._masked is None or self.site not in sums[0] or sums[0] & sums[1] or sums[0] | sums[1] != self._held.keys():
            raise self._refusal("the sites to be opened are not those that shared, each once")
        if len(sums[0]) < setting.threshold:
            raise self._refusal(f"a sum over {len(sums[0])} sites is not opened, at least {setting.threshold} are needed")
        if self._opened not in (None, sums):
            raise self._refusal("another sum of this round was opened before")
        self._opened = sums
        return Revealed(
            {name: self._held[name][:SHARE_BYTES] for name in sums[0]}, {name: self._held[name][SHARE_BYTES:] for name in sums[1]}
        )

    def _agreed(self) -> Setting:
        if self._setting is None:
            raise self._refusal("it has not been sent the others' keys; it may have been started anew since")
        return self._setting

    def _cipher(self, other: str, sender: str, receiver: str) -> ChaCha20Poly1305:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        secret = self._seal.agree(self._agreed().keys[other].seal)
        return ChaCha20Poly1305(derive(secret, self._digest, _SEAL, sender, receiver))

    def _bound(self, sender: str, receiver: str) -> bytes:
        return json.dumps([self.run, self.round, sender, receiver]).encode()

    def _refusal(self, reason: str) -> SecureSumError:
        return SecureSumError(
            f"site {self.site}, round {self.round}: {reason}",
            hint="it takes no part in this sum; the next round has new keys",
        )


class ServerRound:
    """The server's side of one round: it relays, sums, and takes off the masks that are left.

    Parameters
    ----------
    run, round
        The run's fingerprint and the round.
    threshold
        How many sites must stay to the end.
    total
        Where the masked vectors are summed, integers ``[n]``, zeros.
    """

    def __init__(self, run: str, round: int, threshold: int, total: Words) -> None:
        self.run, self.round, self.threshold, self.total = run, round, threshold, total
        self.sharing: list[str] = []
        self.arrived: list[str] = []
        self._setting = Setting(run, round, threshold, {})
        self._opened = False

    @property
    def keys(self) -> Mapping[str, PublicKeys]:
        """The public keys of the sites that take part."""
        return self._setting.keys

    def advertise(self, keys: Mapping[str, PublicKeys]) -> None:
        """Take the public keys of the sites that answered; :class:`~fedcast.errors.QuorumError` when they are too few."""
        self._need(keys, "sent keys")
        self._setting = Setting(self.run, self.round, self.threshold, dict(keys))

    def relay(self, sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """Return what each site is to open, from what each site sealed; :class:`~fedcast.errors.QuorumError` when too few sealed."""
        whole = {name: boxes for name, boxes in sealed.items() if boxes.keys() == self.keys.keys() - {name}}
        self._need(whole, "shared their secrets")
        self.sharing = sorted(whole)
        return {name: {other: whole[other][name] for other in self.sharing if other != name} for name in self.sharing}

    def add(self, site: str, masked: Words) -> None:
        """Add a masked vector; :class:`~fedcast.errors.SecureSumError` where the site did not share, came before or came too late."""
        if site not in self.sharing or site in self.arrived or self._opened or masked.shape != self.total.shape:
            raise SecureSumError(f"the masked update of site {site} does not belong to the sum", hint="it is left out of the round")
        self.total += masked
        self.arrived.append(site)

    @property
    def missing(self) -> list[str]:
        """The sites that shared and whose vectors have not arrived."""
        return [name for name in self.sharing if name not in self.arrived]

    def close(self) -> None:
        """Take no more vectors; :class:`~fedcast.errors.QuorumError` when they are too few to be opened."""
        self._need(self.arrived, "sent a masked update")
        self._opened = True

    def unmask(self, revealed: Mapping[str, Revealed]) -> None:
        """Take off what is left of the masks; ``total`` is then the plain sum of the sites in ``arrived``.

        Raises
        ------
        QuorumError
            When too few sites revealed.
        SecureSumError
            When shares do not give the secret that belongs to a site's public key.
        """
        arrived, missing = sorted(self.arrived), self.missing
        whole = {n: r for n, r in revealed.items() if n in arrived and set(r.seeds) == set(arrived) and set(r.masks) == set(missing)}
        self._need(whole, "revealed their shares")
        chosen = sorted(whole)[: self.threshold]
        points = {name: self._setting.sites.index(name) + 1 for name in chosen}
        digest = self._setting.digest()
        # All secrets first: a wrong share is found before the sum is touched.
        seeds = {name: join({points[n]: whole[n].seeds[name] for n in chosen}) for name in arrived}
        pairs = {name: KeyPair(join({points[n]: whole[n].masks[name] for n in chosen})) for name in missing}
        for name, pair in pairs.items():
            if pair.public != self.keys[name].mask:
                raise SecureSumError(f"the shares of the mask key of site {name} are wrong", hint="run the same command again")
        for name, seed in seeds.items():
            add_mask(self.total, derive(seed, digest, _SELF, name), subtract=True)
        for gone, pair in pairs.items():
            for name in arrived:
                # What `name` did for `gone`, the other way round.
                key = _pair_key(pair, digest, self.keys, gone, name)
                add_mask(self.total, key, subtract=name < gone)

    def _need(self, sites: Collection[str], did: str) -> None:
        if len(sites) < self.threshold:
            raise QuorumError(
                f"round {self.round}: {len(sites)} sites {did}, and a secure sum needs {self.threshold}",
                hint="mend the sites and run the same command again: it resumes from the last round",
            )


def _pair_key(own: KeyPair, digest: bytes, keys: Mapping[str, PublicKeys], site: str, other: str) -> bytes:
    """Return the key of the mask that two sites share: the one whose name comes first adds it, the other takes it off."""
    return derive(own.agree(keys[other].mask), digest, _PAIR, *sorted((site, other)))


def keys_of(payload: bytes) -> PublicKeys:
    """Read public keys from 64 bytes; :class:`~fedcast.errors.SecureSumError` when they are not as many."""
    if len(payload) != 2 * KEY_BYTES:
        raise SecureSumError("public keys are not 64 bytes", hint="check that all sites run the same version of fedcast")
    return PublicKeys(payload[:KEY_BYTES], payload[KEY_BYTES:])
