"""The Kubernetes manifests: fields against Kubernetes' and KubeRay's APIs, and that these checks refuse what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, Document, cluster_spec, documents, merge_patch, problems_of

DOCUMENTS = documents()
CLUSTER = "raycluster.yaml: RayCluster/pmaflow"
JOB = "rayjob-pretrain.yaml: RayJob/pretrain"
RAY_CRON = "raycronjob-tick.yaml: RayCronJob/tick"
CRON = "cronjob-tick.yaml: CronJob/tick"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_manifest_as_shipped_is_valid(name: str) -> None:
    assert problems_of(DOCUMENTS[name]) == []


def test_manifests_hold_every_kind() -> None:
    kinds = {document["kind"] for document in DOCUMENTS.values()}
    assert kinds == {
        "ConfigMap", "CronJob", "Namespace", "NetworkPolicy", "RayCluster", "RayCronJob", "RayJob", "Secret", "ServiceAccount",
    }  # fmt: skip


def test_gcs_patch_applied_to_the_cluster_is_valid() -> None:
    patch = yaml.safe_load((DEPLOY / "kuberay" / "gcs-rocksdb.patch.yaml").read_text())
    patched = merge_patch(DOCUMENTS[CLUSTER], patch)
    assert problems_of(patched) == []
    assert patched["spec"]["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    wrong = merge_patch(patched, {"spec": {"gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}}})
    assert problems_of(wrong) == ["rocksdb takes no settings of redis"]


def test_ephemeral_clusters_are_the_standing_one() -> None:
    standing = copy.deepcopy(DOCUMENTS[CLUSTER]["spec"])
    # The operator reads the state of a RayJob from the dashboard, so there it cannot be on loopback.
    assert standing["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert cluster_spec(DOCUMENTS[JOB]) == standing
    merging = cluster_spec(DOCUMENTS[RAY_CRON])
    standing["workerGroupSpecs"] = [group for group in standing["workerGroupSpecs"] if group["groupName"] == "merge"]
    assert merging == standing


def misspelt_head(cluster: Any) -> None:
    cluster["spec"]["headGroupSpecs"] = cluster["spec"].pop("headGroupSpec")


def misspelt_limits(cluster: Any) -> None:
    container = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resources"]["limit"] = container["resources"].pop("limits")


def text_for_replicas(cluster: Any) -> None:
    cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "17"


def number_for_start_parameter(cluster: Any) -> None:
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def autoscaler_v3(cluster: Any) -> None:
    cluster["spec"]["autoscalerOptions"]["version"] = "v3"


def restarting_worker(cluster: Any) -> None:
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["restartPolicy"] = "Always"


def labels_as_start_parameter(cluster: Any) -> None:
    cluster["spec"]["workerGroupSpecs"][0]["rayStartParams"]["labels"] = "pool=train"


def two_kinds_of_resources(cluster: Any) -> None:
    cluster["spec"]["headGroupSpec"]["resources"] = {"CPU": "0"}


def token_without_version(cluster: Any) -> None:
    del cluster["spec"]["rayVersion"]


def fewer_at_most_than_at_least(cluster: Any) -> None:
    cluster["spec"]["workerGroupSpecs"][0]["minReplicas"] = 18


def bad_name(cluster: Any) -> None:
    cluster["metadata"]["name"] = "pma_flow"


def unknown_submission_mode(job: Any) -> None:
    job["spec"]["submissionMode"] = "SideCarMode"


def selector_in_sidecar_mode(job: Any) -> None:
    job["spec"]["clusterSelector"] = {"ray.io/cluster": "pmaflow"}


def nothing_to_run_on(job: Any) -> None:
    del job["spec"]["rayClusterSpec"]


def ttl_without_shutdown(job: Any) -> None:
    job["spec"]["shutdownAfterJobFinishes"] = False


def field_of_cronjob(cron: Any) -> None:
    cron["spec"]["concurrencyPolicy"] = "Forbid"


def no_schedule(cron: Any) -> None:
    del cron["spec"]["schedule"]


def misspelt_deadline(cron: Any) -> None:
    cron["spec"]["startingDeadlineSecond"] = cron["spec"].pop("startingDeadlineSeconds")


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        (CLUSTER, misspelt_head, "'headGroupSpecs' was unexpected"),
        (CLUSTER, misspelt_limits, "'limit' was unexpected"),
        (CLUSTER, text_for_replicas, "'17' is not of type 'integer'"),
        (CLUSTER, number_for_start_parameter, "0 is not of type 'string'"),
        (CLUSTER, autoscaler_v3, "'v3' is not one of"),
        (CLUSTER, restarting_worker, "restartPolicy"),
        (CLUSTER, labels_as_start_parameter, "field labels"),
        (CLUSTER, two_kinds_of_resources, "both in rayStartParams"),
        (CLUSTER, token_without_version, "needs rayVersion"),
        (CLUSTER, fewer_at_most_than_at_least, "minReplicas above"),
        (CLUSTER, bad_name, "no DNS label"),
        (JOB, unknown_submission_mode, "'SideCarMode' is not one of"),
        (JOB, selector_in_sidecar_mode, "neither SidecarMode"),
        (JOB, nothing_to_run_on, "neither rayClusterSpec"),
        (JOB, ttl_without_shutdown, "needs shutdownAfterJobFinishes"),
        (RAY_CRON, field_of_cronjob, "'concurrencyPolicy' was unexpected"),
        (RAY_CRON, no_schedule, "'schedule' is a required"),
        (CRON, misspelt_deadline, "'startingDeadlineSecond' was unexpected"),
    ],
)
def test_spoilt_manifest_is_refused(name: str, spoil: Callable[[Document], None], says: str) -> None:
    spoilt = copy.deepcopy(DOCUMENTS[name])
    spoil(spoilt)
    assert any(says in problem for problem in problems_of(spoilt))
