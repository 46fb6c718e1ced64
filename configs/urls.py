"""URLs that users write; none may carry a secret, because configurations are saved and shown."""

from __future__ import annotations

import re

from configs.errors import ConfigError

# "user@host", or "user:secret@host" where the secret may hold slashes; a query has keys, a glob's "?" has none.
_USER = re.compile(r"[^/]*@|[^@/]*:[^@]*@")
_QUERY = re.compile(r"\?[^/]*=")


def require_no_credentials(url: str, what: str) -> None:
    """Refuse a URL with a user, password or query inside, without repeating it."""
    scheme, separator, rest = url.partition("://")
    if separator and (_USER.match(rest) or _QUERY.search(rest)):
        raise ConfigError(
            f"{what}: a {scheme}:// URL with credentials or a query inside is refused; put them into the "
            "environment (S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; MLflow: MLFLOW_TRACKING_USERNAME, "
            "MLFLOW_TRACKING_PASSWORD)"
        )
