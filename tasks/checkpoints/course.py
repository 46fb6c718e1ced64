"""What earlier recoveries changed for good: the course that training keeps, through resumes and into branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.typed import parse_record
from tasks.checkpoints.recoveries import Recovery
from tasks.data.skips import SkipRange

COURSE_KEY = "course"
"""Of ``state.json``; absent while the course is the schedule's own."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How learning rate and data differ from what the configuration alone says."""

    learning_rate_scale: float = 1.0
    """Factor on the schedule's learning rate."""
    rewarm_from_tokens: int = 0
    """Tokens seen where the last recovery's re-warm-up began."""
    rewarm_tokens: int = 0
    """Tokens over which the learning rate rises linearly from 0 after that; 0 for none."""
    skips: tuple[SkipRange, ...] = ()
    """Stretches of the data stream that are never read."""

    def factor_at(self, tokens: float) -> float:
        """What the schedule's learning rate is multiplied by when ``tokens`` have been seen."""
        if not self.rewarm_tokens:
            return self.learning_rate_scale
        risen = (tokens - self.rewarm_from_tokens) / self.rewarm_tokens
        return self.learning_rate_scale * min(1.0, max(0.0, risen))


AS_CONFIGURED = Course()


def course_of(recovery: Recovery) -> Course:
    """The course from ``recovery`` on; it holds what earlier ones changed, too."""
    return Course(
        learning_rate_scale=recovery.learning_rate_scale,
        rewarm_from_tokens=recovery.start.tokens_seen,
        rewarm_tokens=recovery.rewarm_tokens,
        skips=recovery.skips,
    )


def course_fields(course: Course) -> dict[str, Any]:
    """What ``state.json`` holds of ``course``: nothing where it is the schedule's own."""
    return {} if course == AS_CONFIGURED else {COURSE_KEY: dataclasses.asdict(course)}


def read_course(scalars: Mapping[str, Any]) -> Course:
    """The course that the checkpoint with these scalars was trained on."""
    return parse_record(Course, scalars[COURSE_KEY]) if COURSE_KEY in scalars else AS_CONFIGURED
