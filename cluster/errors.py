"""What the world does to us: storage that fails, leases that others hold, workers that die."""


class StorageError(Exception):
    """Object storage failed after the retries that make sense; what was committed is intact."""


class ObjectMissing(StorageError):
    """No object has this key."""


class ObjectExists(StorageError):
    """Create-if-absent found an object; nothing was written."""


class StorageDenied(StorageError):
    """Storage lets us read and not write."""


class ObjectTruncated(StorageError):
    """An object ends before the bytes that were asked for: damaged, or still being written."""


class StorageFull(StorageError):
    """No space is left; free some and run the same command again."""


class LeaseHeld(Exception):
    """Someone else holds the lease; the message names the holder. Exit code 75."""


class LeaseLost(Exception):
    """Our lease is not in force; whatever we were about to publish must not be published."""


class LeaseExpired(LeaseLost):
    """Our lease expired unrenewed and nobody took it over; publish nothing unless the holder renews it, as it still may."""


class GangFailed(Exception):
    """Training workers failed more often than the restart budget allows."""


class ClusterUnreachable(Exception):
    """No Ray cluster answers at the address, or it stopped answering for longer than we wait."""


class JobFailed(Exception):
    """A submitted job ended without success; the process ends with the pipeline's own exit code and JSON object."""

    def __init__(self, message: str, exit_code: int, answer: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.answer = answer or {}


class JobDetached(KeyboardInterrupt):
    """Ctrl-C while a job's log was followed; the job itself goes on. Exit code 130."""
