"""Registered models: versions that point at checkpoints, their tags and aliases. Weights are never uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.storage import scheme_of
from cluster.tracking import guarded, is_missing, open_client

DIGEST_TAG = "digest"
"""Tag of a version: content digest of the checkpoint it points at."""
URL_TAG = "url"
"""Tag of a version: where that checkpoint was published."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of a registered model."""

    model: str
    """Name of the model."""
    number: str
    """Which version, as MLflow counts them."""
    run_id: str
    """MLflow run that registered it."""
    tags: Mapping[str, str]
    """Its tags."""

    @property
    def name(self) -> str:
        """``MODEL/NUMBER``."""
        return f"{self.model}/{self.number}"


class ModelRegistry:
    """The registered models of one MLflow server; every method raises :class:`cluster.tracking.TrackingAway`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client: Any = None

    def aliases(self, model: str) -> dict[str, str] | None:
        """Alias to number of version; None if there is no such model."""

        def call() -> dict[str, str] | None:
            try:
                found = self._open().get_registered_model(model)
            except Exception as error:
                if is_missing(error):
                    return None
                raise
            return {alias: str(number) for alias, number in found.aliases.items()}

        return guarded(self.uri, call)

    def version(self, model: str, number: str) -> Version | None:
        """The version ``number`` of ``model``; None if there is none."""

        def call() -> Version | None:
            try:
                return _version(self._open().get_model_version(model, number))
            except Exception as error:
                if is_missing(error):
                    return None
                raise

        return guarded(self.uri, call)

    def holder(self, model: str, alias: str) -> Version | None:
        """The version that ``alias`` names; None if it names none."""
        number = (self.aliases(model) or {}).get(alias)
        return None if number is None else self.version(model, number)

    def find(self, model: str, digest: str) -> Version | None:
        """The oldest version of ``model`` whose checkpoint has the content ``digest``; None if there is none."""

        def call() -> Version | None:
            wanted = f"name = '{model}' and tags.{DIGEST_TAG} = '{digest}'"
            found = [_version(item) for item in self._open().search_model_versions(wanted)]
            return min(found, key=lambda version: int(version.number), default=None)

        return guarded(self.uri, call)

    def create(self, model: str, *, url: str, run_id: str, tags: Mapping[str, str]) -> Version:
        """Register the checkpoint at ``url`` by reference as a new version of ``model``, which is made if it is new.

        A server refuses local paths as a source; then the version points at the run's artifacts, and the tag ``url`` names the
        checkpoint in any case.
        """

        def call() -> Version:
            client = self._open()
            if self.aliases(model) is None:
                client.create_registered_model(model)
            source = url
            if urlsplit(self.uri).scheme in ("http", "https") and scheme_of(url) == "file":
                source = f"runs:/{run_id}/checkpoint"
            found = client.create_model_version(model, source=source, run_id=run_id, tags={**tags, URL_TAG: url})
            return Version(model=model, number=str(found.version), run_id=run_id, tags={**tags, URL_TAG: url})

        return guarded(self.uri, call)

    def set_alias(self, alias: str, version: Version) -> None:
        """Let ``alias`` name ``version``."""
        guarded(self.uri, lambda: self._open().set_registered_model_alias(version.model, alias, version.number))

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""

        def call() -> None:
            for key, value in tags.items():
                self._open().set_model_version_tag(version.model, version.number, key, value)

        guarded(self.uri, call)

    def describe(self, version: Version, text: str) -> None:
        """Set the description of a version, in Markdown."""
        guarded(self.uri, lambda: self._open().update_model_version(version.model, version.number, description=text))

    def describe_model(self, model: str, text: str) -> None:
        """Set the description of a model, in Markdown."""
        guarded(self.uri, lambda: self._open().update_registered_model(model, description=text))

    def read_text(self, run_id: str, path: str) -> str:
        """A small text artifact of a run; :class:`cluster.tracking.TrackingAway` if it cannot be had."""

        def call() -> str:
            from tempfile import TemporaryDirectory

            with TemporaryDirectory() as folder:
                found = self._open().download_artifacts(run_id, path, folder)
                with open(found, encoding="utf-8") as file:
                    return file.read()

        return guarded(self.uri, call)

    def _open(self) -> Any:
        if self._client is None:
            self._client = open_client(self.uri)
        return self._client


def _version(found: Any) -> Version:
    return Version(model=found.name, number=str(found.version), run_id=str(found.run_id or ""), tags=dict(found.tags))
