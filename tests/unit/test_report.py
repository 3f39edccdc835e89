"""What is made of nodes' usage: every byte is in it once, words are right, and nothing from afar is markup."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearshard.report.page import page
from nearshard.report.sums import (
    NodeUsage,
    Report,
    Silent,
    all_days,
    as_document,
    build,
    parse_price,
    parse_since,
    percent,
    seconds_text,
    sentences,
    size_text,
    table,
)
from shared.errors import RequestError
from shared.usage import NO_MODEL, PRIVATE, Usage, total
from tests.unit.strategies import few
from tests.unit.test_usage import usages

SINCE, UNTIL = "2026-01-30", "2026-02-02"
names = st.sampled_from(["acme/a", "acme/b", NO_MODEL, PRIVATE])
nodes = st.lists(
    st.builds(
        NodeUsage,
        st.sampled_from(["n1", "n2"]),
        st.sampled_from(["north", "south"]),
        st.dictionaries(
            st.sampled_from(["2026-01-29", *all_days(SINCE, UNTIL), "2026-02-03"]), st.dictionaries(names, usages)
        ),
    ),
    max_size=4,
)


@settings(few, max_examples=10)
@given(nodes)
def test_all_ways_to_add_up_give_the_same(given_: list[NodeUsage]) -> None:
    report = build(given_, [], SINCE, UNTIL, parse_price("2/GB"))
    inside = total(
        usage
        for one in given_
        for day, models in one.days.items()
        if SINCE <= day <= UNTIL
        for usage in models.values()
    )
    for sums in (report.sites, report.models, report.days()):
        assert total(sums.values()) == report.whole == inside
    for site in report.sites:
        assert total(report.days(site).values()) == report.sites[site]
    rows = list(csv.DictReader(io.StringIO(table(report))))
    assert sum(int(row["served_bytes"]) for row in rows) == inside.served
    assert sum(int(row["spared_bytes"]) for row in rows) == inside.spared
    assert abs(sum(Decimal(row["money_saved"]) for row in rows) - Decimal(2) * inside.spared / 10**9) < 1
    document = as_document(report)
    assert json.loads(json.dumps(document)) == document
    well_formed(page(report))


def well_formed(html: str) -> ElementTree.Element:
    """The page's body, if it is well-formed XML too, and asks for nothing from elsewhere."""
    assert "http" not in html.replace("http://10.0.0.1", "") and "<script" not in html
    return ElementTree.fromstring(html[html.index("<body>") : html.index("</html>")])


def report(price: str = "$0.50/GB", **more: Usage) -> Report:
    given_ = [NodeUsage(f"{site}-1", site, {UNTIL: {"acme/a": usage}}) for site, usage in more.items()]
    return build(given_, [], SINCE, UNTIL, parse_price(price) if price else None)


def test_sentences_say_what_was_saved_and_who_is_missing() -> None:
    usage = Usage(served=10 * 10**9, link=10**9, saved=5 * 10**6, requests=1000, hits=900)
    usage.ready[6] = 10
    made = build(
        [NodeUsage("n1", "north", {SINCE: {"acme/a": usage}})],
        [Silent("s1", "south", "<b>no answer</b> from http://10.0.0.1")],
        SINCE, UNTIL, parse_price("0.50 EUR/GB"),
    )  # fmt: skip
    text = " ".join(sentences(made))
    assert "From 2026-01-30 to 2026-02-02 (4 days), 1 site with 1 node served 10.0 GB" in text
    assert "9.00 GB of it (90 %) did not cross a link: at 0.50 EUR/GB that saved EUR 4.50." in text
    assert "90 % of 1,000 requests" in text and "No request failed." in text
    assert "5.00 MB more would have crossed" in text
    assert "1 node did not answer; what was served there is missing here: s1 (south)." in text
    html = page(made)
    assert "<b>no answer" not in html and "s1 (south): &lt;b&gt;no answer" in html
    body = "".join(well_formed(html).itertext())
    assert "EUR 4.50" in body and "90 %" in body


def test_what_was_brought_ahead_is_no_saving_and_nothing_is_nothing() -> None:
    ahead = report(north=Usage(link=3 * 10**9))
    assert "3.00 GB more than was served" in " ".join(sentences(ahead))
    assert "At $0.50/GB that cost $1.50." in " ".join(sentences(ahead))
    assert "-$1.50" in page(ahead)
    assert sentences(report(price="")) == ["From 2026-01-30 to 2026-02-02 (4 days), nothing was served."]
    assert "Saved</th>" not in page(report(price="", north=Usage(served=5, requests=1)))


def test_many_models_are_in_the_table_by_size_and_all_in_the_csv() -> None:
    models = {f"acme/m{number}": Usage(served=number) for number in range(1, 61)}
    made = build([NodeUsage("n1", "north", {SINCE: models})], [], SINCE, UNTIL, None)
    html = page(made)
    assert "10 more models" in html and "acme/m60<" in html and "acme/m10<" not in html
    assert len(table(made).splitlines()) == 61


@pytest.mark.parametrize(("text", "first"), [("1d", "2026-03-01"), ("30d", "2026-01-31"), ("2026-02-28", "2026-02-28")])
def test_since(text: str, first: str) -> None:
    assert parse_since(text, "2026-03-01") == first


@pytest.mark.parametrize(
    "text", ["", "0d", "401d", "d", "-1d", "2026-02-30", "2026-3-1", "2026-03-02", "2020-01-01", "٣d"]
)
def test_since_when_there_is_nothing(text: str) -> None:
    with pytest.raises(RequestError):
        parse_since(text, "2026-03-01")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("0.08/GB", "0.08"), ("$80/TB", "$0.08"), ("0.08 EUR/GB", "EUR 0.08"), ("¥1/GiB", "¥0.93"), ("0/GB", "0.00")],
)
def test_a_price(text: str, shown: str) -> None:
    assert parse_price(text).show(10**9) == shown


@pytest.mark.parametrize("text", ["", "8", "0.08", "-1/GB", "1/Gb", "1/GB/s", "nan/GB", "1e9/GB", "1,5/GB"])
def test_no_price(text: str) -> None:
    with pytest.raises(RequestError):
        parse_price(text)


def test_numbers_for_people() -> None:
    sizes = [0, 1, 999, 1000, 999_499, 999_600, 12_345_678, 10**12, -5_000]
    shown = ["0 bytes", "1 bytes", "999 bytes", "1.00 kB", "999 kB", "1.00 MB", "12.3 MB", "1.00 TB", "-5.00 kB"]
    assert [size_text(size) for size in sizes] == shown
    assert [percent(1, 3), percent(9999, 10_000), percent(1, 1), percent(0, 0)] == ["33 %", "99.9 %", "100.0 %", "-"]
    assert [seconds_text(s) for s in (None, 0.001, 0.25, 12.0, 1000.0)] == [
        "-",
        "0.01 s",
        "0.2 s",
        "12 s",
        "over 1,000 s",
    ]
