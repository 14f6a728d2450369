"""docker/dask-cluster.yaml: the operator's schema, Dask's own parsers, and the image that it names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import ROOT, command_lines

MANIFEST = ROOT / "docker" / "dask-cluster.yaml"
_CRD = Path("operator/deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    return loaded


def containers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The only container of worker and scheduler."""
    out = {}
    for role in ("worker", "scheduler"):
        (out[role],) = cluster["spec"][role]["spec"]["containers"]
    return out


def problems(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Fields that a Kubernetes schema does not know or requires, and values of another type."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{path}: neither number nor text"]
    kind = schema.get("type", "object")
    if not isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        return [f"{path}: expected {kind}"]
    if kind == "array":
        return [p for n, item in enumerate(value) for p in problems(item, schema["items"], f"{path}[{n}]")]
    if kind != "object":
        expected = schema.get("enum")
        return [f"{path}: expected one of {expected}"] if expected and value not in expected else []
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    out = [f"{path}.{name}: missing" for name in schema.get("required", []) if name not in value]
    for name, item in value.items():
        if name in known:
            out += problems(item, known[name], f"{path}.{name}")
        elif isinstance(others, dict):
            out += problems(item, others, f"{path}.{name}")
        elif not others and not schema.get("x-kubernetes-preserve-unknown-fields") and known:
            out.append(f"{path}.{name}: unknown")
    return out


def test_manifest_follows_the_schema_of_the_operator(cluster: dict[str, Any]) -> None:
    found = importlib.util.find_spec("dask_kubernetes")
    if found is None or found.origin is None:
        pytest.skip("needs the package dask-kubernetes, whose files include the schema")
    crd = yaml.load((Path(found.origin).parent / _CRD).read_text(), Loader=yaml.CSafeLoader)
    group, version = cluster["apiVersion"].split("/")
    assert (crd["spec"]["group"], crd["spec"]["names"]["kind"]) == (group, cluster["kind"])
    (schema,) = [
        v["schema"]["openAPIV3Schema"]
        for v in crd["spec"]["versions"]
        if v["name"] == version and v["served"]
    ]
    spec = schema["properties"]["spec"]
    assert problems(cluster["spec"], spec) == []
    wrong = {**cluster["spec"]["worker"], "replicsa": 8, "replicas": "8"}
    assert problems({**cluster["spec"], "worker": wrong}, spec) == [
        ".worker.replicas: expected integer",
        ".worker.replicsa: unknown",
    ]


def test_commands_are_taken_by_dasks_parsers(cluster: dict[str, Any]) -> None:
    pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    from distributed.cli import dask_scheduler, dask_worker

    for role, command in (("worker", dask_worker.main), ("scheduler", dask_scheduler.main)):
        found = containers(cluster)[role]
        assert found["command"] == ["dask"]
        assert found["args"][0] == role
        context = command.make_context(f"dask {role}", found["args"][1:])
        if role == "worker":
            assert context.params["nthreads"] == 1
            assert found["args"][1] == "--name=$(DASK_WORKER_NAME)"  # by which the operator knows it


def test_image_is_that_of_the_page_and_has_dask(cluster: dict[str, Any]) -> None:
    images = {container["image"] for container in containers(cluster).values()}
    pushed = {
        line.split()[-1]
        for line in command_lines(ROOT / "docs" / "clusters.md")
        if line.startswith("docker push") and "precompute" in line
    }
    assert images == pushed
    install = (ROOT / "docker" / "install.sh").read_text()
    extras = re.search(r"precompute\) extras=\(([^)]*)\)", install)
    assert extras is not None
    assert {"beam", "dask", "gcs", "s3"} <= set(extras[1].split())
    dockerfile = (ROOT / "docker" / "precompute.Dockerfile").read_text()
    assert "PATH=/opt/venv/bin:$PATH" in dockerfile  # where `dask` is
    (mount,) = containers(cluster)["worker"]["volumeMounts"]
    assert f"VIEW_DISTILL_CACHE={mount['mountPath']}\n" in dockerfile
    assert mount["name"] in {volume["name"] for volume in cluster["spec"]["worker"]["spec"]["volumes"]}


def test_service_selects_the_scheduler_and_is_the_one_of_the_page(cluster: dict[str, Any]) -> None:
    name = cluster["metadata"]["name"]
    service = cluster["spec"]["scheduler"]["service"]
    assert service["selector"] == {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    ports = {port["name"]: port["containerPort"] for port in containers(cluster)["scheduler"]["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports
    commands = command_lines(ROOT / "docs" / "clusters.md")
    (forward,) = [line.split() for line in commands if line.startswith("kubectl port-forward")]
    assert forward[2:] == [f"service/{name}-scheduler", f"{ports['tcp-comm']}:{ports['tcp-comm']}"]
    assert any(f"--dask_client_address=tcp://127.0.0.1:{ports['tcp-comm']}" in line for line in commands)
    for line in commands:
        if line.startswith("kubectl") and "--filename=" in line:
            assert (ROOT / line.rpartition("=")[2]).samefile(MANIFEST)
