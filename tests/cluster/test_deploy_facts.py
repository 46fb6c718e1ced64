"""What the deploy files say of each other, of constraints.txt and of the rules that every cluster here keeps."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, Document, cluster_spec, documents, groups, job_spec, pinned, pod_templates

DOCUMENTS = documents()
CLUSTERS = {name: spec for name, document in DOCUMENTS.items() if (spec := cluster_spec(document))}
CONTAINERS = {
    f"{name}, {pod}": container
    for name, document in DOCUMENTS.items()
    for pod, template in pod_templates(document)
    for container in template["spec"]["containers"]
}
TEXTS = {str(path.relative_to(DEPLOY)): path.read_text() for path in sorted(DEPLOY.rglob("*")) if path.is_file()}
PLACEHOLDER = "REPLACE_ME"


def test_image_is_the_same_everywhere() -> None:
    built = re.search(r"docker build .* -t (\S+) ", TEXTS["Dockerfile"])
    assert built is not None
    assert {container["image"] for container in CONTAINERS.values()} == {built[1]}
    assert not built[1].endswith(":latest")


def test_ray_versions_are_the_pinned_one() -> None:
    ray, torch = pinned("ray"), pinned("torch")
    assert {spec["rayVersion"] for spec in CLUSTERS.values()} == {ray}
    launcher = TEXTS["ray-up/aws.yaml"]
    assert re.findall(r"ray\[default\]==([\d.]+)", launcher) == [ray]
    assert re.findall(r"torch==([\d.]+)", launcher) == [torch]
    # pip takes both from constraints.txt in the image; its comment names what was not taken.
    assert re.findall(r"rayproject/ray:([\d.]+)-py311", TEXTS["Dockerfile"]) == [ray]


def missing_references(objects: list[Document]) -> set[str]:
    """``Kind/name`` of what Pods name and no object defines; what KubeRay makes is defined too."""
    defined = {f"{item['kind']}/{item['metadata']['name']}" for item in objects}
    named = set()
    for item in objects:
        for _, template in pod_templates(item):
            named.add(f"ServiceAccount/{template['spec']['serviceAccountName']}")
            for container in template["spec"]["containers"]:
                for source in container["envFrom"]:
                    kind = "Secret" if "secretRef" in source else "ConfigMap"
                    named.add(f"{kind}/{next(iter(source.values()))['name']}")
    return named - defined


def test_what_pods_name_is_defined() -> None:
    objects = list(DOCUMENTS.values())
    assert missing_references(objects) == set()
    without = [item for item in objects if item["kind"] not in ("Secret", "ServiceAccount", "ConfigMap")]
    assert missing_references(without) == {
        "ServiceAccount/pmaflow", "ServiceAccount/pmaflow-head",
        "ConfigMap/pmaflow-environment", "Secret/pmaflow-s3", "Secret/pmaflow-mlflow",
    }  # fmt: skip


def test_all_objects_lie_in_one_namespace() -> None:
    namespaces = {item["metadata"]["name"] for item in DOCUMENTS.values() if item["kind"] == "Namespace"}
    assert {item["metadata"].get("namespace") for item in DOCUMENTS.values()} - {None} == namespaces
    assert all("namespace" in item["metadata"] for item in DOCUMENTS.values() if item["kind"] != "Namespace")


def unbounded(container: Document) -> list[str]:
    """What a container lacks of: memory requested and limited alike, processors requested."""
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    faults = [] if requests.get("memory") and requests.get("memory") == limits.get("memory") else ["memory"]
    return faults + ([] if requests.get("cpu") else ["cpu"])


@pytest.mark.parametrize("name", CONTAINERS)
def test_container_is_bounded_and_unprivileged(name: str) -> None:
    container = CONTAINERS[name]
    assert unbounded(container) == []
    security = container["securityContext"]
    assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    spoilt = copy.deepcopy(container)
    del spoilt["resources"]["limits"]
    assert unbounded(spoilt) == ["memory"]


def test_pods_do_not_run_as_root_and_workers_hold_no_kubernetes_token() -> None:
    for document in DOCUMENTS.values():
        for pod, template in pod_templates(document):
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True
            assert template["spec"]["terminationGracePeriodSeconds"] > int(settings()["RAY_JOB_STOP_WAIT_TIME_S"])
            assert (pod == "head") is template["spec"].get("automountServiceAccountToken", True)


def settings() -> dict[str, str]:
    return dict(DOCUMENTS["access.yaml: ConfigMap/pmaflow-environment"]["data"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_keeps_the_rules(name: str) -> None:
    spec = CLUSTERS[name]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert unbounded({"resources": spec["autoscalerOptions"]["resources"]}) == []
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {pool: group["labels"] for pool, group in groups(spec)} == {pool: {"pool": pool} for pool, _ in groups(spec)}
    for pool, group in groups(spec):
        assert group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == pool
        assert int(group["rayStartParams"]["object-store-memory"]) >= 75 << 20


def test_train_group_holds_the_workers_of_the_config_and_the_driver() -> None:
    config = yaml.safe_load((DEPLOY.parent.parent / "configs" / "moe-0.7b-7b.yaml").read_text())
    train = dict(groups(CLUSTERS["rayjob-pretrain.yaml: RayJob/pretrain"]))["train"]
    processors = int(train["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert processors * train["maxReplicas"] > config["training"]["num_workers"]
    launcher = yaml.safe_load(TEXTS["ray-up/aws.yaml"])["available_node_types"]["train"]
    assert launcher["resources"]["CPU"] * launcher["max_workers"] > config["training"]["num_workers"]
    nodes, each = (re.search(rf"--{key}=(\d+)", TEXTS["slurm/pretrain.sbatch"]) for key in ("nodes", "cpus-per-task"))
    assert nodes is not None
    assert each is not None
    assert int(nodes[1]) * int(each[1]) > config["training"]["num_workers"]


def test_drivers_stay_off_the_head() -> None:
    jobs = [job for document in DOCUMENTS.values() if (job := job_spec(document))]
    assert [job["entrypointNumCpus"] for job in jobs] == [1, 1]


@pytest.mark.parametrize(
    "name",
    ["kuberay/access.yaml", "pma.env.example", "ray-up/aws.yaml", "slurm/pretrain.sbatch", "Dockerfile"],
)
def test_file_sets_the_token_mode(name: str) -> None:
    assert re.search(r"\bRAY_AUTH_MODE(=|: )token\b", TEXTS[name])
    assert "RAY_AUTH_MODE=disabled" not in TEXTS[name]


def test_stopped_jobs_get_ctrl_c_and_time() -> None:
    assert settings()["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    seconds = settings()["RAY_JOB_STOP_WAIT_TIME_S"]
    for name in ("ray-up/aws.yaml", "Dockerfile"):
        assert (
            TEXTS[name].count("RAY_JOB_STOP_SIGNAL=SIGINT")
            == TEXTS[name].count(f"RAY_JOB_STOP_WAIT_TIME_S={seconds}")
            > 0
        )


def exposed_dashboards(text: str) -> list[str]:
    """Hosts other than loopback that a dashboard is bound to."""
    return [host for host in re.findall(r"dashboard-host[=: ]+[\"']?([^\s\"']+)", text) if host != "127.0.0.1"]


@pytest.mark.parametrize("name", TEXTS)
def test_no_dashboard_listens_on_all_addresses(name: str) -> None:
    assert exposed_dashboards(TEXTS[name]) == []


def test_exposed_dashboard_is_noticed() -> None:
    assert exposed_dashboards("ray start --head --dashboard-host=0.0.0.0") == ["0.0.0.0"]
    assert exposed_dashboards('dashboard-host: "0.0.0.0"') == ["0.0.0.0"]


def admits(policy: Document, labels: dict[str, str]) -> bool:
    """Whether a policy applies to Pods of these labels."""
    wanted: dict[str, str] = policy["spec"]["podSelector"]["matchLabels"]
    return wanted.items() <= labels.items()


def test_every_pod_is_behind_the_network_policy() -> None:
    policies = {name: item for name, item in DOCUMENTS.items() if item["kind"] == "NetworkPolicy"}
    general = policies["access.yaml: NetworkPolicy/pmaflow"]
    operator = policies["access.yaml: NetworkPolicy/pmaflow-operator"]
    assert set(general["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    for document in DOCUMENTS.values():
        for pod, template in pod_templates(document):
            labels = template["metadata"]["labels"]
            assert admits(general, labels)
            assert admits(operator, labels) is (pod == "head")
    assert [port["port"] for rule in operator["spec"]["ingress"] for port in rule["ports"]] == [8265]


def values_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from values_of(item)
    elif isinstance(value, str):
        yield value


def test_credentials_are_placeholders_under_the_names_that_clients_read() -> None:
    secrets = [item for item in DOCUMENTS.values() if item["kind"] == "Secret"]
    assert [sorted(item["stringData"]) for item in secrets] == [
        ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
        ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME"],
    ]
    assert {value for item in secrets for value in values_of(item["stringData"])} == {PLACEHOLDER}
    secret_settings = re.findall(r"^#?(\w*(?:KEY|PASSWORD|TOKEN|USERNAME)\w*)=(.*)$", TEXTS["pma.env.example"], re.M)
    assert {value for _, value in secret_settings} == {PLACEHOLDER}
    assert not set(settings()) & {name for item in secrets for name in item["stringData"]}


SECRET_SHAPES = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|eyJ[\w-]{20,}|\b[0-9a-f]{40,}\b|://[^/\s:@]+:[^/\s@]+@")


@pytest.mark.parametrize("name", TEXTS)
def test_file_holds_nothing_that_looks_like_a_secret(name: str) -> None:
    assert not SECRET_SHAPES.search(TEXTS[name])


def test_things_that_look_like_secrets_are_noticed() -> None:
    assert SECRET_SHAPES.search("key: AKIAIOSFODNN7EXAMPLE")
    assert SECRET_SHAPES.search("uri: https://user:word@mlflow.example.com")


def test_folder_holds_data_only() -> None:
    assert not [path for path in map(Path, TEXTS) if path.suffix == ".py"]
