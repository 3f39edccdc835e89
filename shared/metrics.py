"""Every metric, defined once: name, labels and what it counts. Each process has its own registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.process = ProcessCollector(registry=self.registry)
        """``process_*``: memory, descriptors, processor time and start of this process, as every Prometheus client
        library names them."""
        self.before_render: list[Callable[[], None]] = []
        """Called before the counters are shown: for hot paths, which count by themselves."""
        self.requests = Counter(
            "nearshard_requests",
            "Requests answered, by path kind and status.",
            ["kind", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "nearshard_request_seconds",
            "Seconds to answer, body included.",
            ["kind"],
            buckets=_LATENCY,
            registry=self.registry,
        )
        self.sent = Counter(
            "nearshard_sent_bytes", "Body bytes sent, by how they were had.", ["outcome"], registry=self.registry
        )
        self.outcomes = Counter(
            "nearshard_outcomes", "Shard reads, by how they were served.", ["outcome"], registry=self.registry
        )
        self.received = Counter(
            "nearshard_upstream_bytes",
            "Body bytes received, by upstream and tier: peer (in the region), parent or origin (over the link).",
            ["upstream", "tier"],
            registry=self.registry,
        )
        self.fills = Counter("nearshard_fills", "Fills ended, by result.", ["result"], registry=self.registry)
        self.deltas = Counter(
            "nearshard_deltas",
            "Shards made from deltas or compressed parcels (made), or fetched whole since that failed, by result.",
            ["result"],
            registry=self.registry,
        )
        self.delta_saved = Counter(
            "nearshard_delta_saved_bytes",
            "Bytes that did not come from above, since shards were made from deltas.",
            registry=self.registry,
        )
        self.upstream_errors = Counter(
            "nearshard_upstream_errors",
            "Sources that failed, by upstream and code.",
            ["upstream", "code"],
            registry=self.registry,
        )
        self.refused_metadata = Counter(
            "nearshard_refused_metadata",
            "Signed metadata that was refused, by source and code.",
            ["source", "code"],
            registry=self.registry,
        )
        self.subscribed = Counter(
            "nearshard_subscribed_bytes",
            "Bytes of new revisions of what a node is subscribed to: moved, or saved because they were held.",
            ["how"],
            registry=self.registry,
        )
        self.subscription_failures = Counter(
            "nearshard_subscription_failures",
            "Times that a subscription could not be brought up to date, by code.",
            ["code"],
            registry=self.registry,
        )
        self.expired_metadata_used = Counter(
            "nearshard_expired_metadata_used",
            "Answers by metadata that had expired, as the operator accepts it.",
            registry=self.registry,
        )
        self.evictions = Counter("nearshard_evictions", "Shards evicted, by tier.", ["tier"], registry=self.registry)
        self.cached = Gauge(
            "nearshard_cached_bytes", "Bytes held, fills included, by tier.", ["tier"], registry=self.registry
        )
        self.nodes = Gauge(
            "nearshard_nodes", "Nodes that a router knows, by region.", ["region"], registry=self.registry
        )
        self.refused_members = Counter(
            "nearshard_refused_members",
            "Heartbeats and records of nodes that were refused, by where they came from and code.",
            ["source", "code"],
            registry=self.registry,
        )
        self.redirects = Counter(
            "nearshard_redirects",
            "Clients sent on by a router, by the node's region (empty: to an origin) and why it was chosen.",
            ["region", "verdict"],
            registry=self.registry,
        )
        self.ejections = Counter(
            "nearshard_ejections",
            "Times that a node was found unhealthy, by region.",
            ["region"],
            registry=self.registry,
        )
        self.panics = Counter(
            "nearshard_panics",
            "Times that too much of a region was ejected to do without it, by region.",
            ["region"],
            registry=self.registry,
        )
        self.probes = Counter("nearshard_probes", "Probes of nodes, by result.", ["result"], registry=self.registry)
        self.mirror_fetches = Counter(
            "nearshard_mirror_fetches",
            "Revisions fetched from the hub that is mirrored, by result.",
            ["result"],
            registry=self.registry,
        )
        self.mirror_stale = Gauge(
            "nearshard_mirror_stale",
            "Mirrored refs of which the hub could not be asked whether they have moved.",
            registry=self.registry,
        )
        self.federated_updates = Counter(
            "nearshard_federated_updates",
            "Updates of sites in federated rounds: counted, clipped (counted, and to be scaled down), or the code that"
            " they were refused with.",
            ["result"],
            registry=self.registry,
        )
        self.federated_rounds = Counter(
            "nearshard_federated_rounds",
            "Federated rounds that came into a state here, by state.",
            ["state"],
            registry=self.registry,
        )
        self.federated_quarantines = Counter(
            "nearshard_federated_quarantines",
            "Sites that were put into quarantine.",
            registry=self.registry,
        )
        self.degraded = Gauge("nearshard_degraded", "1 while a router goes on without Redis.", registry=self.registry)
        self.metadata_expires = Gauge(
            "nearshard_metadata_expires_timestamp_seconds",
            "When the signed metadata that is in use here expires, by role, in seconds since 1970.",
            ["role"],
            registry=self.registry,
        )
        self.certificate_expires = Gauge(
            "nearshard_certificate_expires_timestamp_seconds",
            "When the first of the certificates in a file that is in use expires, by the setting that names the file,"
            " in seconds since 1970.",
            ["setting"],
            registry=self.registry,
        )
        self.tasks = Gauge("nearshard_tasks", "Tasks of the event loop.", registry=self.registry)

    def render(self) -> bytes:
        """The Prometheus text format."""
        for bring_up_to_date in self.before_render:
            bring_up_to_date()
        return generate_latest(self.registry)

    def show_expiries(self, gauge: Gauge, expiries: Callable[[], Mapping[str, float]]) -> None:
        """Have ``gauge`` show from now on what ``expiries`` gives: seconds since 1970 by label, and nothing else."""

        def show() -> None:
            gauge.clear()
            for label, expires in expiries().items():
                gauge.labels(label).set(expires)

        self.before_render.append(show)
