"""What the services answer is what their OpenAPI documents say: asked by Schemathesis, over real sockets.

It takes each service's own document, and calls each operation with the examples and with values made up within and
beyond the schemas. Nothing may be a 500; statuses, fields, media types and bodies must be as described; what breaks a
schema must be refused. The long run has HEAD as well, each value at its limits, and more that is made up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from origin.keyring import load_ring
from shared.enrolment import SIGNATURE_FIELD
from shared.federated import PART_TYPE
from shared.publishing import PREFIX, SCHEME, Opening, make_opening
from tests.harness import Lab, Service, get_json, make_model, wait_nodes

MODEL = "demo/minilm"
"""As the examples of the documents have it."""
SEED = 1
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
)
SHARED = ("--exclude-tag=read", "--exclude-tag=operate", "--exclude-tag=other hubs' clients")
QUICK = ("--phases=examples,fuzzing", "--max-examples=1", "--exclude-method=HEAD")
LONG = ("--phases=examples,coverage,fuzzing", "--max-examples=40")


class Network(NamedTuple):
    """A tier each, with the model of the examples, and what opens all of it."""

    origin: Service
    router: Service
    edge: Service
    token: str
    session: str


@pytest.fixture(scope="module")
def network(shared_lab: Lab) -> Network:
    """One for all tests here: what they change, the next one does not rely on."""
    lab = shared_lab
    make_model(lab.folder / "model", width=32)
    (lab.folder / "model" / "tokenizer.json").write_text('{"version": "1.0"}\n')  # as it is sent as JSON
    lab.publish(lab.folder / "model", MODEL)
    origin = lab.origin()
    router = lab.router(origin)
    edge = lab.edge(origin, router=router, region="berlin")
    wait_nodes(router, 1)
    token = lab.token("*/*:read", "*/*:admin", "*/*:enroll", "*/*:publish")
    return Network(origin, router, edge, token, session_of(lab, origin))


def session_of(lab: Lab, origin: Service) -> str:
    """A publishing session."""
    key = load_ring([lab.keys]).anybody
    assert key is not None
    at = f"{origin.url}{PREFIX}/{MODEL}"
    body, signature = make_opening(Opening(MODEL, get_json(f"{at}/nonce")["nonce"], key.public, False), key)
    request = urllib.request.Request(f"{at}/session", body, {SIGNATURE_FIELD: signature}, method="POST")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.loads(answer.read())["session"])


def ask(network: Network, service: Service, folder: Path, words: Sequence[str], timeout: float) -> None:
    """Let Schemathesis ask a service, which must answer as it says."""
    (folder / "kinds.py").write_text(
        "import schemathesis\nfrom hypothesis import strategies as st\n"
        f'schemathesis.openapi.media_type("{PART_TYPE}", st.binary())\n'
    )
    config = folder / "schemathesis.toml"
    config.write_text(
        'hooks = "kinds"\n'
        f'headers = {{ Authorization = "Bearer {network.token}" }}\n'
        'cache.enabled = false\n[generation]\ndatabase = "none"\nwith-security-parameters = false\n'
        f'[[operations]]\ninclude-path-regex = "^{PREFIX}/"\n'
        f'headers = {{ Authorization = "{SCHEME} {network.session}" }}\n'
    )
    command = [
        *(str(Path(sys.executable).with_name("st")), f"--config-file={config}", "run", f"{service.url}/openapi.json"),
        *(f"--checks={','.join(CHECKS)}", f"--seed={SEED}", "--max-redirects=0", "--continue-on-failure"),
        *("--suppress-health-check=all", "--warnings=off", "--no-color", *words),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " generated, " in done.stdout, done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("tier", "words"),
    [
        ("edge", ()),
        pytest.param("origin", SHARED, id="origin-what-it-alone-has"),
        pytest.param("router", SHARED[2:], id="router-without-what-is-as-at-the-edge"),
    ],
)
def test_a_service_answers_as_its_document_says(
    network: Network, tmp_path: Path, tier: str, words: Sequence[str]
) -> None:
    ask(network, getattr(network, tier), tmp_path, (*QUICK, *words), 240)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tier", ["origin", "router", "edge"])
def test_a_service_answers_all_of_it_as_its_document_says(network: Network, tmp_path: Path, tier: str) -> None:
    service = getattr(network, tier)
    ask(network, service, tmp_path, (*LONG, "--exclude-operation-id=setLink"), 600)
    if tier == "edge":  # at last: with a rate of a byte a second, or of none now, whoever reads waits
        ask(network, service, tmp_path, (*LONG, "--include-operation-id=setLink"), 200)
