"""Spans as OpenTelemetry has them, sent by OTLP over HTTP: the optional extra ``otel``. Imported only where it is used.

Sampling, queues and what a collector wants in headers are OpenTelemetry's own (``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_…``,
``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_RESOURCE_ATTRIBUTES``). Spans are sent from a thread, in batches; where the
collector is away they are dropped, and nobody waits for it.
"""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.tracing import TRACEPARENT, TRACESTATE, Attributes, Kind, RequestContext

TIMEOUT = 3.0
"""Seconds that a collector has for a batch; a service that ends waits as long for its last one."""
_KINDS = {
    Kind.SERVER: trace.SpanKind.SERVER,
    Kind.CLIENT: trace.SpanKind.CLIENT,
    Kind.INTERNAL: trace.SpanKind.INTERNAL,
}


class OtelSpan:
    """A ``shared.tracing.Span``."""

    def __init__(self, span: trace.Span, context: RequestContext) -> None:
        self._span, self.context = span, context

    def name(self, name: str) -> None:
        """Call it otherwise."""
        self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""
        self._span.set_attributes(attributes)

    def fail(self, kind: str) -> None:
        """It came to nothing."""
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.StatusCode.ERROR)

    def end(self) -> None:
        """It is over."""
        self._span.end()


class OtelTracer:
    """A ``shared.tracing.Tracer``."""

    def __init__(self, endpoint: str, service: str, instance: str) -> None:
        """``endpoint``: base URL of the collector, without ``/v1/traces``. ``service``, ``instance``: who this is."""
        who = {"service.name": service, **({"service.instance.id": instance} if instance else {})}
        # What is set for all programs of a machine (OTEL_RESOURCE_ATTRIBUTES) says more, and does not say otherwise.
        self._provider = TracerProvider(resource=Resource.create(who), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=TIMEOUT)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nearshard")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, kind: Kind, within: RequestContext, attributes: Attributes) -> OtelSpan:
        """A span begins now; the first one of a trace where nobody traces it yet."""
        carrier = {TRACEPARENT: within.parent, TRACESTATE: within.state} if within.parent else {}
        parent = self._propagator.extract(carrier, Context())
        made = self._tracer.start_span(name, parent, _KINDS[kind], attributes)
        told: dict[str, str] = {}
        self._propagator.inject(told, trace.set_span_in_context(made, Context()))
        context = RequestContext(within.id, told.get(TRACEPARENT, ""), told.get(TRACESTATE, ""), within.tracer)
        return OtelSpan(made, context)

    def close(self) -> None:
        """Send what is left (blocking: for a thread)."""
        self._provider.shutdown()
