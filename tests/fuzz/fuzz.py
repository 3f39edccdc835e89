"""Fuzzing: every parser that sees bytes of the network, on valid documents that were damaged.

Whatever it is given, a parser gives a value or raises one of our own errors, within CPU_TIME and MEMORY. An execution
is named by seed, target and number, and is the same again by that name. The mutations are our own and not
Hypothesis': they need seconds for what it needs minutes for, and what is found here is small enough unshrunk.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from shared.errors import NearshardError

CPU_TIME = 0.5
"""Seconds of this thread for one input. Generous: they are checked on machines that are busy."""
ATTEMPTS = 3
"""Times that an input may take longer before it is at fault: a full collection of garbage can fall into any of them."""
MEMORY = 16 << 20
"""Bytes that one input may cost at a time."""
MAX_INPUT = 1 << 16
EDITS = 4
"""Mutations of one input, at most."""
_TOKENS = [
    # numbers and lengths at their ends
    b"0", b"-1", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"\x00" * 8, b"\xff" * 8, b"\x00" * 7 + b"\x80",
    # containers that claim much, and nesting
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdc\xff\xff",
    b"\x91" * 2000, b"\x81\xa0" * 1000, b"\x80" * 3000, b"[" * 3000, b'{"a":' * 1000, b"[]," * 3000,
    # msgpack of other kinds: extensions, times, never used; keys that are no text
    b"\xc1", b"\xd4\x00\x00", b"\xd6\xff\x00\x00\x00\x00", b"\x81\x01\x01", b"\xca\x7f\x80\x00\x00", b"\xc0", b"\xc2",
    # JSON
    b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\u0000"', b",", b":", b'"',
    # paths, ids, fields
    b"..", b"/", b"//", b"%2f", b"%2e%2e", b"%00", b"%zz", b"%ff", b"@", b":", b"sha256:", b"md5:", b"~", b"\\",
    b"\r\n", b"\n", b"\t", b",", b"-", b"=", b"bytes=", b"bytes=0-0,", b"W/", b"*", b"\x00", b"\x7f", b"\xc3\x28",
    "\u0660\u202e".encode(), b"\xed\xa0\x80", b"pages", b"size", b"shards", b"localhost", b"169.254.169.254",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A parser. ``run`` raises AssertionError where what it gives is not as it must be."""

    name: str
    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    """Valid documents, and what was wrong once."""


class Found(AssertionError):
    """A parser did what it must not."""


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A seed with a few mutations."""
    data = rng.choice(seeds)
    for _ in range(rng.randint(1, EDITS)):
        data = _mutated_once(rng, data, seeds)
    return data[:MAX_INPUT]


def _mutated_once(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    start, stop = sorted(rng.randint(0, len(data)) for _ in range(2))
    match rng.randrange(8):
        case 0 if data:  # a bit flips
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1 if data:  # a byte becomes any other
            at = rng.randrange(len(data))
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:  # the end is missing
            return data[:stop]
        case 3:  # a part is missing
            return data[:start] + data[stop:]
        case 4:  # a part is there again
            times = rng.choice((1, 1, 2, 50))
            return data[:stop] + data[start:stop] * times + data[stop:]
        case 5:  # goes on as another one
            other = rng.choice(seeds)
            return data[:start] + other[rng.randint(0, len(other)) :]
        case 6:  # a part is replaced by something dangerous
            return data[:start] + rng.choice(_TOKENS) + data[stop:]
        case _:  # something dangerous comes in
            return data[:start] + rng.choice(_TOKENS) + data[start:]


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """The seeds themselves, then mutations without end; the same for the same ``seed``."""
    yield from target.seeds
    for number in count(len(target.seeds)):
        yield mutated(random.Random(f"{seed}/{target.name}/{number}"), target.seeds)


def execute(target: Target, data: bytes, name: str) -> None:
    """Run one input. Raises Found; ``name`` says how to have it again."""
    for _ in range(ATTEMPTS):
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        began = time.thread_time()
        try:
            target.run(data)
        except NearshardError:
            pass
        except Exception as error:
            raise Found(f"{name}: {type(error).__name__}: {error}; on {data[:200]!r}") from error
        taken, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1] - before
        if peak > MEMORY:
            raise Found(f"{name}: took {peak >> 20} MiB; on {data[:200]!r}")
        if taken <= CPU_TIME:
            return
    raise Found(f"{name}: took {taken:.2f} s of CPU, {ATTEMPTS} times in a row; on {data[:200]!r}")


def fuzz(target: Target, seed: int, go_on: Callable[[int], bool]) -> int:
    """Run inputs while ``go_on`` (given how many there were) says so; how many there were. Raises Found."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start(1)
    try:
        for number, data in enumerate(inputs(target, seed)):
            if not go_on(number):
                return number
            execute(target, data, f"FUZZ_SEED={seed} {target.name} {number}")
    finally:
        if not tracing:
            tracemalloc.stop()
    raise AssertionError("inputs never end")
