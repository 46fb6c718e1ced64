"""What retention took away, as the manifests that it kept aside tell it."""

from __future__ import annotations

from cluster.storage import open_store
from tasks.checkpoints.dooms import Doom, read_dooms
from tasks.checkpoints.manifest import MANIFEST_KEY, parse_manifest
from tasks.checkpoints.pins import checkpoint_name
from tasks.checkpoints.reader import Checkpoint, checkpoint_of


def kept_manifest_key(name: str) -> str:
    """Where the manifest of the collected checkpoint ``name`` (a folder below its run) stays."""
    return f"retention/collected/{name}.json"


def open_collected(url: str) -> tuple[Checkpoint, Doom] | None:
    """The checkpoint that was at ``url`` before retention took it away: its manifest holds, its tensors are gone.

    None if there is a checkpoint, or if retention knows nothing of one.
    """
    place = checkpoint_name(open_store(url).url)
    if place is None or open_store(url).exists(MANIFEST_KEY):
        return None
    run, name = open_store(place[0]), place[1]
    doom = read_dooms(run).get(name)
    data = run.read_if_present(kept_manifest_key(name)) if doom is not None else None
    if doom is None or data is None:
        return None
    manifest = parse_manifest(data, f"{run.url}/{kept_manifest_key(name)}")
    return (checkpoint_of(run.child(name), manifest, data), doom) if doom.is_of(manifest) else None
