"""The files of ``cluster/deploy``: parsed, taken apart into Pods, and the schemas they are held against."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "cluster" / "deploy"
KUBERNETES = ("1.33", "1.37")
"""Releases whose schemas are asked: an old one, and the newest that the validator knows."""
SCALARS = ("string", "integer", "number", "boolean")
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
LONGEST_NAME = 47
"""Of a RayJob: KubeRay appends to it."""
Document = dict[str, Any]


def documents() -> dict[str, Document]:
    """Every Kubernetes object of the manifests by ``file: kind/name``; patches are not objects."""
    found = {}
    for path in sorted((DEPLOY / "kuberay").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if "kind" in document:
                found[f"{path.name}: {document['kind']}/{document['metadata']['name']}"] = document
    return found


def cluster_spec(document: Document) -> Document | None:
    """The ``RayClusterSpec`` in an object of KubeRay."""
    if document["kind"] == "RayCluster":
        return dict(document["spec"])
    job = job_spec(document) or {}
    return dict(job["rayClusterSpec"]) if "rayClusterSpec" in job else None


def job_spec(document: Document) -> Document | None:
    """The ``RayJobSpec`` in an object of KubeRay."""
    if document["kind"] == "RayJob":
        return dict(document["spec"])
    return dict(document["spec"]["jobTemplate"]) if document["kind"] == "RayCronJob" else None


def groups(spec: Document) -> Iterator[tuple[str, Document]]:
    """The head's group and the workers', by name."""
    yield "head", spec["headGroupSpec"]
    for group in spec.get("workerGroupSpecs", []):
        yield group["groupName"], group


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Pod templates of an object, by what they are for."""
    if document["kind"] == "CronJob":
        yield "tick", document["spec"]["jobTemplate"]["spec"]["template"]
    spec = cluster_spec(document)
    if spec:
        yield from ((name, group["template"]) for name, group in groups(spec))


def kuberay_schema(kind: str) -> Document:
    """JSON Schema of one of KubeRay's kinds that refuses fields that are not in ``kuberay_fields.yaml``."""
    tables = yaml.safe_load((ROOT / "tests" / "cluster" / "kuberay_fields.yaml").read_text())
    definitions = {}
    for table, fields in tables.items():
        definitions[table] = {
            "type": "object",
            "additionalProperties": False,
            "required": [name[:-1] for name in fields if name.endswith("!")],
            "properties": {name.rstrip("!"): _schema_of(type_, tables) for name, type_ in fields.items()},
        }
    return {"$ref": f"#/$defs/{kind}", "$defs": definitions}


def _schema_of(type_: str, tables: Document) -> Document:
    if type_.startswith("["):
        return {"type": "array", "items": _schema_of(type_[1:-1], tables)}
    if type_ in tables:
        return {"$ref": f"#/$defs/{type_}"}
    if type_ in SCALARS:
        return {"type": type_}
    if type_ == "strings":
        return {"type": "object", "additionalProperties": {"type": "string"}}
    return {} if type_ == "kubernetes" else {"enum": type_.split("|")}


def problems_of(document: Document) -> list[str]:
    """What schemas and the operator would refuse in an object; empty if nothing."""
    problems = []
    if document["apiVersion"] == "ray.io/v1":
        validator = jsonschema.Draft202012Validator(kuberay_schema(document["kind"]))
        problems += [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
        problems = problems or operator_problems(document)
    else:
        problems += kubernetes_problems(document)
    if problems:
        return problems
    for name, template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
        problems += [f"{name}: {problem}" for problem in kubernetes_problems({**pod, "spec": template["spec"]})]
    return problems


def kubernetes_problems(document: Document) -> list[str]:
    """What Kubernetes' own strict schemas refuse."""
    problems = []
    for release in KUBERNETES:
        try:
            kubernetes_validate.validate(document, release, strict=True)
        except kubernetes_validate.ValidationError as error:
            problems.append(f"{release}: {'.'.join(map(str, error.path))}: {error.message}")
    return problems


def operator_problems(document: Document) -> list[str]:
    """Rules that KubeRay 1.7 checks beyond the types of fields (its controllers' validation)."""
    name, spec, job = document["metadata"]["name"], cluster_spec(document), job_spec(document)
    problems = []
    if not DNS_LABEL.fullmatch(name) or len(name) > LONGEST_NAME:
        problems.append(f"name {name!r} is no DNS label of at most {LONGEST_NAME} characters")
    if job is not None:
        problems += list(_job_problems(job))
    if spec is not None:
        problems += list(_cluster_problems(spec))
    return problems


def _job_problems(job: Document) -> Iterator[str]:
    selects, mode = bool(job.get("clusterSelector")), job.get("submissionMode", "K8sJobMode")
    if not selects and "rayClusterSpec" not in job:
        yield "neither rayClusterSpec nor clusterSelector"
    if selects and (mode == "SidecarMode" or job.get("backoffLimit", 0) > 0):
        yield "clusterSelector goes with neither SidecarMode nor backoffLimit"
    if mode == "SidecarMode" and ("submitterPodTemplate" in job or "submitterConfig" in job):
        yield "SidecarMode has no submitter Pod to configure"
    if job.get("ttlSecondsAfterFinished", 0) > 0 and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job.get(key, 1) <= 0:
            yield f"{key} has to be positive"


def _cluster_problems(spec: Document) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode", "disabled") == "token" and "rayVersion" not in spec:
        yield "authOptions.mode token needs rayVersion"
    is_v2 = spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions", {}).get("version", "v2") == "v2"
    for name, group in groups(spec):
        start, pod = group.get("rayStartParams", {}), group["template"]["spec"]
        if not pod.get("containers"):
            yield f"{name}: no container"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & start.keys():
            yield f"{name}: resources both in rayStartParams and in resources"
        if "labels" in start:
            yield f"{name}: labels belong in the field labels"
        if not all(LABEL_VALUE.fullmatch(value) for value in group.get("labels", {}).values()):
            yield f"{name}: a label's value is no label value"
        if is_v2 and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy has to be Never with autoscaler v2"
        if not is_v2 and {"priority", "idleTimeoutSeconds"} & group.keys():
            yield f"{name}: priority and idleTimeoutSeconds are autoscaler v2's"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
            yield f"{name}: minReplicas above maxReplicas"
    options = spec.get("gcsFaultToleranceOptions", {})
    if options.get("backend") == "rocksdb" and any(key.startswith("redis") for key in options):
        yield "rocksdb takes no settings of redis"
    if options.get("backend", "redis") == "redis" and "storage" in options:
        yield "storage is rocksdb's"


def merge_patch(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386), as ``kubectl patch --type merge`` applies it."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def pinned(package: str) -> str:
    """Version of ``package`` in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
