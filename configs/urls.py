"""URLs that users write; none may carry a secret, because configurations are saved and shown."""

from __future__ import annotations

from urllib.parse import urlsplit

from configs.errors import ConfigError


def require_no_credentials(url: str, what: str) -> None:
    """Refuse a URL with a user, password or query inside, without repeating it."""
    parts = urlsplit(url)
    if "://" in url and ("@" in parts.netloc or parts.query):
        raise ConfigError(
            f"{what}: a {parts.scheme}:// URL with credentials or a query inside is refused; put them into the "
            "environment (S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; MLflow: MLFLOW_TRACKING_USERNAME, "
            "MLFLOW_TRACKING_PASSWORD)"
        )
