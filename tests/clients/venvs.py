"""Virtual environments with the clients of other hubs: two versions of one cannot live in one, nor bind ours.

Each has exactly what its file of requirements pins (``tests/clients/<name>.txt``). They are made once, below ``.venv``,
and made anew when the file changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PLACE = Path(sys.prefix) / "clients"
INSTALL = 500
"""Seconds that pip may take."""


def environment(name: str) -> Path:
    """The folder of a virtual environment. Skips the test, or fails it in CI, where it cannot be made."""
    requirements = HERE / f"{name}.txt"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    folder = PLACE / name
    folder.parent.mkdir(exist_ok=True)
    with (PLACE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be making it
        made = folder / "made-from"
        if not made.exists() or made.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, symlinks=True)
            _install(folder, requirements)
            made.write_text(wanted)
    return folder


def _install(folder: Path, requirements: Path) -> None:
    """Without what the requirements require: they are complete, and hf_xet is left out of them on purpose."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet",
         "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "-r", str(requirements)],
        capture_output=True, text=True, timeout=INSTALL, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = f"{requirements.name} cannot be installed: {done.stderr.strip()[-500:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; CI must have it")
        pytest.skip(reason)


def packages(folder: Path) -> Path:
    """Where a virtual environment keeps its packages: to lend them to another one."""
    return next((folder / "lib").glob("python*/site-packages"))
