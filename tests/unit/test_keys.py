"""Keys: which public keys are acceptable, and the file of a private one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, DiskError, RequestError
from shared.keys import NodeKey, check_private, check_public, load_key, load_or_make_key, parse_public, verify

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    """The sum of two points of the curve (RFC 8032 §5.1.4, in plain coordinates)."""
    (x1, y1), (x2, y2) = a, b
    product = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + product, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - product, -1, P) % P


def times(number: int, point: Point) -> Point:
    """A multiple of a point."""
    result: Point = (0, 1)
    for bit in bin(number)[2:]:
        result = add(result, result)
        if bit == "1":
            result = add(result, point)
    return result


def x_of(y: int) -> int | None:
    """One x that fits y."""
    squared = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(squared, (P + 3) // 8, P)
    for candidate in (x, x * pow(2, (P - 1) // 4, P) % P):
        if candidate * candidate % P == squared:
            return candidate
    return None


def encoded(point: Point) -> bytes:
    """A point as a key."""
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def torsion() -> set[Point]:
    """All points whose order divides 8: multiples of any point by the large prime order."""
    found: set[Point] = set()
    y = 2
    while len(found) < 8:
        x = x_of(y)
        if x is not None:
            found |= {times(n, times(L, (x, y))) for n in range(8)}
        y += 1
    return found


SMALL = sorted(encoded(point) for point in torsion())
OTHER_SPELLINGS = [
    (number | sign << 255).to_bytes(32, "little") for number in (*range(P, 2**255), 1, P - 1, 0) for sign in (0, 1)
]


@pytest.mark.parametrize("key", [*SMALL, *OTHER_SPELLINGS], ids=lambda key: key.hex())
def test_keys_of_small_order_and_other_spellings_are_refused(key: bytes) -> None:
    """S2. The library takes most of them."""
    with pytest.raises(RequestError) as refused:
        check_public(key)
    assert refused.value.error_code == "bad_key" and refused.value.status == 422


def test_the_library_takes_a_key_that_proves_nothing() -> None:
    """Why the check is there: one signature by nobody, for any message."""
    identity = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(identity).verify(identity + bytes(32), b"anything at all")


@pytest.mark.parametrize("text", ["", "00" * 31, "ab" * 33, "AB" * 32, "g0" * 32, "0x" + "ab" * 31, "ab" * 32 + "\n"])
def test_what_is_not_64_hex_digits_is_no_key(text: str) -> None:
    with pytest.raises(RequestError):
        parse_public(text)


@given(st.integers(0, P - 1))
def test_a_key_is_a_point_of_the_curve(y: int) -> None:
    key = y.to_bytes(32, "little")
    if x_of(y) is None:
        with pytest.raises(RequestError):
            check_public(key)
    elif key not in SMALL:
        assert check_public(key) == key


@given(st.binary())
def test_what_is_signed_is_verified_and_nothing_else(message: bytes) -> None:
    key, other = NodeKey.generate(), NodeKey.generate()
    signature = key.sign(message)
    assert verify(parse_public(key.public.hex()), signature, message)
    s = int.from_bytes(signature[32:], "little") + L
    bad = [b"", signature[:-1], signature + b"\0", bytes(64), signature[:32] + s.to_bytes(32, "little")]
    bad += [other.sign(message), bytes([signature[0] ^ 1]) + signature[1:]]
    for forged in bad:  # S1
        assert not verify(key.public, forged, message)
    assert not verify(key.public, signature, message + b"\0")
    assert not verify(other.public, signature, message)


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "node.key"
    made = load_or_make_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_or_make_key(file).public == load_key(file).public == made.public
    assert [*file.parent.iterdir()] == [file]


def test_a_key_that_was_made_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.key"
    first = NodeKey.generate()
    link = os.link

    def too_late(source: Path, target: Path) -> None:
        file.write_bytes(first.pem())
        file.chmod(0o600)
        link(source, target)

    monkeypatch.setattr(os, "link", too_late)
    assert load_or_make_key(file).public == first.public
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604, 0o602, 0o666])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    """C2."""
    file = tmp_path / "node.key"
    load_or_make_key(file)
    check_private(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=r"node\.key"):
        load_or_make_key(file)
    with pytest.raises(ConfigError, match=r"node\.key"):
        check_private(file)


def test_what_root_gives_a_services_group_to_read_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As systems that hand out secrets do, to services that are not root."""
    file = tmp_path / "node.key"
    load_or_make_key(file)
    real = Path.stat

    def of_root(path: Path, **words: bool) -> os.stat_result:
        return os.stat_result([*real(path, **words)[:4], 0, *real(path, **words)[5:10]])

    monkeypatch.setattr(Path, "stat", of_root)
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    file.chmod(0o440)
    check_private(file)
    for mode in (0o460, 0o444, 0o450):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=r"node\.key"):
            check_private(file)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    file.chmod(0o440)
    with pytest.raises(ConfigError, match=r"node\.key"):
        check_private(file)


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        check_private(tmp_path / "node.key")


@pytest.mark.parametrize("kind", ["empty", "text", "public", "other curve"])
def test_what_is_no_private_key_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "node.key"
    curve = generate_private_key(SECP256R1())
    data = {
        "empty": b"",
        "text": b"key\n",
        "public": NodeKey.generate().public,
        "other curve": curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }[kind]
    file.write_bytes(data)
    file.chmod(0o600)
    with pytest.raises(ConfigError):
        load_or_make_key(file)
    assert file.read_bytes() == data


def test_a_disk_that_takes_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError):
        load_or_make_key(tmp_path / "file" / "node.key")
