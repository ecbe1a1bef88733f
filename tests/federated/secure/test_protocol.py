"""The protocol with many sites in one process: exact sums, dropouts at every step, and everything a site must refuse."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chisquare

from fedcast.errors import QuorumError, SecureSumError
from fedcast.federated.secure.masks import KeyPair, Words, add_mask
from fedcast.federated.secure.protocol import SEALED_BYTES, PublicKeys, Revealed, Rule, ServerRound, SiteRound, _pair_key

RULE = Rule(share=2 / 3, least=3)


def names(count: int) -> list[str]:
    return [f"site-{index:02d}" for index in range(count)]


@dataclass
class Federation:
    """Sites and a server, step by step."""

    sites: dict[str, SiteRound]
    server: ServerRound

    @classmethod
    def of(cls, count: int, size: int = 40, run: str = "run", round_: int = 1, dtype: str = "<u4") -> Federation:
        """Return sites that have drawn their keys."""
        sites = {name: SiteRound(name, run, round_, RULE) for name in names(count)}
        return cls(sites, ServerRound(run, round_, RULE.threshold(count), np.zeros(size, dtype=dtype)))

    def advertise(self, without: Collection[str] = ()) -> None:
        """Bring the public keys to the server."""
        self.server.advertise({name: site.public() for name, site in self.sites.items() if name not in without})

    def sealed(self, without: Collection[str] = ()) -> dict[str, dict[str, bytes]]:
        """Return what the sites seal for each other."""
        who = [name for name in self.server.keys if name not in without]
        return {name: self.sites[name].share(self.server.keys, self.server.threshold) for name in who}

    def mask(self, values: Mapping[str, Words]) -> dict[str, Words]:
        """Return the vectors of some sites, masked."""
        masked = {name: value.copy() for name, value in values.items()}
        for name, value in masked.items():
            self.sites[name].mask(value)
        return masked

    def share(self, without: Collection[str] = ()) -> None:
        """Seal, relay and open shares."""
        for name, boxes in self.server.relay(self.sealed(without)).items():
            self.sites[name].receive(boxes)

    def reveal(self, without: Collection[str] = ()) -> dict[str, Revealed]:
        """Return what the sites reveal of the vectors that arrived."""
        arrived, missing = list(self.server.arrived), self.server.missing
        return {name: self.sites[name].reveal(arrived, missing) for name in arrived if name not in without}


def ready(count: int = 5) -> Federation:
    """Return a federation whose sites are about to mask."""
    federation = Federation.of(count)
    federation.advertise()
    federation.share()
    return federation


def vectors(count: int, size: int = 40, dtype: str = "<u4") -> dict[str, Words]:
    rng = np.random.default_rng(1)
    width = np.dtype(dtype).itemsize
    return {name: np.frombuffer(rng.bytes(size * width), dtype=dtype) for name in names(count)}


def run_round(count: int, dtype: str, gone: Sequence[Collection[str]]) -> tuple[Words, Words]:
    """Return the opened sum and the plain one, where sites go away before their keys, shares, vectors and reveals."""
    federation, values = Federation.of(count, dtype=dtype), vectors(count, dtype=dtype)
    federation.advertise(gone[0])
    federation.share(gone[1])
    staying = {name: value for name, value in values.items() if name in federation.server.sharing and name not in gone[2]}
    for name, masked in federation.mask(staying).items():
        federation.server.add(name, masked)
    federation.server.close()
    federation.server.unmask(federation.reveal(gone[3]))
    return federation.server.total, np.sum(list(staying.values()), axis=0, dtype=dtype)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("lost", range(4))
def test_when_sites_go_away_at_any_step_up_to_the_threshold_then_the_sum_of_the_others_is_exact(dtype: str, stage: int, lost: int) -> None:
    everyone = names(9)  # six of nine must stay
    gone = [everyone[1 : 1 + lost] if stage == step else [] for step in range(4)]
    opened, plain = run_round(9, dtype, gone)
    np.testing.assert_array_equal(opened, plain)


def test_when_a_site_goes_away_at_each_step_then_the_sum_of_the_others_is_exact() -> None:
    opened, plain = run_round(9, "<u4", [["site-08"], ["site-00"], ["site-04"], []])
    np.testing.assert_array_equal(opened, plain)


@pytest.mark.parametrize("stage", range(4))
def test_when_one_site_too_many_goes_away_then_the_round_ends_with_a_named_error(stage: int) -> None:
    gone = [names(9)[:4] if stage == step else [] for step in range(4)]
    with pytest.raises(QuorumError, match=r"5 sites .* a secure sum needs 6"):
        run_round(9, "<u4", gone)


def test_when_three_sites_sum_then_none_may_go_away_since_two_would_know_each_other() -> None:
    assert [RULE.threshold(count) for count in (3, 4, 5, 6, 20, 30)] == [3, 3, 4, 4, 14, 20]
    assert Rule(share=0.1, least=1).threshold(20) == 11
    with pytest.raises(QuorumError):
        run_round(3, "<u4", [[], [], ["site-00"], []])


def test_when_a_vector_is_masked_then_its_bytes_look_uniform_and_differ_from_round_to_round() -> None:
    federations = [Federation.of(5, size=2**16, round_=round_) for round_ in (1, 2)]
    seen = []
    for federation in federations:
        federation.advertise()
        federation.share()
        zero = {name: np.zeros(2**16, dtype="<u4") for name in names(5)}
        masked = federation.mask(zero)
        for name in names(5):
            counts = np.bincount(masked[name].view(np.uint8), minlength=256)
            # True masks fail this once in a million.
            assert chisquare(counts).pvalue > 1e-7
            seen.append(masked[name])
    for one, other in combinations(seen, 2):
        assert np.mean(one == other) < 1e-3
        assert chisquare(np.bincount((one - other).view(np.uint8), minlength=256)).pvalue > 1e-7


def test_when_only_pairwise_masks_are_opened_then_a_late_vector_is_still_masked() -> None:
    federation, values = ready(), vectors(5)
    late, others = "site-02", [name for name in names(5) if name != "site-02"]
    masked = federation.mask(values)
    for name in others:
        federation.server.add(name, masked[name])
    federation.server.close()
    federation.server.unmask(federation.reveal())
    plain = np.sum([values[name] for name in others], axis=0, dtype="<u4")
    np.testing.assert_array_equal(federation.server.total, plain)
    with pytest.raises(SecureSumError, match="does not belong"):
        federation.server.add(late, masked[late])
    # The server now knows every pairwise mask of the late site; what is left is the mask of its seed.
    site = federation.sites[late]
    rest = masked[late].copy()
    for name in others:
        key = _pair_key(KeyPair(site._mask.secret), site._digest, federation.server.keys, late, name)
        add_mask(rest, key, subtract=not name < late)
    assert np.mean(rest == values[late]) < 0.1


@pytest.mark.parametrize("place", [0, 12, 40, SEALED_BYTES - 1])
def test_when_a_sealed_share_is_altered_then_it_is_refused(place: int) -> None:
    federation = Federation.of(4)
    federation.advertise()
    boxes = federation.server.relay(federation.sealed())["site-01"]
    box = bytearray(boxes["site-03"])
    box[place] ^= 1
    with pytest.raises(SecureSumError, match="site-01, round 1: the shares of site site-03 do not open") as caught:
        federation.sites["site-01"].receive({**boxes, "site-03": bytes(box)})
    assert "InvalidTag" not in str(caught.value)


@pytest.mark.parametrize("box", [b"", b"short", bytes(SEALED_BYTES)])
def test_when_a_sealed_share_is_no_share_then_it_is_refused(box: bytes) -> None:
    federation = Federation.of(4)
    federation.advertise()
    boxes = federation.server.relay(federation.sealed())["site-01"]
    with pytest.raises(SecureSumError, match="do not open"):
        federation.sites["site-01"].receive({**boxes, "site-00": box})


def test_when_a_share_is_for_another_site_or_from_another_then_it_is_refused() -> None:
    federation = Federation.of(4)
    federation.advertise()
    relayed = federation.server.relay(federation.sealed())
    swapped = {**relayed["site-01"], "site-03": relayed["site-02"]["site-03"]}
    with pytest.raises(SecureSumError, match="site-03 do not open"):
        federation.sites["site-01"].receive(swapped)
    swapped = {**relayed["site-02"], "site-00": relayed["site-02"]["site-03"], "site-03": relayed["site-02"]["site-00"]}
    with pytest.raises(SecureSumError, match="do not open"):
        federation.sites["site-02"].receive(swapped)


def test_when_shares_of_another_round_or_run_are_replayed_even_under_the_same_keys_then_they_are_refused() -> None:
    first = Federation.of(4)
    first.advertise()
    boxes = first.server.relay(first.sealed())["site-01"]
    for run, round_ in (("run", 2), ("other", 1)):
        later = Federation.of(4, run=run, round_=round_)
        for name, site in later.sites.items():
            site._seal, site._mask = first.sites[name]._seal, first.sites[name]._mask
        later.advertise()
        later.sealed()
        with pytest.raises(SecureSumError, match=f"round {round_}: the shares of site site-00 do not open"):
            later.sites["site-01"].receive(boxes)


def test_when_the_server_shows_sites_different_lists_of_keys_then_their_shares_do_not_open() -> None:
    federation = Federation.of(5)
    federation.advertise()
    keys = dict(federation.server.keys)
    fewer = {name: key for name, key in keys.items() if name != "site-04"}
    boxes = {name: federation.sites[name].share(fewer if name == "site-00" else keys, 4) for name in names(5)}
    with pytest.raises(SecureSumError, match="site-00 do not open"):
        federation.sites["site-01"].receive({name: boxes[name]["site-01"] for name in ("site-00", "site-02", "site-03", "site-04")})


def test_when_a_list_of_keys_is_wrong_then_no_share_is_made() -> None:
    federation = Federation.of(4)
    federation.advertise()
    site, keys = federation.sites["site-00"], dict(federation.server.keys)
    own = keys["site-00"]
    for wrong in (
        {name: key for name, key in keys.items() if name != "site-00"},
        {**keys, "site-00": keys["site-01"]},
        {**keys, "site-04": own},
        {**keys, "site-04": PublicKeys(own.mask, bytes(32))},
    ):
        with pytest.raises(SecureSumError, match="list of public keys is not right"):
            site.share(wrong, 3)
    for threshold in (2, 5):
        with pytest.raises(SecureSumError, match="threshold of"):
            site.share(keys, threshold)
    assert site.share(keys, 3) == site.share(keys, 3)
    with pytest.raises(SecureSumError, match="asked for twice"):
        site.share(keys, 4)


def test_when_both_kinds_of_shares_of_a_site_are_asked_for_then_they_are_refused() -> None:
    federation = ready()
    federation.mask(vectors(5))
    site, everyone = federation.sites["site-00"], names(5)
    with pytest.raises(SecureSumError, match="each once"):
        site.reveal(everyone, ["site-03"])
    assert set(site.reveal(everyone[:4], everyone[4:]).masks) == {"site-04"}
    # At once, or one after the other: the seed of a site whose mask key it revealed stays closed.
    with pytest.raises(SecureSumError, match="another sum of this round was opened"):
        site.reveal(everyone, [])
    assert site.reveal(everyone[:4], everyone[4:]) == site.reveal(set(everyone[:4]), {"site-04"})


def test_when_a_server_asks_two_groups_for_different_shares_then_it_has_too_few_of_both() -> None:
    federation, everyone = ready(9), names(9)
    federation.mask(vectors(9))
    target = "site-08"
    least = federation.server.threshold
    for seeds in range(9):
        seed_shares = mask_shares = 0
        for index, name in enumerate(everyone):
            site = federation.sites[name]
            site._opened = None
            asked = (everyone, []) if index < seeds or name == target else (everyone[:8], [target])
            revealed = site.reveal(*asked)
            seed_shares, mask_shares = seed_shares + (target in revealed.seeds), mask_shares + (target in revealed.masks)
        assert not (seed_shares >= least and mask_shares >= least)


def test_when_a_sum_would_be_over_too_few_or_unknown_sites_then_it_is_not_opened() -> None:
    federation, everyone = ready(), names(5)
    federation.mask(vectors(5))
    site = federation.sites["site-00"]
    with pytest.raises(SecureSumError, match="a sum over 1 sites is not opened, at least 4"):
        site.reveal(["site-00"], everyone[1:])
    for arrived, missing in ((everyone[1:], ["site-00"]), (everyone[:4], []), (everyone, ["site-77"])):
        with pytest.raises(SecureSumError, match="each once"):
            site.reveal(arrived, missing)


def test_when_a_site_was_started_anew_then_it_opens_and_masks_nothing() -> None:
    anew = SiteRound("site-00", "run", 1, RULE)
    for call in (lambda: anew.mask(np.zeros(3, dtype="<u4")), lambda: anew.receive({}), lambda: anew.reveal(names(3), [])):
        with pytest.raises(SecureSumError, match="started anew"):
            call()


def test_when_a_site_masks_twice_then_only_the_same_update() -> None:
    federation, values = ready(), vectors(5)
    once, again = federation.mask(values)["site-00"], federation.mask(values)["site-00"]
    np.testing.assert_array_equal(once, again)
    with pytest.raises(SecureSumError, match="masked another update"):
        federation.sites["site-00"].mask(np.zeros(40, dtype="<u4"))


def test_when_shares_are_too_few_or_others_come_later_then_the_site_masks_nothing() -> None:
    federation = Federation.of(5)
    federation.advertise()
    boxes = federation.server.relay(federation.sealed())["site-00"]
    site = federation.sites["site-00"]
    with pytest.raises(SecureSumError, match="no shares"):
        site.mask(np.zeros(3, dtype="<u4"))
    with pytest.raises(SecureSumError, match="shares came of 2 other sites, and 3 are needed"):
        site.receive(dict(list(boxes.items())[:2]))
    site.receive(boxes)
    site.receive(dict(boxes))
    with pytest.raises(SecureSumError, match="twice"):
        site.receive(dict(list(boxes.items())[:3]))


def test_when_a_site_reveals_a_wrong_share_of_a_mask_key_then_the_sum_is_not_opened() -> None:
    federation, values = ready(), vectors(5)
    for name, masked in federation.mask(values).items():
        if name != "site-02":
            federation.server.add(name, masked)
    federation.server.close()
    revealed = federation.reveal()
    revealed["site-00"].masks["site-02"] = bytes(33)
    with pytest.raises(SecureSumError, match=r"mask key of site site-02|belong together"):
        federation.server.unmask(revealed)


def test_when_a_vector_comes_twice_or_of_a_stranger_then_it_is_not_added() -> None:
    federation, values = ready(), vectors(5)
    masked = federation.mask(values)
    federation.server.add("site-00", masked["site-00"])
    for name, value in (("site-00", masked["site-00"]), ("stranger", masked["site-01"]), ("site-01", masked["site-01"][:3])):
        with pytest.raises(SecureSumError, match="does not belong"):
            federation.server.add(name, value)
    np.testing.assert_array_equal(federation.server.total, masked["site-00"])
