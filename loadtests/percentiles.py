"""Percentiles of response times. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable


def percentile(values: Iterable[float], part: float) -> float:
    """The least value that at least ``part`` (0 to 1) of them do not exceed. One of the values, so it was seen."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]
