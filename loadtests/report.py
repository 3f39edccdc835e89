"""What a benchmark says besides its result: progress, and what the numbers depend on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
from rich.console import Console


def note(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def console() -> Console:
    """Where the result goes; wide enough for a table where that is a file."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def processor() -> str:
    """The processor's name, and how many cores of it there are."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def runtime(pid: int) -> str:
    """What one of our services runs on."""
    loop = "uvloop" if "uvloop" in Path(f"/proc/{pid}/maps").read_text() else "asyncio"
    return f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}, event loop {loop}"


def version(program: str, flag: str = "-v") -> str:
    """What a program says its version is."""
    said = subprocess.run([program, flag], capture_output=True, text=True, timeout=10)
    found = re.search(r"\d+\.\d+\S*", said.stdout + said.stderr)
    return found[0] if found else "unknown"
