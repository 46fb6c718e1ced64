"""Notice that this worker is about to be taken away: SIGTERM, or Ray's word that its node is being drained.

Ray Train runs the training function on a thread, where Python allows no signal handler, and Ray's own handler on the main
thread ends the process at once. :func:`preemptible` has every worker install ours on its main thread before training starts.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

_is_told = threading.Event()


def stop_requested() -> bool:
    """Whether this worker was told to end: write a last snapshot and return. Microseconds; ask on every step.

    Ranks are told at different moments, some never: reduce the answer over the gang before acting on it.
    """
    return _is_told.is_set() or _is_drained()


def install() -> bool:
    """From the main thread: the first SIGTERM only sets the flag, a second one does what the first did before.

    Whether it was installed: False on any other thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    before = signal.getsignal(signal.SIGTERM)

    def note(_signum: int, _frame: object) -> None:
        _is_told.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    return True


def preemptible(**settings: Any) -> Any:
    """A ``TorchConfig`` of ``settings`` whose workers call :func:`install` when the gang starts."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_start(worker_group, backend_config)
            # Runs as an ordinary call of the worker's actor, which Ray makes on the main thread.
            worker_group.execute(install)

    class Preemptible(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Preemptible(**settings)


def _is_drained() -> bool:
    """Whether Ray Train's watcher told this worker that a node of the gang is going away.

    Read where the watcher leaves it: the public ``ray.train.get_preemption_info`` is a barrier of the whole gang.
    """
    import sys

    context = sys.modules.get("ray.train.v2._internal.execution.context")
    current = getattr(context, "_train_context", None)
    preemption = getattr(current, "preemption_context", None)
    return getattr(preemption, "preemption_info", None) is not None
