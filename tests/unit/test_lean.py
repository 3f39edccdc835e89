"""Libraries that are installed and of no use to a service are not loaded by it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shared.lean import without


@pytest.mark.parametrize("service", ["edge_node.app", "router.app", "nearshard.client"])
def test_no_service_loads_the_sdk_of_a_cloud(service: str) -> None:
    said = f"import sys, {service}; print('boto3' in sys.modules); import boto3"
    done = subprocess.run(
        [sys.executable, "-c", said], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""}
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_module_cannot_be_found_in_the_block_and_can_be_after_it() -> None:
    sys.modules.pop("this", None)
    with without("this"), pytest.raises(ModuleNotFoundError):
        import this  # noqa: F401
    assert "this" not in sys.modules
    with without("sys"):
        import sys as found
    assert found is sys.modules["sys"]
