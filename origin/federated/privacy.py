"""Central differential privacy: noise on the aggregate, and what the rounds so far have cost together. Pure.

Who sees the published models learns almost the same whatever one site sent: that is what epsilon and delta bound, for
one site that is replaced by another one (the number of sites is no secret). The origin itself sees the updates. Every
update is scaled down to a fixed norm first: the median of the norms would itself tell of the sites.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from origin.federated.aggregate import Block
from origin.federated.rules import Rule
from shared.errors import ConfigError, MissingPackage

if TYPE_CHECKING:
    from origin.federated.rules import Matrix

DELTA = 1e-5
"""The usual one; it should be well below one by the number of sites."""
KEY = 32
"""Bytes of randomness that the noise of a round is made from."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What a round's result is protected with: each update is scaled down to the L2 norm ``clip``, and the noise's
    standard deviation is ``multiplier`` times what one site can move the result by (``sensitivity``).

    Raises ConfigError where one of them is not above 0.
    """

    clip: float
    multiplier: float

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("multiplier", self.multiplier)):
            if not (isfinite(value) and value > 0):
                raise ConfigError(f"noise: {name} is a number above 0, not {value}")

    def deviation(self, rule: Rule, sites: int) -> float:
        """The standard deviation of the noise on each element. Raises ConfigError, TooFewSites."""
        return self.multiplier * sensitivity(rule, sites, self.clip)


def sensitivity(rule: Rule, sites: int, clip: float) -> float:
    """The L2 distance by which one site can move the result, whatever it sends in place of anything else, where all
    weights are equal and no update has a norm above ``clip``. Raises TooFewSites; ConfigError for krum and nnm.

    What a mean over ``k`` values makes of one that moves by ``d`` is at most ``d / k``; this holds too where the others
    are left out for being the largest and smallest, since the sum of those in the middle never moves further than the
    value does. Two updates are ``2 clip`` apart at most. What krum and nnm choose by distance can turn over as a
    whole, so noise that hides one site would hide the result.
    """
    if rule.name in ("krum", "nnm"):
        raise ConfigError(f"noise goes with trimmed, median and mean: one site can turn over all that {rule} chose")
    return 2 * clip / rule.kept(sites)


def noisy(blocks: Iterable[Block], deviation: float, key: bytes | None = None) -> Iterator[Block]:
    """``blocks`` with Gaussian noise of this standard deviation on each element. ``key`` (32 bytes): what it is made
    from, by default new secret randomness; whoever knows it can take the noise off again, so it is never kept."""
    import numpy as np  # takes long to import

    normals = _Normals(secrets.token_bytes(KEY) if key is None else key)
    for block in blocks:
        noise = normals.take(block.segment.count).reshape(block.values.shape)
        yield block._replace(values=(block.values + deviation * noise).astype(np.float32))


class _Normals:
    """Standard normal numbers from a cipher's stream: numpy's own generators can be followed by who has seen enough of
    what they made."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def take(self, count: int) -> Matrix:
        """The next ``count``, by Box and Muller's transform."""
        import numpy as np

        half = -(-count // 2)
        raw = np.frombuffer(self._stream.update(bytes(16 * half)), "<u8")
        uniform = ((raw >> 11) + 1) * 2.0**-53  # above 0, up to 1
        radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def epsilon(multipliers: Sequence[float], delta: float = DELTA) -> float:
    """The epsilon that rounds with noise of these multipliers have cost together, for this delta: all that were made,
    published or not. Infinite where one had none (0).

    Rényi differential privacy, accounted by Google's ``dp-accounting``. Raises MissingPackage; ConfigError for a delta
    that is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta is between 0 and 1, not {delta}")
    if not multipliers:
        return 0.0
    library = _library()
    accountant = library.rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_ONE)
    for multiplier in multipliers:
        accountant.compose(library.GaussianDpEvent(multiplier))
    return float(accountant.get_epsilon(delta))


def check_installed() -> None:
    """Raises MissingPackage where epsilon could not be told: better before a round than after it."""
    _library()


def _library() -> Any:
    try:
        import_module("dp_accounting.rdp")
        return import_module("dp_accounting")
    except ImportError as error:
        raise MissingPackage(
            f"noise needs dp-accounting, which is not installed: pip install 'nearshard[privacy]' ({error})"
        ) from error
