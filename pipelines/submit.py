"""Send a command to a Ray cluster as a job: submit it or attach to it, follow it, end with its exit code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import click

from cluster.errors import JobDetached, JobFailed, StorageError
from cluster.job_log import follow
from cluster.jobs import JobRequest, JobServer, JobState
from cluster.lease import held_leases
from cluster.storage import open_store
from configs.errors import UserError
from configs.load import identity_of, load_config
from configs.urls import require_no_credentials
from pipelines.console import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LEASE_HELD, EXIT_USAGE

# Read by the job's supervisor: stop as Ctrl-C does, and leave time to release the lease.
JOB_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30", "OMP_NUM_THREADS": "1"}
NOT_SUBMITTED = ("submit", "config")
URL_METAVAR = re.compile(r"URL|DIR|PATTERN")
EXECUTION_OPTIONS = {"as_json", "debug", "workers", "memory_budget", "every_seconds"}
"""Options that do not tell one piece of work from another."""
KEY_CHARACTERS = 8
SAYS = "pma: "
"""How a command's errors begin on stderr (:func:`pipelines.console.report_failure`)."""
HINTS = {
    EXIT_USAGE: "correct the command as it says",
    EXIT_LEASE_HELD: "another driver works on it; run the same command again later",
    EXIT_INTERRUPTED: "what was committed is safe, run the same command again to continue",
    EXIT_FAILED: "what was committed is safe; mend the cause and run the same command again to continue",
}


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A ``pma`` command, understood well enough to name its job."""

    command: tuple[str, ...]
    """As the user wrote it, without ``pma``."""
    name: str
    """``<run>-<command>-<key>``: the same for the same work, from any machine at any time."""
    run_url: str | None
    """The run that it works on, if it works on one."""


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    working_dir: str | None = ".",
    runtime_env_json: str | None = None,
    env: Sequence[str] = (),
    entrypoint_num_cpus: float | None = None,
    wait: bool = True,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run ``pma COMMAND`` as a Ray job, or attach to the job that already does; returns what it answered.

    Raises :class:`JobFailed` with the pipeline's exit code, :class:`JobDetached` on Ctrl-C (the job goes
    on), and :class:`UserError` for a command that would lose its results on a cluster.
    """
    arguments = (*command, "--json") if as_json and "--json" not in command else tuple(command)
    submission = understand(arguments)
    request = JobRequest(
        name=submission.name,
        entrypoint=shlex.join(["python", "-m", "pipelines", *arguments]),
        runtime_env=build_runtime_env(working_dir, runtime_env_json, env),
        entrypoint_num_cpus=entrypoint_num_cpus,
    )
    server = JobServer(address)
    job = server.submit_or_attach(request)
    say(f"{'attached to' if job.is_attached else 'submitted'} job {job.submission_id} at {server.url}")
    details = {"submission_id": job.submission_id, "attached": job.is_attached, "address": server.url}
    if not wait:
        return details
    transcript = Transcript(sys.stderr)
    state = _follow(server, job.submission_id, submission, transcript)
    _require_success(details, submission, state, transcript)
    return {**transcript.answer, **details, "exit_code": EXIT_DONE}


def stop(command: Sequence[str], *, address: str | None = None) -> dict[str, Any]:
    """Stop the job that runs ``pma COMMAND``, cleanly, and wait until it has ended."""
    submission = understand(tuple(command))
    server = JobServer(address)
    submission_id = server.running(submission.name)
    if submission_id is None:
        raise UserError(f"no job of {submission.name} is running at {server.url}")
    server.stop(submission_id)
    state = _follow(server, submission_id, submission, Transcript(sys.stderr))
    return {"submission_id": submission_id, "address": server.url, "status": state.status}


def understand(command: Sequence[str]) -> Submission:
    """Parse a ``pma`` command as ``pma`` would, check that it can run on a cluster, and name it."""
    name, parameters, urls = _parse(command)
    run_url = parameters.get("run_url")
    if "run_url" in parameters and not urls:
        raise UserError(
            f"pma submit {name}: give --run. The default, runs/<name>, would lie in the job's copy of the working "
            "directory and be lost with it; use s3://bucket/run, or an absolute path that all nodes share"
        )
    for url in urls:
        _require_durable(url)
    if run_url and parameters.get("fork"):
        run_url = f"{run_url.rstrip('/')}/branches/{parameters['fork']}"
    label = re.sub(
        r"[^A-Za-z0-9_.-]+", "-", _last_part(str(run_url or parameters.get("output") or (urls or [name])[0]))
    )
    return Submission(command=tuple(command), name=f"{label[:40]}-{name}-{_key(name, parameters)}", run_url=run_url)


def build_runtime_env(working_dir: str | None, runtime_env_json: str | None, env: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment: the user's, the working directory, and the named variables of this shell."""
    try:
        values = json.loads(runtime_env_json or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"--runtime-env-json: not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("env_vars", {}), dict):
        raise UserError('--runtime-env-json: expected an object such as {"pip": ["pandas"], "env_vars": {"A": "1"}}')
    if missing := [name for name in env if name not in os.environ]:
        raise UserError(f"--env {missing[0]}: this shell has no such variable; export it first")
    if working_dir is not None:
        if "://" not in working_dir and not os.path.isdir(working_dir):  # noqa: PTH112  a URL is no path
            raise UserError(f"--working-dir {working_dir}: no such folder")
        values["working_dir"] = working_dir
    values["env_vars"] = {**JOB_ENVIRONMENT, **values.get("env_vars", {}), **{name: os.environ[name] for name in env}}
    return values


class Transcript:
    """Shows a job's log on ``out`` and keeps what the pipeline said at its end: its JSON object, its complaint."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.answer: dict[str, Any] = {}
        self.complaint = ""
        self._line = ""

    def write(self, text: str) -> None:
        """Take the next piece of the log."""
        self.out.write(text)
        self.out.flush()
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith("{"):
                self._keep(line)
            elif line.startswith(SAYS):
                self.complaint = line.removeprefix(SAYS)

    def _keep(self, line: str) -> None:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            return
        if isinstance(value, dict):
            self.answer = value


def say(message: str) -> None:
    """One line about the job, apart from its own output."""
    sys.stderr.write(f"{SAYS}{message}\n")
    sys.stderr.flush()


def _follow(server: JobServer, submission_id: str, submission: Submission, transcript: Transcript) -> JobState:
    def is_driver_alive() -> bool:
        return bool(_holders(submission.run_url))

    try:
        return follow(server, submission_id, transcript.write, is_driver_alive=is_driver_alive)
    except KeyboardInterrupt:
        words = shlex.join(submission.command)
        raise JobDetached(
            f"no longer following; job {submission_id} goes on. Follow it again: pma submit --address {server.url} -- "
            f"{words}   Stop it: pma submit --stop --address {server.url} -- {words}"
        ) from None


def _require_success(details: dict[str, Any], submission: Submission, state: JobState, transcript: Transcript) -> None:
    """:class:`JobFailed` with the pipeline's own exit code and answer, unless it succeeded."""
    code = _exit_code(state, submission)
    if code == EXIT_DONE:
        return
    if state.status == "STOPPED":
        seen = "it was stopped"
    elif state.exit_code is None:
        seen = f"Ray says {' '.join(state.message.split())[:500]}"
    else:
        said = f": {transcript.complaint}" if transcript.complaint else ""
        seen = f"its driver ended with exit code {state.exit_code}{said}"
    answer = {**transcript.answer, **details, "exit_code": code}
    raise JobFailed(f"job {details['submission_id']}: {seen}; {HINTS[code]}", code, answer)


def _exit_code(state: JobState, submission: Submission) -> int:
    if state.status == "STOPPED":
        return EXIT_INTERRUPTED
    code = state.exit_code
    if code is None and state.status == "SUCCEEDED":
        return EXIT_DONE
    if code is None:
        return EXIT_DONE if _is_done(submission) else EXIT_FAILED
    return code if code == EXIT_DONE or code in HINTS else EXIT_FAILED


def _is_done(submission: Submission) -> bool:
    """Whether the run folder holds all that a pre-training run has to do; other commands are simply run again."""
    from pipelines.pretrain import has_work_left
    from tasks.checkpoints.run_folder import RunFolder

    if submission.command[0] != "pretrain" or submission.run_url is None:
        return False
    try:
        run = RunFolder(submission.run_url)
        return not has_work_left(run, run.identity().config)
    except (StorageError, UserError):
        return False


def _holders(run_url: str | None) -> list[dict[str, object]]:
    """Leases of the run that are in force; none where this machine cannot read the run."""
    if run_url is None:
        return []
    try:
        return held_leases(open_store(run_url), time.time())
    except (StorageError, UserError):
        return []


def _parse(command: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The command's name, its options, and those that are URLs or paths; a mistake is named as ``pma`` would."""
    from pipelines.__main__ import cli

    name, *arguments = command or ("",)
    known = cli.commands.get(name)
    if known is None or name in NOT_SUBMITTED:
        able = ", ".join(sorted(set(cli.commands) - set(NOT_SUBMITTED)))
        raise UserError(f"pma submit: {name!r} is no command for a cluster; there are {able}")
    try:
        with known.make_context(name, list(arguments)) as context:
            parameters = dict(context.params)
    except click.UsageError as error:
        raise UserError(f"pma {name}: {error.format_message()} (see pma {name} --help)") from error
    named = [p.name for p in known.params if p.name and URL_METAVAR.search(p.metavar or "")]
    urls: list[str] = []
    for key in (*named, "more_inputs"):
        value = parameters.get(key) or ()
        urls += [value] if isinstance(value, str) else list(value)
    return name, parameters, urls


def _require_durable(url: str) -> None:
    """Refuse a place that a job would lose: relative to a copy of the working directory, or one process's memory."""
    require_no_credentials(url, "pma submit")
    if url.startswith("memory://") or ("://" not in url and not os.path.isabs(url)):  # noqa: PTH117  a URL is no path
        raise UserError(
            f"{url}: on a cluster this would be lost with the job (relative paths lie in its copy of the working "
            "directory); use s3://bucket/run, or an absolute path that all nodes share"
        )


def _key(name: str, parameters: Mapping[str, Any]) -> str:
    """Digest of what determines the work: command, URLs, options, and the configuration's identity."""
    identity: dict[str, Any] = {"command": name}
    left_out = set(EXECUTION_OPTIONS)
    if parameters.get("config_name"):
        left_out |= {"config_name", "overrides"}
        config = load_config(parameters["config_name"], tuple(parameters.get("overrides") or ())).config
        identity["config"] = identity_of(config)
    for key, value in parameters.items():
        if key not in left_out:
            identity[key] = value.rstrip("/") if isinstance(value, str) else value
    canonical = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_CHARACTERS]


def _last_part(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2] or "run"
