"""The signed metadata over HTTP: what an origin serves, and what The Update Framework's own client makes of it."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import Updater

from shared import trust_chain
from tests.harness import Lab, Service, command, get_json, make_model


@pytest.fixture
def origin(lab: Lab) -> Service:
    """An origin with one model."""
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    return lab.origin()


def updater(lab: Lab, origin: Service, name: str = "client") -> Updater:
    """A client of The Update Framework that trusts the lab's root. It keeps its state between calls."""
    folder = lab.folder / name
    folder.mkdir(exist_ok=True)
    return Updater(
        str(folder), f"{origin.url}/trust/", str(folder), f"{origin.url}/", bootstrap=lab.trust_root.read_bytes()
    )


def get(url: str, **fields: str) -> tuple[int, dict[str, str], bytes]:
    """Status, header fields and body of a GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=fields), timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def head(url: str, **fields: str) -> tuple[int, dict[str, str]]:
    """Status and header fields of a GET."""
    return get(url, **fields)[:2]


def test_a_ref_is_a_target_whose_hash_is_its_manifest(lab: Lab, origin: Service) -> None:
    target = updater(lab, origin).get_targetinfo("acme/tiny/main")
    assert target is not None
    with urllib.request.urlopen(f"{origin.url}/models/acme/tiny/manifests/main", timeout=10) as answer:
        body = answer.read()
    assert target.hashes == {"sha256": hashlib.sha256(body).hexdigest()} and target.length == len(body)
    refs = get_json(f"{origin.url}/models/acme/tiny")["refs"]
    assert refs["main"]["published"] == target.custom["published"]
    with pytest.raises(DownloadHTTPError) as caught:  # if it were in the private role, this would be nobody's business
        updater(lab, origin).get_targetinfo("acme/tiny/v2")
    assert caught.value.status_code == 401
    assert updater(lab, origin).get_targetinfo("other/tiny/main") is None


def test_the_timestamp_is_revalidated_and_the_rest_is_for_ever(lab: Lab, origin: Service) -> None:
    status, fields = head(f"{origin.url}/trust/timestamp.json")
    assert status == 200 and "no-cache" in fields["Cache-Control"] and fields["Content-Type"] == "application/json"
    assert head(f"{origin.url}/trust/timestamp.json", **{"If-None-Match": fields["ETag"]})[0] == 304
    status, fields = head(f"{origin.url}/trust/1.root.json")
    assert status == 200 and "immutable" in fields["Cache-Control"]
    lab.publish(lab.folder / "model", "acme/tiny", "--ref", "v2")
    again, changed = head(f"{origin.url}/trust/timestamp.json", **{"If-None-Match": fields["ETag"]})
    assert again == 200 and changed["ETag"] != fields["ETag"]
    assert updater(lab, origin).get_targetinfo("acme/tiny/v2") is not None


def test_every_tier_gives_all_of_it_in_one_answer_to_who_takes_that(lab: Lab, origin: Service) -> None:
    router = lab.router(origin)
    edge = lab.edge(origin, router=router, node="n0", region="default")
    for service in (origin, edge, router):
        url = f"{service.url}/trust/timestamp.json?root=1&org=acme"
        status, fields, body = get(url, Accept=trust_chain.MEDIA_TYPE)
        files = trust_chain.decode(body)
        roles = [name.partition(".")[2].removesuffix(".json") for name in files][1:]
        assert status == 200 and fields["Content-Type"] == trust_chain.MEDIA_TYPE and fields["Vary"] == "Accept"
        assert roles == ["root", "snapshot", "targets", "access", "acme~public"]
        assert files.pop("2.root.json") is None
        assert all(get(f"{service.url}/trust/{name}")[2] == data for name, data in files.items())
        assert get(url, Accept=trust_chain.MEDIA_TYPE, **{"If-None-Match": fields["ETag"]})[0] == 304
        assert get(url, Accept="*/*")[1]["Content-Type"] == "application/json", "who does not ask for it gets the file"
    for query in ("root=-1", "root=1e3", "root=9999999999", "org=..", "org=ACME", "root=%d9%a1"):
        assert get(f"{origin.url}/trust/timestamp.json?{query}", Accept=trust_chain.MEDIA_TYPE)[0] == 400, query
    assert len(trust_chain.decode(get(f"{origin.url}/trust/timestamp.json", Accept=trust_chain.MEDIA_TYPE)[2])) == 4


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("9.root.json", "unknown_metadata"),
        ("root.json", "unknown_metadata"),
        ("01.root.json", "unknown_metadata"),
        (".lock", "unknown_metadata"),
        ("timestamp.json.bak", "unknown_metadata"),
        ("..%2f1.root.json", "bad_id"),
        ("", "bad_id"),
    ],
)
def test_nothing_but_metadata_is_served_there(lab: Lab, origin: Service, name: str, code: str) -> None:
    try:
        urllib.request.urlopen(f"{origin.url}/trust/{name}", timeout=10)
    except urllib.error.HTTPError as error:
        document = json.loads(error.read())
        assert document["code"] == code and error.code == document["status"]
    else:
        pytest.fail("it was served")


def test_without_metadata_the_origin_says_so(lab: Lab) -> None:
    empty = lab.folder / "empty"
    origin = lab.service("origin", "--store", str(empty))
    assert head(f"{origin.url}/shards/acme/tiny")[0] == 503
    keys = lab.folder / "other-keys"
    made = command("trust", "init", "--store", str(empty), "--keys", str(keys), "--org", "acme", "--json")
    root = Path(json.loads(made.stdout)["root"])
    assert json.loads(made.stdout)["fingerprint"] == hashlib.sha256(root.read_bytes()).hexdigest()
    assert head(f"{origin.url}/shards/acme/tiny")[0] == 404
    assert {path.stat().st_mode & 0o777 for path in keys.glob("*.pem")} == {0o600}
    again = command("trust", "init", "--store", str(empty), "--keys", str(keys), check=False)
    assert again.returncode == 3 and "already" in again.stderr
