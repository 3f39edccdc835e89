"""The keys that tokens are signed with, on disk: one that signs, and what is to be known of it.

In ``<keys>/tokens`` (``origin.keyring`` says where keys are; this folder is not searched for other roles' keys)::

    token.pem        the key that signs now (PKCS #8, mode 0600)
    next.pem         one that is about to take its place; there for a moment only
    issued.json      when the last token that it signed expires: until then it must be believed after it is replaced
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shared.codec import decode_json, encode_json
from shared.errors import ConfigError, DecodeError, DiskError
from shared.files import replace_file
from shared.keys import NodeKey, load_key, load_or_make_key
from shared.tokens import MAX_LIFETIME

FOLDER = "tokens"
KEY, NEXT, ISSUED = "token.pem", "next.pem", "issued.json"


class TokenKeys:
    """The signing key of a folder. Everything here raises ConfigError or DiskError where a file cannot be used."""

    def __init__(self, keys: Path) -> None:
        """``keys``: the folder of all private keys."""
        self.folder = keys.expanduser() / FOLDER

    def __repr__(self) -> str:
        return f"<TokenKeys in {self.folder}>"

    def signing(self) -> NodeKey:
        """The key that signs now."""
        try:
            return load_key(self.folder / KEY)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.folder / KEY}: there is no key to sign tokens with; make one: nearshard token rotate"
            ) from None

    def make(self) -> NodeKey:
        """The first key."""
        return load_or_make_key(self.folder / KEY)

    def issued_until(self, now: float) -> float:
        """When the last token of the present key expires, in seconds since 1970; where that is not known, the latest
        time that is possible."""
        try:
            noted = decode_json((self.folder / ISSUED).read_bytes())["until"]
            return max(now, float(noted))
        except FileNotFoundError:
            return now
        except (OSError, DecodeError, KeyError, TypeError, ValueError):
            return now + MAX_LIFETIME

    def note_issued(self, until: float, now: float) -> None:
        """A token was signed that expires then. Said before it is shown to anybody."""
        if until <= self.issued_until(now):
            return
        try:
            replace_file(self.folder / ISSUED, encode_json({"until": until}), mode=0o600)
        except OSError as error:
            raise DiskError(f"{self.folder / ISSUED}: {error.strerror}") from error

    def prepare(self) -> NodeKey:
        """The key that is to sign next, made at first."""
        return load_or_make_key(self.folder / NEXT)

    def take_over(self) -> None:
        """Sign with the prepared key from now on: it is known by now. The old private key is gone."""
        try:
            with suppress(FileNotFoundError):
                (self.folder / ISSUED).unlink()
            (self.folder / NEXT).replace(self.folder / KEY)
        except OSError as error:
            raise DiskError(f"{self.folder}: {error.strerror}") from error
