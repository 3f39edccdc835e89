"""For Flower apps (flwr 1.41 and newer, its message API): rounds of ours in the place of Flower's own transport.

Flower says who trains and when, and carries metrics. The model comes to the nodes by our network, from next door; what
was trained goes to the origin as a signed and compressed difference, is checked and made one there, and published. Over
Flower's own link no array is sent, either way.

In the ServerApp: ``strategy = RoundsStrategy(SyncClient(...), "demo/minilm")``, then ``strategy.start(grid, ...)``.
In the ClientApp: ``app = ClientApp(mods=[submitting(SyncClient(...))])``; its functions stay as they are: they find the
model in ``msg.content["arrays"]``, and reply what they trained, and ``num-examples`` among the metrics.

Whoever runs the origin opens each round (``nearshard federated open``). Calls block as long as a round takes: Flower
runs apps in threads or processes of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from logging import INFO, getLogger
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from nearshard.client import SyncClient
from shared.errors import RequestError, UpstreamError
from shared.federated import OpenRound, PastRound

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Names of records in a message, as Flower's own strategies have them."""
EXAMPLES = "num-examples"
MODEL, BASE, ROUND = "nearshard-model", "nearshard-base", "nearshard-round"
"""What a node is told in place of arrays: which revision of which model it is to train, or to evaluate."""
SENT = "nearshard-bytes"
"""Metric of a reply: bytes of the update that was counted."""
_STILL = ("collected", "aggregated", "publishing")
"""States of a round from which it goes on by itself."""
_log = getLogger("flwr")

ClientAppCallable = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCallable], Message]


def arrays_of(tensors: Mapping[str, Any]) -> ArrayRecord:
    """Flower's record of numpy arrays by name. Flower has no bfloat16 and no 8-bit floats: these become float32."""
    import numpy as np

    def plain(value: Any) -> Any:
        return np.asarray(value if value.dtype.kind in "biufc" else value.astype(np.float32))

    return ArrayRecord({name: Array(plain(value)) for name, value in tensors.items()})


def state_of(record: ArrayRecord) -> dict[str, Any]:
    """The numpy arrays by name in Flower's record: what ``Client.submit`` takes."""
    return {name: array.numpy() for name, array in record.items()}


def fetch_arrays(client: SyncClient, model: str, revision: str) -> ArrayRecord:
    """All tensors of a revision (or ref), by the nearest nodes or from the local repository. Raises as
    ``Client.load_task``."""
    return arrays_of(client.load_task(f"{model}@{revision}"))


def submitting(
    client: SyncClient, *, site: str | None = None, sites: Path | None = None, codec: str = "", url: str = ""
) -> Mod:
    """A mod for a ClientApp: gives it the model before, and submits what it trained afterwards. The arguments are those
    of ``Client.submit``. Messages of other strategies pass through as they are."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        config = message.content.get(CONFIG, {})
        if BASE not in config:
            return call_next(message, context)
        model, base = str(config[MODEL]), str(config[BASE])
        message.content[ARRAYS] = fetch_arrays(client, model, base)
        reply = call_next(message, context)
        if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN or reply.has_error():
            return reply
        trained = reply.content.pop(ARRAYS, None)
        metrics = reply.content.setdefault(METRICS, MetricRecord())
        if trained is None:
            raise RequestError(f"what was trained is expected in the reply's {ARRAYS!r}", code="bad_update")
        examples = int(metrics.get(EXAMPLES, 1))
        done = client.submit(
            model, state_of(trained), base, examples=examples, site=site, sites=sites, codec=codec, url=url
        )
        metrics[SENT] = done.size
        return reply

    return mod


class RoundsStrategy(Strategy):
    """A strategy whose rounds are those of a model at an origin: waits for one to be open, has all nodes train on its
    base, and waits for what is published of it.

    The arrays that ``start`` is given are not used: the base revision of each round is. A round that is held, expires
    or is discarded gives no arrays.
    """

    def __init__(
        self,
        client: SyncClient,
        model: str,
        *,
        url: str = "",
        min_nodes: int = 1,
        evaluate: bool = True,
        timeout: float = 3600.0,
        poll: float = 2.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``url``: as of ``Client.rounds``. ``min_nodes``: how many Flower must know before a round begins.
        ``evaluate``: whether the nodes evaluate what was published. ``timeout``: seconds to wait for these, for a round
        to be opened, and for its end; ``poll``: seconds between two looks."""
        self._client, self._model, self._url = client, model, url
        self._min_nodes, self._evaluate = min_nodes, evaluate
        self._timeout, self._poll, self._sleep = timeout, poll, sleep
        self._current: OpenRound | None = None
        self._revision = ""
        """What was published last."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell all nodes to train on the base of the open round. Raises UpstreamError where none is opened in time."""
        before = self._current.number if self._current else 0

        def opened() -> OpenRound | None:
            found = self._client.rounds(self._model, url=self._url).open
            return found if found and found.number > before else None

        self._current = self._wait(opened, f"a round of {self._model} to be opened")
        _log.log(INFO, "round %d of %s is upon %s", self._current.number, self._model, self._current.base)
        what = {BASE: self._current.base, ROUND: self._current.number, "server-round": server_round}
        return self._messages(what, config, grid, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Wait until the round has ended, and fetch what was published of it: arrays (None where nothing was), and the
        mean of the nodes' metrics. Raises UpstreamError where it does not end in time."""
        assert self._current is not None
        number, metrics = self._current.number, _mean_metrics(replies)

        def ended() -> PastRound | None:
            rounds = self._client.rounds(self._model, url=self._url)
            found = next((past for past in rounds.last if past.number == number), None)
            return found if found and found.state not in _STILL else None

        past = self._wait(ended, f"round {number} of {self._model} to end")
        if past.state != "published" or past.revision is None:
            _log.log(INFO, "round %d of %s is %s: nothing was published", number, self._model, past.state)
            return None, metrics
        self._revision = past.revision
        return fetch_arrays(self._client, self._model, past.revision), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell all nodes to evaluate what was published last."""
        if not self._evaluate or not self._revision:
            return []
        what = {BASE: self._revision, "server-round": server_round}
        return self._messages(what, config, grid, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of the nodes' metrics."""
        return _mean_metrics(replies)

    def summary(self) -> None:
        """Say what is done here."""
        _log.log(INFO, "\t└──> rounds of %s, updates by way of nearshard", self._model)

    def _messages(
        self, what: Mapping[str, Any], config: ConfigRecord, grid: Grid, message_type: str
    ) -> Iterable[Message]:
        told = ConfigRecord({**config, **what, MODEL: self._model})

        def there() -> list[int] | None:
            nodes = list(grid.get_node_ids())
            return nodes if len(nodes) >= self._min_nodes else None

        nodes: list[int] = self._wait(there, f"{self._min_nodes} nodes of Flower's")
        return [
            Message(content=RecordDict({CONFIG: told}), message_type=message_type, dst_node_id=node) for node in nodes
        ]

    def _wait(self, look: Callable[[], Any], what: str) -> Any:
        waited = 0.0
        while (found := look()) is None:
            if waited >= self._timeout:
                raise UpstreamError(f"waited {waited:.0f} s for {what}", code="upstream_timeout")
            self._sleep(self._poll)
            waited += self._poll
        return found


def _mean_metrics(replies: Iterable[Message]) -> MetricRecord | None:
    """The mean of each number in the replies, weighted by examples; errors are logged."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    examples = 0.0
    for reply in replies:
        if reply.has_error():
            _log.log(INFO, "\t> node %d failed: %s", reply.metadata.src_node_id, reply.error.reason)
            continue
        record = reply.content.get(METRICS, {})
        weight = float(record.get(EXAMPLES, 1))
        examples += weight
        for name, value in record.items():
            if isinstance(value, int | float) and name != EXAMPLES:
                sums[name] = sums.get(name, 0.0) + weight * value
                weights[name] = weights.get(name, 0.0) + weight
    if not examples:
        return None
    return MetricRecord({**{name: sums[name] / weights[name] for name in sums}, EXAMPLES: examples})
