"""Ed25519 keys of nodes and publishers: what is acceptable as one, signing and checking, and the file of a private one.

The library takes public keys of small order (for the identity point, one signature fits any message) and spellings
of a point that are not canonical, so both are refused here, whenever a key is registered or loaded (RFC 8032 §5.1.3
says how a point is spelled). Its check of signatures refuses S + L and wrong lengths by itself.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shared.errors import ConfigError, DiskError, RequestError

SIGNATURE = 64
"""Bytes of a signature."""
_HEX = re.compile(r"[0-9a-f]{64}")
_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
"""The y of two points of order 8; its negative is that of the other two."""
_SMALL_ORDER = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})
"""The y of the eight points whose order divides 8, whatever the sign of x."""
_MAX_FILE = 4096


def parse_public(text: str) -> bytes:
    """The public key that 64 hex digits spell. Raises RequestError (``bad_key``)."""
    if not _HEX.fullmatch(text):
        raise RequestError("a public key is 64 hex digits, lower case", code="bad_key")
    return check_public(bytes.fromhex(text))


def check_public(key: bytes) -> bytes:
    """``key``, where it is one point of the curve, canonical and of large order. Raises RequestError (``bad_key``)."""
    number = int.from_bytes(key, "little")
    y = number & ((1 << 255) - 1)
    if len(key) != 32 or y >= _P:
        raise RequestError("a public key is 32 bytes, in canonical form", code="bad_key")
    if y in _SMALL_ORDER:
        raise RequestError("a public key of small order proves nothing", code="bad_key")
    x_squared = (y * y - 1) * pow(_D * y * y + 1, -1, _P)
    if pow(x_squared, (_P - 1) // 2, _P) != 1:
        raise RequestError("a public key is a point of the curve", code="bad_key")
    return key


def verify(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` is one of ``message`` by the holder of a checked public key."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


class NodeKey:
    """The private key of a node, a publisher or a role of the metadata."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"<NodeKey {self.public.hex()}>"

    @classmethod
    def generate(cls) -> NodeKey:
        """A new one."""
        return cls(Ed25519PrivateKey.generate())

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes."""
        return self._key.sign(message)

    def pem(self) -> bytes:
        """PKCS #8, not encrypted: for a file that only its owner may read."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def check_private(file: Path) -> None:
    """Refuse a file of secrets that others than its owner may use, or that is not there. Raises ConfigError.

    For files that a library opens by itself; else ``read_private`` looks at what it reads.
    """
    try:
        _refuse_shared(file, file.stat())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


def read_private(file: Path, limit: int = _MAX_FILE) -> bytes:
    """The first ``limit`` bytes of a file of secrets. Raises ConfigError where others than its owner may use it,
    FileNotFoundError, DiskError."""
    try:
        with file.open("rb") as opened:
            _refuse_shared(file, os.fstat(opened.fileno()))
            return opened.read(limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error


def _refuse_shared(file: Path, status: os.stat_result) -> None:
    # What root gives a service to read by its group, as systems that hand out secrets do, no other user put there.
    given = stat.S_IRGRP if status.st_uid == 0 and os.geteuid() != 0 else 0
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~given:
        raise ConfigError(f"{file}: others on this machine may use this private key; chmod 600, or make a new one")


def load_key(file: Path) -> NodeKey:
    """The key in ``file``. Raises ConfigError (not a key, or others may use it), FileNotFoundError, DiskError."""
    data = read_private(file)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise ConfigError(f"{file}: not a private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{file}: not an Ed25519 key")
    return NodeKey(key)


def load_or_make_key(file: Path) -> NodeKey:
    """The key in ``file``, made at first. Raises ConfigError, DiskError."""
    with suppress(FileNotFoundError):
        return load_key(file)
    with suppress(FileExistsError):
        save_key(file, NodeKey.generate())
    return load_key(file)


def save_key(file: Path, key: NodeKey) -> None:
    """Put a key in a new file that only its owner may read. Raises FileExistsError, DiskError.

    The name appears with the whole key in it, and never replaces one: a key that was enrolled is not lost to a race.
    """
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(key.pem())
                opened.flush()
                os.fsync(opened.fileno())
            os.link(temporary, file)
        finally:
            temporary.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
