"""``python flower_app.py ROUTER SITES SITE...``: a Flower app of real Flower parts over rounds of ours, in Flower's own
environment. Each node is a ClientApp; only the way between server and nodes is a call. Prints what came of it, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from nearshard import SyncClient
from nearshard.flower import RoundsStrategy, arrays_of, state_of, submitting

MODEL = "acme/tiny"


def client_app(router: str, site: str, sites: Path, step: float) -> ClientApp:
    """A node's app, as its author would write it."""
    app = ClientApp(mods=[submitting(SyncClient(router), site=site, sites=sites, codec="int8")])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = {name: values - np.float32(step) for name, values in state_of(message.content["arrays"]).items()}
        metrics = MetricRecord({"loss": step, "num-examples": 10})
        return Message(RecordDict({"arrays": arrays_of(state), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        mean = float(state_of(message.content["arrays"])["encoder.layer.0.bias"].mean())
        return Message(RecordDict({"metrics": MetricRecord({"mean": mean, "num-examples": 10})}), reply_to=message)

    return app


class Here(Grid):
    """Nodes in this process; counts the bytes of arrays that Flower would carry."""

    def __init__(self, apps: dict[int, ClientApp]) -> None:
        self._apps, self.carried = apps, 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Ask each node."""
        replies = []
        for message in messages:
            self._count(message)
            node = message.metadata.dst_node_id
            context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            replies.append(self._apps[node](message, context))
            self._count(replies[-1])
        return replies

    def _count(self, message: Message) -> None:
        self.carried += sum(record.count_bytes() for record in message.content.array_records.values())

    def get_node_ids(self) -> list[int]:
        """All of them."""
        return list(self._apps)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *words: Any, **named: Any) -> Message:
        raise NotImplementedError

    push_messages = pull_messages = create_message


def main(router: str, sites: str, *names: str) -> None:
    """One round."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # as its runtime has it
    grid = Here({n: client_app(router, name, Path(sites), 0.01 * n) for n, name in enumerate(names, 1)})
    strategy = RoundsStrategy(SyncClient(router), MODEL, min_nodes=len(names), poll=0.1, timeout=60)
    result = strategy.start(grid, initial_arrays=ArrayRecord(), num_rounds=1, train_config=ConfigRecord({"lr": 0.1}))
    told = {
        "carried": grid.carried,
        "bias": state_of(result.arrays)["encoder.layer.0.bias"].tolist(),
        "train": dict(result.train_metrics_clientapp[1]),
        "evaluate": dict(result.evaluate_metrics_clientapp[1]),
    }
    sys.stdout.write("\n" + json.dumps(told) + "\n")


main(*sys.argv[1:])
