"""Ray jobs: submit one or attach to it, ask how it stands, stop it.

The only place that talks to Ray's job server. A job is named by what it does, so that the same command
finds the job that is running; what it achieved is asked of the run folder, never of Ray's job table.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.address import CONNECT_SECONDS, HOW_TO_AUTHENTICATE, dashboard_url
from cluster.errors import ClusterUnreachable
from configs.errors import UserError

ANSWER_SECONDS = 60.0
"""Most that one request may take; an upload of the working directory is one request."""
SUBMIT_TRIES = 5
NODE_ID_LABEL = "ray.io/node-id"
logger = logging.getLogger(__name__)


class JobServerError(Exception):
    """The job server answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"the job server answered {status}: {text[:2000]}")
        self.status = status


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A command for a cluster."""

    name: str
    """What the job is called before its attempt number; the same for the same work, wherever it is submitted from."""
    entrypoint: str
    """Shell command of the driver."""
    runtime_env: Mapping[str, Any]
    """Ray runtime environment; ``working_dir`` may be a local folder."""
    entrypoint_num_cpus: float | None = None
    """CPUs that the driver itself holds; None places it off the head, where there are workers, and holds nothing."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that is on the cluster."""

    submission_id: str
    """Its id: the name and ``-a`` with the attempt's number."""
    is_attached: bool
    """Whether it was there already."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """How a job stands, in Ray's words."""

    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    exit_code: int | None
    """Exit code of the driver; None while it runs, and where Ray never saw it end."""
    message: str
    """Ray's explanation."""

    @property
    def is_terminal(self) -> bool:
        """Whether Ray holds the job for ended."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class JobServer:
    """The job server of one cluster, checked to answer, to accept our token and to run our Ray version."""

    def __init__(self, address: str | None) -> None:
        self.url = dashboard_url(address)
        self.client = _connect(self.url)

    def submit_or_attach(self, request: JobRequest) -> Submitted:
        """Attach to the job of this name that has not ended, or submit the next attempt."""
        for _ in range(SUBMIT_TRIES):
            running, attempt = self._attempts(request.name)
            if running:
                return Submitted(submission_id=running, is_attached=True)
            submission_id = f"{request.name}-a{attempt}"
            if self._submit(submission_id, request):
                return Submitted(submission_id=submission_id, is_attached=False)
        raise ClusterUnreachable(
            f"{self.url} took none of {SUBMIT_TRIES} attempts to submit {request.name}; see its log"
        )

    def running(self, name: str) -> str | None:
        """Id of the job of this name that has not ended."""
        return self._attempts(name)[0]

    def state(self, submission_id: str) -> JobState:
        """How the job stands; :class:`JobServerError` with status 404 if the cluster does not know it."""
        details = self.client.get_job_info(submission_id)
        return JobState(
            status=details.status.value, exit_code=details.driver_exit_code, message=details.message or details.status
        )

    def log(self, submission_id: str) -> str:
        """All that the job has printed so far."""
        return str(self.client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> bool:
        """Ask the job to stop cleanly; False if it had ended."""
        return bool(self.client.stop_job(submission_id))

    def _attempts(self, name: str) -> tuple[str | None, int]:
        """The attempt that has not ended, if any, and the number of the next one."""
        newest, running = 0, None
        for job in self.client.list_jobs():
            found = re.fullmatch(rf"{re.escape(name)}-a(\d+)", job.submission_id or "")
            if found:
                newest = max(newest, int(found[1]))
                running = running if job.status.is_terminal() else job.submission_id
        return running, newest + 1

    def _submit(self, submission_id: str, request: JobRequest) -> bool:
        """Whether a job of this id was taken, now or by another submitter meanwhile."""
        placement: dict[str, Any] = (
            self._off_the_head()
            if request.entrypoint_num_cpus is None
            else {"entrypoint_num_cpus": request.entrypoint_num_cpus}
        )
        try:
            self.client.submit_job(
                submission_id=submission_id,
                entrypoint=request.entrypoint,
                runtime_env=dict(request.runtime_env),
                **placement,
            )
        except dropped() as error:
            # Taken, and the answer lost; or another submitter was first. The next look at the table says which.
            if isinstance(error, JobServerError) and not self._exists(submission_id):
                raise
            logger.warning("submitting %s: %s; looking whether it was taken", submission_id, error)
            return False
        except ValueError as error:
            raise UserError(f"the runtime environment is not accepted: {error}") from error
        return True

    def _exists(self, submission_id: str) -> bool:
        try:
            self.client.get_job_info(submission_id)
        except JobServerError as error:
            if error.status == 404:
                return False
            raise
        return True

    def _off_the_head(self) -> dict[str, Any]:
        """Placement of the driver: anywhere but on the head if other nodes have CPUs, else wherever Ray puts it.

        By label and without a CPU of its own: a fraction of a CPU would spoil a whole slot of the gang.
        """
        answer = self.client._do_request("GET", "/api/v0/nodes?limit=10000&detail=true")
        if answer.status_code != 200:
            logger.warning("%s does not list its nodes (%d); the driver goes to the head", self.url, answer.status_code)
            return {}
        nodes = [node for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
        heads = [node["node_id"] for node in nodes if node["is_head_node"]]
        has_workers = any(not node["is_head_node"] and node["resources_total"].get("CPU", 0) >= 1 for node in nodes)
        return {"entrypoint_label_selector": {NODE_ID_LABEL: f"!{heads[0]}"}} if heads and has_workers else {}


def dropped() -> tuple[type[BaseException], ...]:
    """Errors of a connection that broke, or of a server that is starting or ending: worth another try."""
    import aiohttp
    import requests

    return (requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError, JobServerError)


def _connect(url: str) -> Any:
    import ray
    import requests
    from ray.exceptions import AuthenticationError

    # Ray's client lets these two override the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        client = _client_class()(url)
    except AuthenticationError as error:
        raise UserError(f"{url} refused the request: {' '.join(str(error).split())}; {HOW_TO_AUTHENTICATE}") from error
    except (ConnectionError, requests.RequestException, RuntimeError, KeyError, JobServerError) as error:
        raise ClusterUnreachable(
            f"{url} listens but does not answer as Ray's dashboard ({' '.join(str(error).split())[:300]}); "
            "give the dashboard's URL, for example http://head:8265"
        ) from error
    _require_same_version(url, str(client._server_ray_version), ray.__version__)
    return client


def _require_same_version(url: str, cluster: str, here: str) -> None:
    """Refuse another minor version of Ray; jobs of another patch version work."""
    if cluster.split(".")[:2] != here.split(".")[:2]:
        raise UserError(
            f"{url} runs Ray {cluster}, this is Ray {here}; install the cluster's version here "
            f"(pip install 'ray[default]=={cluster}') or use a cluster image with Ray {here}"
        )
    if cluster != here:
        logger.warning("%s runs Ray %s, this is Ray %s", url, cluster, here)


def _client_class() -> type[Any]:
    from ray.job_submission import JobSubmissionClient

    # Each of these sets itself to INFO when it is imported.
    for noisy in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(noisy).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's client, with time limits on requests and errors that keep their status."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            options.setdefault("timeout", (CONNECT_SECONDS, ANSWER_SECONDS))
            return super()._do_request(method, endpoint, **options)

        def _raise_error(self, answer: Any) -> None:
            raise JobServerError(answer.status_code, answer.text)

    return Client
