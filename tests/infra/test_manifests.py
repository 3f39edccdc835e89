"""What is in infra/, as far as it can be checked where there is neither a container engine nor a cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shared.metrics import Metrics

INFRA = Path(__file__).parents[2] / "infra"
KUBERNETES = INFRA / "kubernetes" / "base"
KUBERNETES_VERSION = "1.33"
PODS = {"Deployment", "StatefulSet", "DaemonSet"}


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def manifests() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(file for file in KUBERNETES.glob("*.yaml") if file.name != "kustomization.yaml")
    return [(f"{file.name}: {one['kind']} {one['metadata']['name']}", one) for file in files for one in documents(file)]


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [(name, one["spec"]["template"]["spec"]) for name, one in manifests() if one["kind"] in PODS]


@pytest.mark.parametrize(("name", "manifest"), manifests(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_manifest_is_as_its_schema_says(name: str, manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


def test_a_field_that_does_not_exist_would_be_found() -> None:
    _, manifest = next(item for item in manifests() if item[1]["kind"] == "StatefulSet")
    manifest["spec"]["replica"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_pod_takes_no_more_than_it_needs(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert not container["image"].endswith(":latest")
    for container in pod["containers"]:
        assert {"livenessProbe", "readinessProbe"} <= container.keys()
        ports = {port["name"] for port in container["ports"]}
        for probe in ("livenessProbe", "readinessProbe"):
            way = container[probe].get("httpGet") or container[probe]["tcpSocket"]
            assert way["port"] in ports
        claimed = {"store", "cache"}  # of volumeClaimTemplates
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes | claimed


def test_all_that_a_service_selects_is_there_and_all_traffic_has_a_policy() -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for _, one in manifests() if one["kind"] in PODS]
    for name, one in manifests():
        if one["kind"] == "Service":
            assert any(one["spec"]["selector"].items() <= pod.items() for pod in labels), name
    allowed = {
        one["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
        for _, one in manifests()
        if one["kind"] == "NetworkPolicy"
    }
    assert {pod["app.kubernetes.io/name"] for pod in labels} <= allowed
    assert None in allowed  # what applies to every pod: nothing, and names


def test_kustomize_puts_it_together() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert len(built) == len(manifests()) + 1  # and the script, as a config map
    assert {one["metadata"].get("namespace") for one in built if one["kind"] != "Namespace"} == {"nearshard"}


def test_all_files_of_the_kustomization_are_there() -> None:
    (kustomization,) = documents(KUBERNETES / "kustomization.yaml")
    listed = set(kustomization["resources"])
    assert listed == {file.name for file in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    for made in kustomization["configMapGenerator"]:
        assert all((KUBERNETES / item.partition("=")[2]).is_file() for item in made["files"])


def test_compose_names_nothing_that_is_not_there() -> None:
    (compose,) = documents(INFRA / "compose" / "compose.yaml")
    assert compose["services"].keys() >= {"network", "redis", "origin", "router-1", "router-2"}
    named = set()
    for name, service in compose["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"]
        assert set(service.get("depends_on", ())) <= compose["services"].keys()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        named |= {volume.partition(":")[0] for volume in service["volumes"]}
        own = [volume for volume in service["volumes"] if volume.partition(":")[2] == "/etc/nearshard:ro"]
        if name not in ("network", "publish"):  # nobody has another one's keys
            assert own == [f"{name}-etc:/etc/nearshard:ro"]
            assert "offline" not in {volume.partition(":")[0] for volume in service["volumes"]}
    assert named == compose["volumes"].keys()


def test_compose_reads_it() -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not here")
    file = INFRA / "compose" / "compose.yaml"
    done = subprocess.run(
        ["docker-compose", "-f", str(file), "config", "--quiet"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_image_runs_as_nobody_and_copies_only_what_it_needs() -> None:
    text = (INFRA / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith(("#", " "))]
    verbs = [verb for verb, _ in words]
    assert [rest for verb, rest in words if verb == "USER"][-1] == "10001:10001"
    assert "ADD" not in verbs
    assert not any("latest" in rest or ":" not in rest.split()[0] for verb, rest in words if verb == "FROM")
    assert verbs.index("USER") < verbs.index("ENTRYPOINT")
    assert words[verbs.index("ENTRYPOINT")][1].startswith("[")  # else no signal reaches it
    assert not any("curl" in rest or "sudo" in rest or "apt-get" in rest for verb, rest in words if verb == "RUN")
    ignored = (INFRA.parent / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for verb, rest in words:
        if verb == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (INFRA.parent / source).exists()
                assert f"!{source}" in ignored


def expressions() -> Iterator[str]:
    (rules,) = documents(INFRA / "prometheus" / "nearshard.rules.yml")
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    board = json.loads((INFRA / "grafana" / "nearshard.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def test_rules_and_dashboard_ask_for_metrics_that_there_are() -> None:
    there = {
        f"{metric.name}{suffix}" for metric in Metrics().registry.collect() for suffix in ("", "_total", "_bucket")
    }
    asked = {name for text in expressions() for name in re.findall(r"(?<![:\w])nearshard_\w+", text)}
    assert asked
    assert asked <= there


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    (rules,) = documents(INFRA / "prometheus" / "nearshard.rules.yml")
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(alerts) > 10
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize("words", ["check rules nearshard.rules.yml", "test rules nearshard.test.yml",
                                   "check config --syntax-only prometheus.yml"])  # fmt: skip
def test_promtool_accepts_the_rules(words: str, need: Callable[[str], str]) -> None:
    done = subprocess.run(
        [need("promtool"), *words.split()], cwd=INFRA / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", ["origin", "router", "edge"])
def test_systemd_accepts_the_units_and_finds_them_harmless(service: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not here")
    unit = INFRA / "systemd" / f"nearshard-{service}.service"
    here = tmp_path / unit.name  # the program and the user of a machine that has it installed
    text = unit.read_text().replace("/opt/nearshard/bin/nearshard", "/bin/true")
    here.write_text(re.sub(r"^(User|Group)=.*$", r"\1=root", text, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(here)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=15", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stdout[-300:]


def test_nginx_accepts_its_files(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not here")
    name = "models.acme.example"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    text = (INFRA / "nginx" / "nearshard.conf").read_text().replace("/etc/nginx/tls", str(tmp_path))
    text = text.replace("/etc/nginx/nearshard-proxy.conf", str(INFRA / "nginx" / "nearshard-proxy.conf"))
    whole = tmp_path / "nginx.conf"
    whole.write_text(f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ {text} }}")
    done = subprocess.run(
        [nginx, "-t", "-p", str(tmp_path), "-c", str(whole)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
