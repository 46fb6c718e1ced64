"""What a merge plan says: tensors, tasks and merges as frozen values that print as JSON and are executed as they stand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.checkpoints.groups import group_names
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import tensor_bytes
from tasks.merging.methods import MethodChoice
from tasks.merging.policy import MergePolicy

Vector = tuple[float | None, ...]
"""A weight per input; None where an input is no part of the sum, which is not the same as a weight of zero."""
CHUNK_BYTES = 1 << 20
"""Read at a time from one input: sum, term and data stay in the second-level cache."""
WORKER_BASE_BYTES = 160 << 20
"""Allowance for a worker process before any chunk (measured: 45 MiB as a local process, 130 MiB as a Ray task)."""
SUM_BYTES_PER_CHUNK_BYTE = 8
"""Buffers of one merge, for the narrowest dtype: a float32 sum, the rounded output and terms, per byte of bfloat16 read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output and where its inputs lie."""

    name: str
    """Disk name, the same in every input."""
    sources: tuple[TensorPlace, ...]
    """Where each input holds it, oldest first."""
    read_as: str | None
    """Dtype that inputs are rounded or widened to before they are added; None: as stored."""
    accumulate: str
    """``F32`` or ``F64``; empty for tensors that are compared, not averaged."""
    write_dtype: str
    """Dtype of the output."""
    vector: int
    """Which of an output's weight vectors holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return self.sources[0].shape

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs."""
        return sum(place.num_bytes for place in self.sources)

    @property
    def write_bytes(self) -> int:
        """Bytes written for one merge."""
        return tensor_bytes(self.write_dtype, self.shape)


@dataclass(frozen=True, kw_only=True)
class TaskOutput:
    """One merge that a task works for."""

    url: str
    """Folder of the merged checkpoint."""
    vectors: tuple[Vector, ...]
    """Weight vectors that the tensors refer to."""
    identity: str
    """Identity of the merge, so that a receipt of other inputs at the same places is not taken for this one's."""


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """One output shard of every merge of the plan: everything a worker needs, as names and numbers."""

    number: int
    """From 1 over the whole plan."""
    part: Literal["model", "state"]
    """Whether the shard holds weights or training state."""
    place: tuple[int, int]
    """Which shard of how many of its part, from 1."""
    outputs: tuple[TaskOutput, ...]
    """The merges."""
    input_urls: tuple[str, ...]
    """Folders that the inputs' tensors lie in, oldest first."""
    tensors: tuple[PlannedTensor, ...]
    """In file order."""
    chunk_bytes: int = CHUNK_BYTES
    """Bytes read at a time from one input; does not change the result."""
    buffers: int = 1
    """Reads in flight; does not change the result."""

    @property
    def shard_key(self) -> str:
        """Key of the output shard."""
        return f"{self.part}-{self.place[0]:05d}-of-{self.place[1]:05d}.safetensors"

    @property
    def parameter_groups(self) -> tuple[str, ...]:
        """Groups that the shard holds, wholly or in part."""
        return tuple(group_names(tensor.name for tensor in self.tensors))

    @property
    def bytes_read(self) -> int:
        """Bytes read over all inputs that some merge uses."""
        return sum(
            place.num_bytes
            for tensor in self.tensors
            for index, place in enumerate(tensor.sources)
            if self.reads(tensor, index)
        )

    def reads(self, tensor: PlannedTensor, index: int) -> bool:
        """Whether input ``index`` is part of some sum, or a weight that must be hashed because no manifest states its digest."""
        if self.part == "model" and not tensor.sources[index].digest:
            return True
        return any(output.vectors[tensor.vector][index] is not None for output in self.outputs)

    @property
    def bytes_written(self) -> int:
        """Tensor bytes written over all merges."""
        return len(self.outputs) * sum(tensor.write_bytes for tensor in self.tensors)

    @property
    def memory_bytes(self) -> int:
        """Most memory the worker needs; depends on chunk, reads in flight and number of merges, not on N or the model."""
        return WORKER_BASE_BYTES + self.chunk_bytes * (self.buffers + SUM_BYTES_PER_CHUNK_BYTE * len(self.outputs))


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A whole merge; several of one set of inputs share their tasks."""

    output_url: str
    """Folder of the merged checkpoint."""
    inputs: tuple[Checkpoint, ...]
    """Of this merge, oldest first."""
    choice: MethodChoice
    """Method and parameters."""
    weights: tuple[float, ...]
    """One per input."""
    dtypes: dict[str, str]
    """Read, accumulate and write rules, for the manifest."""
    policy: MergePolicy
    """What becomes of each tensor."""
    tasks: tuple[MergeTask, ...] = field(repr=False)
    """One per output shard."""
    number: int = 0
    """Which output of the tasks this merge is."""
    first_input: int = 0
    """Which input of the tasks is this merge's oldest."""
    identity: str
    """Fingerprint of inputs, weights, dtypes and policy: what determines the bytes."""

    @property
    def method(self) -> str:
        """Merge method."""
        return self.choice.method

    def rows(self) -> list[dict[str, Any]]:
        """The plan as the command line's JSON has it."""
        return [
            {
                "task": task.number,
                "parameter_groups": list(task.parameter_groups),
                "bytes_read": task.bytes_read,
                "bytes_written": task.bytes_written,
                "memory_bytes": task.memory_bytes,
            }
            for task in self.tasks
        ]
