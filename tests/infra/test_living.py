"""Networks made by what is in infra/, alive: in namespaces where their names lead to loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ALONE = ["unshare", "--mount", "--net", "--kill-child"]


def can_be_alone() -> bool:
    """Whether namespaces can be made here: by root, outside most containers."""
    return os.geteuid() == 0 and subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "module", ["tests.infra.living", pytest.param("tests.infra.sentinels", marks=pytest.mark.long)]
)
def test_it_starts_and_works(module: str, tmp_path: Path, need: Callable[[str], str]) -> None:
    need("redis-server")
    if not can_be_alone():
        pytest.skip("namespaces cannot be made here")
    done = subprocess.run(
        [*ALONE, sys.executable, "-m", module, str(tmp_path)], capture_output=True, text=True, timeout=110, check=False
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr[-6000:]
