"""``python -m tests.faults.limited COUNT ...``: an edge node that may have COUNT descriptors, and never more."""

from __future__ import annotations

import resource
import runpy
import sys

if __name__ == "__main__":
    count = int(sys.argv.pop(1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    runpy.run_module("edge_node", run_name="__main__", alter_sys=True)
