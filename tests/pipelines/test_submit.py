"""``pma submit`` before it reaches a cluster: what a job is called, what is refused, what is shipped."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import JobFailed
from cluster.jobs import JobState
from configs.errors import UserError
from pipelines.console import answer_of, exit_code_of, report_failure
from pipelines.submit import Transcript, _require_success, build_runtime_env, understand

ROOT = Path(__file__).parent.parent.parent
PRETRAIN = ("pretrain", "--config", "tiny", "--run", "s3://bucket/team/first")
MOST_SHIPPED_BYTES = 2 << 20
"""A job is submitted over slow links too; the four packages have 0.6 MB."""


def test_understand_names_the_job_by_run_command_and_key() -> None:
    submission = understand(PRETRAIN)
    label, command, key = submission.name.rsplit("-", 2)
    assert (label, command, len(key)) == ("first", "pretrain", 8)
    assert submission.run_url == "s3://bucket/team/first"


def test_understand_a_fork_is_judged_by_the_forks_own_folder() -> None:
    fork = understand((*PRETRAIN, "--fork", "slower"))
    assert fork.run_url == f"{understand(PRETRAIN).run_url}/branches/slower"
    assert fork.name.startswith("slower-pretrain-")


@pytest.mark.parametrize(
    "command",
    [
        (*PRETRAIN, "--json"),
        (*PRETRAIN, "training.num_workers=4", "training.max_restarts=9"),
        ("pretrain", "--run", "s3://bucket/team/first/", "--config", "tiny"),
    ],
)
def test_understand_the_same_work_written_otherwise_gives_the_same_name(command: tuple[str, ...]) -> None:
    assert understand(command).name == understand(PRETRAIN).name


@pytest.mark.parametrize(
    "command",
    [
        (*PRETRAIN, "seed=2"),
        ("pretrain", "--config", "tiny", "--run", "s3://bucket/other/first"),
        ("demo", "--config", "tiny", "--run", "s3://bucket/team/first"),
        ("merge", "--run", "s3://bucket/team/first", "--count", "3"),
        ("merge", "--run", "s3://bucket/team/first", "--count", "4"),
        ("tick", "--run", "s3://bucket/team/first"),
        ("tick", "--run", "s3://bucket/team/first", "merge.count=4"),
    ],
)
def test_understand_other_work_gives_another_name(command: tuple[str, ...]) -> None:
    others = [PRETRAIN, ("merge", "--run", "s3://bucket/team/first", "--count", "5")]
    others.append(("tick", "--run", "s3://bucket/team/first", "merge.count=5"))
    assert understand(command).name not in {understand(other).name for other in others}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("pretrain", "--config", "tiny"), "give --run"),
        (("pretrain", "--config", "tiny", "--run", "runs/tiny"), "runs/tiny: on a cluster this would be lost"),
        (("pretrain", "--config", "tiny", "--run", "memory://run"), "would be lost"),
        (("merge", "--inputs", "s3://b/1", "two", "--output", "/shared/out"), "two: on a cluster"),
        (("merge", "--inputs", "s3://b/1", "s3://b/2", "--output", "out"), "out: on a cluster"),
        (("evaluate", "here"), "here: on a cluster"),
        (("pretrain", "--config", "tiny", "--run", "s3://key:secret@bucket/run"), "credentials"),
        (("pretrain", "--config", "tyni", "--run", "/shared/run"), "no configuration 'tyni'"),
        (("pretrain", "--config", "tiny", "--run", "/shared/run", "sed=1"), "unknown key 'sed'"),
        (("pretrain", "--run", "/shared/run"), "Missing option '--config'"),
        (("pretrain", "--confg", "tiny"), "No such option"),
        (("pretend",), "no command for a cluster"),
        (("submit", "--", "pretrain"), "no command for a cluster"),
        ((), "no command for a cluster"),
    ],
)
def test_understand_refuses_what_would_fail_or_be_lost_on_the_cluster(command: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as raised:
        understand(command)
    assert words in str(raised.value)
    assert "secret" not in str(raised.value)


def test_understand_accepts_absolute_paths_and_urls() -> None:
    assert understand(("evaluate", "/shared/run/merged/a")).name.startswith("a-evaluate-")
    inputs = ("--inputs", "s3://b/1", "s3://b/2")
    assert understand(("merge", *inputs, "--output", "s3://b/out")).name.startswith("out-merge-")


def test_runtime_env_has_the_named_variables_and_stops_by_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "train")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "unnamed")
    written = json.dumps({"pip": ["pandas"], "env_vars": {"A": "1", "OMP_NUM_THREADS": "2"}})
    values = build_runtime_env(str(ROOT), written, ("AWS_PROFILE",))
    assert values["pip"] == ["pandas"]
    assert values["working_dir"] == str(ROOT)
    assert values["env_vars"] == {
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "OMP_NUM_THREADS": "2",
        "A": "1",
        "AWS_PROFILE": "train",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((".", "{", ()), "--runtime-env-json: not JSON"),
        ((".", "[]", ()), "expected an object"),
        ((".", '{"env_vars": ["A"]}', ()), "expected an object"),
        (("no-such-folder", None, ()), "--working-dir no-such-folder"),
        ((".", None, ("NOT_SET_ANYWHERE",)), "--env NOT_SET_ANYWHERE"),
    ],
)
def test_runtime_env_refuses_what_is_malformed(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_runtime_env(*arguments)


def test_transcript_keeps_the_last_object_and_the_last_complaint_however_the_log_is_cut() -> None:
    log = 'pma: first\n{"step": 1}\n{not json}\nprogress\n{"digest": "ab", "loss": 1.5}\npma: disk full\n'
    for size in range(1, len(log)):
        out = io.StringIO()
        transcript = Transcript(out)
        for start in range(0, len(log), size):
            transcript.write(log[start : start + size])
        assert out.getvalue() == log
        assert transcript.answer == {"digest": "ab", "loss": 1.5}
        assert transcript.complaint == "disk full"


@pytest.mark.parametrize(
    ("status", "driver", "code", "words"),
    [
        ("FAILED", 2, 2, "correct the command"),
        ("FAILED", 75, 75, "another driver works on it"),
        ("FAILED", 130, 130, "run the same command again to continue"),
        ("FAILED", 1, 1, "mend the cause and run the same command again"),
        ("FAILED", -9, 1, "ended with exit code -9"),
        ("FAILED", 137, 1, "ended with exit code 137"),
        ("STOPPED", None, 130, "it was stopped"),
        ("FAILED", None, 1, "Ray says the supervisor died"),
    ],
)
def test_ended_job_gives_the_pipelines_exit_code(status: str, driver: int | None, code: int, words: str) -> None:
    state = JobState(status=status, exit_code=driver, message="the supervisor\ndied")
    with pytest.raises(JobFailed, match=words) as raised:
        _require_success(
            {"submission_id": "job"}, understand(("evaluate", "/nowhere")), state, Transcript(io.StringIO())
        )
    assert exit_code_of(raised.value) == code


def test_failed_job_answers_with_the_pipelines_own_object(capsys: pytest.CaptureFixture[str]) -> None:
    transcript = Transcript(io.StringIO())
    transcript.write('{"url": "/a", "ok": false, "problems": ["weights differ"]}\n')
    state = JobState(status="FAILED", exit_code=1, message="")
    with pytest.raises(JobFailed) as raised:
        _require_success({"submission_id": "job"}, understand(("verify", "/a")), state, transcript)
    out = io.StringIO()
    report_failure("JobFailed", str(raised.value), out, answer_of(raised.value))
    answer = json.loads(out.getvalue())
    assert (answer["ok"], answer["problems"], answer["exit_code"]) == (False, ["weights differ"], 1)
    assert answer["error"] == "JobFailed"
    assert "mend the cause" in capsys.readouterr().err


def test_job_that_ray_lost_sight_of_is_judged_by_its_run_folder(
    demo_run: tuple[Path, dict[str, Any]], small: tuple[str, ...], tmp_path: Path
) -> None:
    state = JobState(status="FAILED", exit_code=None, message="the supervisor died")
    done = understand(("pretrain", "--config", "tiny", "--run", str(demo_run[0]), *small))
    _require_success({"submission_id": "job"}, done, state, Transcript(io.StringIO()))
    unknown = understand(("pretrain", "--config", "tiny", "--run", str(tmp_path / "none"), *small))
    with pytest.raises(JobFailed):
        _require_success({"submission_id": "job"}, unknown, state, Transcript(io.StringIO()))
    assert not (tmp_path / "none").exists(), "asking does not create a run"


def test_working_dir_ships_the_packages_and_nothing_else(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "configs",
        "cluster",
        "tasks",
        "pipelines",
        "examples",
        "pyproject.toml",
    }
    assert not [name for name in names if "__pycache__" in name]
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "pipelines").rglob("*.py")}
    assert tracked <= set(names)
    assert package.stat().st_size < MOST_SHIPPED_BYTES
