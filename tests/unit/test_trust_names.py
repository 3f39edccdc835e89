from __future__ import annotations

import pytest

from shared.trust_names import TIMESTAMP, file_name, org_of, parse_file_name, private_role, public_role, target_path


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "access", public_role("acme"), private_role("a.b-c")])
def test_a_file_is_of_one_version_of_one_role(role: str) -> None:
    assert parse_file_name(file_name(role, 12)) == (role, 12)


def test_only_the_timestamp_has_no_version() -> None:
    assert parse_file_name(file_name(TIMESTAMP, 7)) == (TIMESTAMP, 0)


@pytest.mark.parametrize(
    "name",
    ["", "root.json", "0.root.json", "01.root.json", "1.root", "1..json", "1.~public.json", "1.acme~both.json",
     "../1.root.json", "1.a/b.json", "1.Root.json", "1.root.json\n", "9999999999.root.json", "3.timestamp.json"],
)  # fmt: skip
def test_what_is_no_metadata_is_none(name: str) -> None:
    assert parse_file_name(name) is None


def test_a_ref_is_a_target_below_its_organisation() -> None:
    assert target_path("acme/minilm", "main") == "acme/minilm/main"
    assert org_of("acme/minilm") == "acme"
