"""The harness of ``make faults`` itself: a fault is injected and healed, and what does not hold is found."""

from __future__ import annotations

import pytest

from tests.faults import injections
from tests.faults.figures import Case
from tests.faults.live import Fault, Options, Scene, run
from tests.harness import Lab

OPTIONS = Options(seed=1, hold=1.0, clients=6, warming=3, pause=0.1)


async def damage(scene: Scene) -> None:
    """All that the services promise to hold, broken by hand."""
    name = scene.any_edge()
    kept = scene.lab.folder / name / "blobs" / "ab" / ("ab" * 32)
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"other bytes than its name says")
    (scene.lab.folder / name / "tmp" / "left").touch()
    for service in scene.services.values():
        with service.log.open("a") as log:
            log.write("status=500\n")
    scene.seen = dict.fromkeys(scene.services, 99)


async def test_a_fault_is_injected_and_healed_and_what_is_broken_is_found(lab: Lab) -> None:
    cases = {"F7": Case("F7"), "F14": Case("F14")}
    faults = [Fault("F7", injections.redis_killed, True), Fault("F14", damage, True)]
    with pytest.raises(AssertionError):  # the network is looked at once more
        await run(lab, OPTIONS, faults, cases, lambda: True)
    assert cases["F7"].broken == [] and cases["F7"].verdict == "held"
    assert cases["F7"].served > 0 and cases["F7"].refused == 0 and cases["F7"].recoveries[0] < 10
    assert cases["F14"].verdict == "BROKEN"
    assert {line.split(": ")[1] for line in cases["F14"].broken} >= {"I1", "I2", "I7"}
