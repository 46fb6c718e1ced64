"""Ray jobs seen from outside: named once, followed through broken connections, and errors that say what to do."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from job_server import FakeJobServer

import cluster.job_log
from cluster.address import require_driver_address
from cluster.errors import ClusterUnreachable, JobFailed
from cluster.job_log import follow
from cluster.jobs import JobRequest, JobServer
from configs.errors import UserError

# Ray's own client says it to aiohttp at every attachment to a log.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
NAME = "run-pretrain-0123abcd"
LOG = "".join(f"line {number} of the log\n" for number in range(100))
REQUEST = JobRequest(name=NAME, entrypoint="python -m pipelines status", runtime_env={})
DONE: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0, "message": "Done."}
HEAD = {"node_id": "aa", "state": "ALIVE", "is_head_node": True, "resources_total": {"CPU": 4.0}}
WORKER = {"node_id": "bb", "state": "ALIVE", "is_head_node": False, "resources_total": {"CPU": 4.0}}


@pytest.fixture(autouse=True)
def with_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a client with a token; Ray keeps what it once read."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "")
    reset_auth_token_state()
    yield
    monkeypatch.undo()
    reset_auth_token_state()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of hundredths of a second."""
    monkeypatch.setattr(cluster.job_log, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(cluster.job_log, "FIRST_PAUSE_SECONDS", 0.02)


@pytest.fixture
def fake() -> Iterator[FakeJobServer]:
    """A job server that behaves until told otherwise."""
    import ray

    with FakeJobServer(ray_version=ray.__version__, log=LOG) as server:
        yield server


def followed(fake: FakeJobServer, **options: Any) -> tuple[str, Any]:
    shown: list[str] = []
    state = follow(JobServer(fake.url), f"{NAME}-a1", shown.append, **options)
    return "".join(shown), state


def test_follow_through_cut_connections_shows_every_line_once(fake: FakeJobServer) -> None:
    fake.add(f"{NAME}-a1")
    fake.cuts, fake.outages, fake.ends = [0, 130, 130, 1000, 5], 7, DONE
    log, state = followed(fake)
    assert log == LOG
    assert (state.status, state.exit_code) == ("SUCCEEDED", 0)
    assert fake.num_attached >= 6


def test_follow_a_job_called_failed_whose_driver_lives_waits_for_the_driver(fake: FakeJobServer) -> None:
    fake.add(f"{NAME}-a1", status="FAILED", message="Unexpected error occurred")
    alive = iter([True] * 5)
    log, state = followed(fake, is_driver_alive=lambda: next(alive, False))
    assert next(alive, None) is None, "the driver was asked until it was gone"
    assert log == LOG
    assert (state.status, state.exit_code) == ("FAILED", None)


def test_follow_a_failed_job_with_an_exit_code_asks_nobody_else(fake: FakeJobServer) -> None:
    fake.add(f"{NAME}-a1", status="FAILED", driver_exit_code=75)
    assert followed(fake, is_driver_alive=lambda: pytest.fail("not asked"))[1].exit_code == 75


def test_follow_a_cluster_that_stays_silent_gives_up_and_says_how_to_go_on(fake: FakeJobServer) -> None:
    fake.add(f"{NAME}-a1")
    fake.outages, fake.cuts = 10**6, [0] * 10**6
    with pytest.raises(ClusterUnreachable, match="attaches to the job if it runs, and continues the run if not"):
        followed(fake, retry_seconds=0.5)


def test_follow_a_job_that_a_new_cluster_does_not_know_fails_with_code_1(fake: FakeJobServer) -> None:
    with pytest.raises(JobFailed, match="the cluster was replaced") as raised:
        followed(fake)
    assert raised.value.exit_code == 1


def test_submit_takes_the_first_attempt_then_attaches_then_takes_the_next(fake: FakeJobServer) -> None:
    server = JobServer(fake.url)
    first, second = server.submit_or_attach(REQUEST), server.submit_or_attach(REQUEST)
    assert (first.submission_id, first.is_attached) == (f"{NAME}-a1", False)
    assert (second.submission_id, second.is_attached) == (f"{NAME}-a1", True)
    fake.jobs[f"{NAME}-a1"].update(DONE)
    fake.add(f"{NAME}-a9", status="STOPPED")
    fake.add("other-pretrain-0123abcd-a30")
    assert server.submit_or_attach(REQUEST).submission_id == f"{NAME}-a10"
    assert server.running(NAME) == f"{NAME}-a10"


def test_submit_whose_answer_is_lost_attaches_to_what_was_taken(fake: FakeJobServer) -> None:
    fake.lose_answer = True
    job = JobServer(fake.url).submit_or_attach(REQUEST)
    assert (job.submission_id, job.is_attached) == (f"{NAME}-a1", True)
    assert len(fake.submitted) == 1


@pytest.mark.parametrize(
    ("nodes", "selector"),
    [([HEAD], None), ([HEAD, WORKER], {"ray.io/node-id": "!aa"}), ([HEAD, {**WORKER, "state": "DEAD"}], None)],
)
def test_submit_places_the_driver_off_the_head_where_there_are_workers(
    fake: FakeJobServer, nodes: list[dict[str, Any]], selector: dict[str, str] | None
) -> None:
    fake.nodes = nodes
    JobServer(fake.url).submit_or_attach(REQUEST)
    assert fake.submitted[0].get("entrypoint_label_selector") == selector
    assert "entrypoint_num_cpus" not in fake.submitted[0]


def test_submit_with_a_number_of_cpus_asks_for_them(fake: FakeJobServer) -> None:
    fake.nodes = [HEAD, WORKER]
    request = JobRequest(name=NAME, entrypoint="true", runtime_env={}, entrypoint_num_cpus=0.5)
    JobServer(fake.url).submit_or_attach(request)
    assert fake.submitted[0]["entrypoint_num_cpus"] == 0.5
    assert "entrypoint_label_selector" not in fake.submitted[0]


def test_connect_goes_to_the_address_it_is_given_not_to_the_environments(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert JobServer(fake.url).running(NAME) is None
    assert os.environ["RAY_API_SERVER_ADDRESS"] == fake.url


def test_connect_to_another_ray_version_names_both(fake: FakeJobServer) -> None:
    import ray

    fake.ray_version = "2.48.0"
    with pytest.raises(UserError, match=rf"runs Ray 2\.48\.0, this is Ray {ray.__version__}.*ray\[default\]==2\.48\.0"):
        JobServer(fake.url)


@pytest.mark.parametrize("status", [401, 403])
def test_connect_without_the_right_token_says_what_to_set(fake: FakeJobServer, status: int) -> None:
    fake.refuse = status
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
        JobServer(fake.url)


@pytest.mark.parametrize("status", [404, 500])
def test_connect_to_something_else_says_what_is_expected(fake: FakeJobServer, status: int) -> None:
    fake.refuse = status
    with pytest.raises(ClusterUnreachable, match="does not answer as Ray's dashboard"):
        JobServer(fake.url)


def test_connect_where_nothing_listens_fails_in_seconds(port: int) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=f"no Ray answers at 127.0.0.1:{port}"):
        JobServer(f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 7


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", "jobs are taken by the dashboard"),
        ("http://", "expected host:port or http://host:port"),
        ("http://head:port", "expected host:port or http://host:port"),
        ("http://user:secret@head:8265", "credentials"),
    ],
)
def test_connect_to_what_is_no_dashboard_url_is_the_users_mistake(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        JobServer(address)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://head:8265", "use pma submit"),
        ("ray://head:10001", "use pma submit"),
        ("head", "expected host:port, for example head:6379"),
    ],
)
def test_join_by_what_is_no_drivers_address_is_the_users_mistake(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        require_driver_address(address)


def test_join_where_nothing_listens_or_http_answers_fails_in_seconds(fake: FakeJobServer, port: int) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterUnreachable, match="no Ray answers"):
        require_driver_address(f"127.0.0.1:{port}")
    with pytest.raises(ClusterUnreachable, match="not as Ray's control store"):
        require_driver_address(fake.url.removeprefix("http://"))
    assert time.monotonic() - started < 7


def test_join_where_the_listener_says_nothing_fails_in_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(ClusterUnreachable, match="not as Ray's control store"):
            require_driver_address(f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 12
