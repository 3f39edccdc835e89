"""``make fuzz``: all targets in turn, for FUZZ_SECONDS (60) in all; another FUZZ_SEED (0) is another run."""

from __future__ import annotations

import os
import sys
import time

from tests.fuzz.fuzz import Found, fuzz
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Print executions by target; 1 where something was found."""
    seconds, seed = float(os.environ.get("FUZZ_SECONDS", "60")), int(os.environ.get("FUZZ_SEED", "0"))
    failed = 0
    for target in TARGETS:
        end = time.monotonic() + seconds / len(TARGETS)
        try:
            done = fuzz(target, seed, lambda _, end=end: time.monotonic() < end)  # type: ignore[misc]
            print(f"{target.name:<16} {done:>8} executions", flush=True)
        except Found as found:
            failed = 1
            print(f"{target.name:<16} FAILED {found}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
