"""``nearshard sync`` as it is run: rounds of a real process, a new version, an origin that goes away."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nearshard import Repository
from tests.forked import Forked
from tests.harness import Lab, command, make_model, wait_until


def events(out: Path) -> list[dict[str, Any]]:
    """What it has said."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_copies_follow_what_is_published_through_failures(lab: Lab) -> None:
    model, home, status_file = lab.folder / "model", lab.folder / "repository", lab.folder / "status.json"
    make_model(model)
    shards = ("--deltas", "--shard-target", "256KiB", "--shard-limit", "256KiB")
    lab.publish(model, "acme/tiny", *shards)
    origin = lab.origin()
    out, err = lab.folder / "out", lab.folder / "err"
    words = ["sync", "acme/tiny", "acme/absent:embed", "--every", "1s", "--json", "--status-file", str(status_file)]
    where = ("--router", origin.url, "--repository", str(home))
    process = Forked("nearshard", [*words, *where], dict(os.environ), out, err)
    try:

        def seen(event: str, **fields: Any) -> Any:
            return [e for e in events(out) if e["event"] == event and fields.items() <= e.items()]

        first = wait_until(lambda: seen("synced", what="acme/tiny"), "the first version")[0]
        wait_until(lambda: seen("failed", what="acme/absent:embed", code="unknown_model"), "the other's failure")
        done = command("sync", "acme/tiny", "--once", *where, check=False)
        assert done.returncode == 2 and "another nearshard sync" in done.stderr

        (model / "config.json").write_text('{"layers": 4}')
        second = lab.publish(model, "acme/tiny", *shards)
        synced = wait_until(lambda: seen("synced", what="acme/tiny", revision=second), "the second version")[0]
        assert 0 < synced["moved"] < 1000 and synced["saved"] > 0.99 * first["moved"]

        origin.stop()
        wait_until(lambda: seen("failed", what="acme/tiny"), "that the origin is gone")
        status = json.loads(status_file.read_bytes())
        assert status["models"][0]["last_error"]["code"] == "upstream_error"
        process.terminate()
        assert process.wait(20) == 0, err.read_text()
    finally:
        process.kill()
    assert json.loads(status_file.read_bytes())["state"] == "ended" and not err.read_text()
    repository = Repository(home)
    assert repository.revisions("acme/tiny", "main")[0] == second

    origin.start()
    done = command("sync", "acme/tiny@main", "--once", *where)
    assert "1 looked at, 0 failed, 0.0 MB moved" in done.stdout
    done = command("sync", "acme/absent", "--once", *where, check=False)
    assert done.returncode == 8 and "acme/absent" in done.stderr
