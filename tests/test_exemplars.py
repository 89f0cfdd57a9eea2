"""Exemplars of query durations: where OpenMetrics allows them, in its words, and found by their traces."""

from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from sidecar.events import Operation
from sidecar.observe.exposition import Format, exemplar
from sidecar.work import Statement, Trace
from tests.metrics_page import IDLE, Page

TRACE = Trace("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
OTHER = Trace("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


def execute(
    page: Page,
    took: float,
    trace: Trace = TRACE,
    operation: Operation = Operation.SELECT,
    pool: str = "main",
) -> None:
    recorder = page.recorder.pool(pool)
    shared = recorder.statement("a", "SELECT ?", int(operation))
    recorder.query_done(Statement("a", "SELECT ?", int(operation), shared, trace), took)


def exemplars(page: Page) -> dict[tuple[str, str, str], tuple[dict[str, str], float]]:
    """Of all samples, as the library reads them: labels and value, by pool, operation and le."""
    found = {}
    text = page.metrics.render(Format.OPENMETRICS)
    for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
        for sample in family.samples:
            if sample.exemplar:
                assert sample.name == "pgsidecar_query_duration_seconds_bucket"
                key = sample.labels["pool"], sample.labels["operation"], sample.labels["le"]
                assert sample.exemplar.timestamp is not None
                found[key] = sample.exemplar.labels, sample.exemplar.value
    return found


def labels(trace: Trace) -> dict[str, str]:
    return {"trace_id": trace.trace_id, "span_id": trace.span_id}


def test_an_execution_with_a_trace_is_the_exemplar_of_its_bucket():
    page = Page(IDLE, replace(IDLE, name="second"))
    execute(page, 0.0012)
    execute(page, 70.0, OTHER, Operation.COPY)
    execute(page, 0.0001, OTHER, Operation.OTHER, "second")

    assert exemplars(page) == {
        ("main", "select", "0.0015"): (labels(TRACE), 0.0012),
        ("main", "copy", "+Inf"): (labels(OTHER), 70.0),
        ("second", "other", "0.0001"): (labels(OTHER), 0.0001),
    }


def test_the_last_one_of_a_bucket_stays():
    page = Page()
    execute(page, 0.0012)
    execute(page, 0.0011, OTHER)

    assert exemplars(page) == {("main", "select", "0.0015"): (labels(OTHER), 0.0011)}


def test_a_query_without_a_trace_leaves_none():
    page = Page()
    page.call("a")
    assert exemplars(page) == {}
    assert " # {" not in page.metrics.render(Format.OPENMETRICS)


def test_the_text_format_has_none():
    """Its parsers take what follows a number for a timestamp."""
    page = Page()
    execute(page, 0.0012)
    page.samples(Format.TEXT)
    assert " # {" not in page.metrics.render(Format.TEXT)


@pytest.mark.parametrize(("length", "is_written"), [(128, True), (129, False)])
def test_labels_of_more_than_128_characters_are_left_out(length, is_written):
    """A page with them would be refused as a whole."""
    written = exemplar({"trace_id": "x" * (length - 8)}, 0.5, 1.0)
    assert bool(written) == is_written


def test_what_a_client_wrote_cannot_break_the_line():
    """Whoever makes a Trace sees to it that it is hexadecimal; this is the second door."""
    assert exemplar({"trace_id": '"\n\\'}, 0.5, 1.0) == ' # {trace_id="\\"\\n\\\\"} 0.5 1.000'
