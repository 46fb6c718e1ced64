"""URLs that users write carry no secrets."""

from __future__ import annotations

import pytest

from configs.data import DataConfig
from configs.errors import ConfigError
from configs.sections import TrackingConfig
from configs.urls import require_no_credentials

SECRET = "wJalrXUtnFEMIbPxRfiCY"


@pytest.mark.parametrize(
    "url",
    [
        "runs/tiny", "/data/[ab]?.txt", "file:///data", "s3://bucket/path", "python://stdlib", "http://localhost:5000",
        "sqlite:///runs/mlflow.db", "user@host/is/a/path",
    ],
)  # fmt: skip
def test_require_no_credentials_plain_url_passes(url: str) -> None:
    require_no_credentials(url, "data.sources")


@pytest.mark.parametrize(
    "url", [f"https://user:{SECRET}@host", f"s3://{SECRET}@bucket/path", f"http://host/path?token={SECRET}"]
)
def test_require_no_credentials_secret_refused_without_echo(url: str) -> None:
    for refuse in (
        lambda: require_no_credentials(url, "tracking.uri"),
        lambda: TrackingConfig(uri=url),
        lambda: DataConfig(sources=("python://stdlib", url)),
    ):
        with pytest.raises(ConfigError, match="environment") as caught:
            refuse()
        assert SECRET not in str(caught.value)


def test_require_no_credentials_secret_with_a_slash_refused() -> None:
    with pytest.raises(ConfigError):
        require_no_credentials(f"s3://AKIAKEY:{SECRET}/more@bucket/path", "data.sources")


def test_require_no_credentials_glob_passes() -> None:
    require_no_credentials("s3://bucket/part-?.txt", "data.sources")
