"""Masks: what two sites can both compute and nobody else, added by one and taken off by the other.

Two sites agree on a secret by X25519 (RFC 7748); HKDF with SHA-256 (RFC 5869) makes a 256-bit key of it for one purpose, one round and
one pair; the keystream of ChaCha20 (RFC 8439) under that key is the mask. A key makes one mask only, so the nonce is 0.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedcast.errors import MissingExtraError, SecureSumError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 32
Words = npt.NDArray[np.unsignedinteger[Any]]
"""Integers modulo 2^32 or 2^64: little-endian, unsigned, any sum of them wraps."""
_CHUNK = 2**20  # bytes of keystream at a time: they stay in the processor's cache until they are added


def require_cryptography() -> None:
    """Raise :class:`~fedcast.errors.MissingExtraError` where the library of the ciphers is not installed."""
    try:
        import cryptography  # noqa: F401 - whether it is there
    except ImportError as error:
        raise MissingExtraError.of("cryptography", "secure") from error


@dataclass(frozen=True)
class KeyPair:
    """A key pair of X25519, drawn by the operating system unless its secret is given.

    Attributes
    ----------
    secret
        The private key, 32 bytes.
    """

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key().public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """Return the secret shared with whoever holds the private key of ``public``, 32 bytes.

        Raises
        ------
        SecureSumError
            When ``public`` is no key, or one with which every secret is the same.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        try:
            return self._key().exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise SecureSumError("a public key is not usable", hint="check that all sites run the same version of fedcast") from error

    def _key(self) -> X25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return X25519PrivateKey.from_private_bytes(self.secret)


def derive(secret: bytes, context: bytes, *purpose: str) -> bytes:
    """Return a key of 32 bytes for one purpose.

    Parameters
    ----------
    secret
        What two sites agreed on, or a seed.
    context
        What all keys of a round are bound to; the salt.
    purpose
        What the key is for and between whom; no two lists of words give the same key.
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = json.dumps(["fedcast secure_sum", *purpose]).encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=context, info=info).derive(secret)


def add_mask(total: Words, key: bytes, *, subtract: bool = False) -> None:
    """Add the mask of a key to integers in place, or take it off.

    Parameters
    ----------
    total
        Contiguous integers ``[n]``; sums wrap.
    key
        32 bytes that make no other mask.
    subtract
        Whether to take the mask off.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    step = min(_CHUNK // total.itemsize, total.size)
    zeros, buffer = bytes(step * total.itemsize), bytearray(step * total.itemsize)
    mask = np.frombuffer(buffer, dtype=total.dtype)
    for start in range(0, total.size, max(step, 1)):
        part = total[start : start + step]
        stream.update_into(zeros[: part.nbytes] if part.size < step else zeros, buffer)
        (np.subtract if subtract else np.add)(part, mask[: part.size], out=part)
