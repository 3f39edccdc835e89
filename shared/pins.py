"""Pins: refs that mean one revision here, whatever their publisher signs and rolls out. Pure.

A pin is ``MODEL[@REF]=REVISION``, at a router also ``MODEL[@REF]=REVISION@SITE``: for the clients of one region. A
revision is a digest, so nobody has to be believed for what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.digest import Digest, parse_digest
from shared.errors import BadId
from shared.ids import DEFAULT_REF, parse_model, parse_name, parse_ref

Pins = Mapping[tuple[str, str, str], Digest]
"""Revisions by model, ref and site; the site is empty where it is for all."""
NO_PINS: Pins = {}


def parse_pins(texts: Iterable[str]) -> Pins:
    """The pins that these spell. Raises BadId, also for two of one ref."""
    pins: dict[tuple[str, str, str], Digest] = {}
    for text in texts:
        what, _, rest = text.partition("=")
        model, at, ref = what.partition("@")
        revision, named, site = rest.partition("@")
        key = (
            parse_model(model),
            parse_ref(ref) if at else DEFAULT_REF,
            parse_name(site, "a site") if named else "",
        )
        if key in pins:
            raise BadId(f"{what} is pinned twice")
        pins[key] = parse_digest(revision)
    return pins


def check_pin(text: str) -> str:
    """A pin as a setting has it. Raises ValueError."""
    try:
        parse_pins([text])
    except BadId as error:
        raise ValueError(f"a pin is MODEL@REF=sha256:…: {error}") from error
    return text


def pinned(pins: Pins, model: str, ref: str, site: str) -> Digest | None:
    """What a ref is pinned to at a site, if it is."""
    return (pins and (pins.get((model, ref, site)) or pins.get((model, ref, "")))) or None
