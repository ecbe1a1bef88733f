"""Keys and masks against the vectors of the standards they follow, and masks that cancel."""

from __future__ import annotations

import hashlib
import hmac
import sys

import numpy as np
import pytest

from fedcast.errors import MissingExtraError, SecureSumError
from fedcast.federated.secure.masks import KeyPair, add_mask, derive, require_cryptography


def test_when_keys_are_those_of_rfc_7748_then_the_secret_is_too() -> None:
    bob = KeyPair(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.agree(alice).hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), bytes(31)])
def test_when_a_public_key_makes_every_secret_the_same_then_it_is_refused(public: bytes) -> None:
    with pytest.raises(SecureSumError, match="not usable"):
        KeyPair().agree(public)


def test_when_a_key_is_derived_then_it_is_that_of_rfc_5869_written_out() -> None:
    context, secret = bytes(range(32)), b"\x0b" * 32
    extracted = hmac.digest(context, secret, "sha256")
    info = b'["fedcast secure_sum", "pair", "a", "b"]'
    assert derive(secret, context, "pair", "a", "b") == hmac.digest(extracted, info + b"\x01", "sha256")


def test_when_purpose_round_or_names_differ_then_so_does_the_key() -> None:
    contexts = [hashlib.sha256(text).digest() for text in (b"one", b"two")]
    purposes = [("pair", "a", "b"), ("seal", "a", "b"), ("seal", "b", "a"), ("pair", "ab", ""), ("pair", 'a", "b')]
    keys = {derive(bytes(32), context, *purpose) for context in contexts for purpose in purposes}
    assert len(keys) == len(contexts) * len(purposes)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_when_the_key_is_that_of_rfc_8439_then_the_mask_is_its_keystream(dtype: str) -> None:
    # Appendix A.1, test vector 1: key, nonce and block counter are 0.
    stream = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    stream += "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    total = np.zeros(64 // np.dtype(dtype).itemsize, dtype=dtype)
    add_mask(total, bytes(32))
    assert total.tobytes().hex() == stream


@pytest.mark.parametrize("size", [0, 1, 2**18 - 1, 2**18, 3 * 2**18 + 5])
def test_when_a_mask_is_taken_off_then_the_integers_are_back(size: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**32, size=size, dtype=np.uint32)
    masked = values.copy()
    add_mask(masked, b"k" * 32)
    assert size == 0 or not np.array_equal(masked, values)
    add_mask(masked, b"k" * 32, subtract=True)
    np.testing.assert_array_equal(masked, values)


def test_when_a_mask_is_long_then_its_parts_are_one_keystream() -> None:
    whole, short = np.zeros(2**18 + 9, dtype="<u4"), np.zeros(100, dtype="<u4")
    add_mask(whole, b"k" * 32)
    add_mask(short, b"k" * 32)
    np.testing.assert_array_equal(whole[:100], short)
    assert not np.array_equal(whole[-9:], whole[:9])


def test_when_the_cipher_library_is_missing_then_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingExtraError) as caught:
        require_cryptography()
    assert "fedcast[secure]" in caught.value.hint
