"""A Ray session: join the cluster that was named, or start Ray on this machine and end it again."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.address import HOW_TO_AUTHENTICATE, require_driver_address
from cluster.capacity import require_cpus
from cluster.errors import ClusterUnreachable
from configs.errors import UserError

# Read by Ray at import and inherited by everything it starts.
JOINING = {"RAY_NUM_REDIS_GET_RETRIES": "5"}
"""Seconds that joining a cluster is tried; Ray's default is 20."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
OBJECT_STORE_BYTES = 150 << 20
"""Only names and receipts travel through Ray, so its object store stays small."""


@contextmanager
def ray_session(address: str | None, num_cpus: int) -> Iterator[None]:
    """Connect to Ray for the length of the block.

    ``address`` (or ``RAY_ADDRESS``) joins a running cluster, with ``RAY_AUTH_MODE`` as the environment
    says; otherwise Ray starts here with ``num_cpus`` logical CPUs, guarded by a token of its own, and
    ends with the block. Raises
    :class:`ClusterUnreachable` or :class:`UserError` within seconds where a cluster cannot be joined.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        for key, value in JOINING.items():
            os.environ.setdefault(key, value)
    else:
        # Ray listens on the network; the token keeps others out and is never written to disk.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        require_driver_address(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address:
        _join(address)
    else:
        ray.init(
            # Our own, even where another Ray runs on this machine.
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
        )
    # ray.init replaces the SIGTERM handler by one that aborts the process.
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        if address:
            require_cpus(1, "merges and evaluations")
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except AuthenticationError as error:
        raise UserError(f"the Ray cluster at {address} refused this driver; {HOW_TO_AUTHENTICATE}") from error
    except ConnectionError as error:
        raise ClusterUnreachable(
            f"something listens at {address}, but no Ray cluster let this driver join: if it is Ray, {HOW_TO_AUTHENTICATE}"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise UserError(
            f"the Ray cluster at {address} runs other versions than this driver: {' '.join(str(error).split())}; "
            "install the cluster's Ray and Python here, or submit the command to it (pma submit)"
        ) from error
