"""Execute one merge task: stream its chunks, add, hash, write its output shards, leave receipts.

Runs in any process that reaches the storage. Safe to run twice or at once: the same inputs give the
same bytes, and a shard never overwrites another.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from cluster.errors import ObjectExists
from cluster.read_ahead import fill_ahead
from cluster.storage import open_store
from tasks.checkpoints.digest import new_hasher
from tasks.checkpoints.safetensors_header import DTYPE_BYTES, CheckpointError
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.checkpoints.writer import ShardWriter, open_shard
from tasks.merging.chunks import Chunk, Segment, cut_chunks
from tasks.merging.kernel import ChunkSum, first_nonfinite_stored, new_sum
from tasks.merging.planned import MergeTask, PlannedTensor, TaskOutput, Vector
from tasks.merging.receipt import Receipt, read_receipt, task_identity, write_receipt
from tasks.peak_memory import peak_resident_bytes


def execute_task(task: MergeTask) -> list[Receipt]:
    """Run ``task`` for those of its merges that have no receipt of it yet; receipts in the order of its merges.

    Raises :class:`CheckpointError` naming tensor, input and index for non-finite values, for integers
    that differ, and for input bytes that do not match the digest in their manifest.
    """
    stores = [open_store(output.url) for output in task.outputs]
    receipts = {i: found for i, store in enumerate(stores) if (found := read_receipt(store, task, i)) is not None}
    todo = [i for i in range(len(stores)) if i not in receipts]
    if todo:
        try:
            made = _merge_shards(task, todo, attempt="")
        except ObjectExists:
            # An earlier attempt left a shard of this name: nothing is ever overwritten, and names are free.
            made = _merge_shards(task, todo, attempt=secrets.token_hex(4))
        for receipt in made:
            write_receipt(stores[receipt.output], receipt)
            receipts[receipt.output] = receipt
    return [receipts[i] for i in range(len(stores))]


def _merge_shards(task: MergeTask, todo: Sequence[int], attempt: str) -> list[Receipt]:
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(open_store(url))) for url in task.input_urls]
        specs = [(tensor.name, tensor.write_dtype, tensor.shape) for tensor in task.tensors]
        writers = [
            stack.enter_context(open_shard(open_store(task.outputs[i].url), _key(task, i, attempt), specs, task.part))
            for i in todo
        ]
        run = _TaskRun(task, [task.outputs[i] for i in todo], readers, writers)
        run.run()
    return [
        Receipt(
            task=task.number,
            output=i,
            identity=task_identity(task, i),
            shard=writer.shard(),
            input_digests=tuple(run.input_digests),
            bytes_read=run.bytes_read if i == todo[0] else 0,
            peak_memory_bytes=peak_resident_bytes(),
        )
        for i, writer in zip(todo, writers, strict=True)
    ]


def _key(task: MergeTask, output: int, attempt: str) -> str:
    """The shard's plain name, or an attempt name beside it where that is taken."""
    if not attempt and not open_store(task.outputs[output].url).exists(task.shard_key):
        return task.shard_key
    return f"{task.shard_key.removesuffix('.safetensors')}.{attempt or secrets.token_hex(4)}.safetensors"


class _TaskRun:
    """Streams the chunks of one task through its sums, and remembers the digests of what it read."""

    def __init__(
        self,
        task: MergeTask,
        outputs: Sequence[TaskOutput],
        readers: Sequence[TensorReader],
        writers: Sequence[ShardWriter],
    ) -> None:
        self.task, self.outputs, self.readers, self.writers = task, outputs, readers, writers
        self.input_digests: list[dict[str, str]] = [{} for _ in readers]
        self.bytes_read = 0
        self._hashers: dict[tuple[str, int], Any] = {}
        self._sums: dict[Any, list[ChunkSum]] = {}

    def run(self) -> None:
        """Merge every chunk and hand it to the writers."""
        for tensor in self.task.tensors:
            if not tensor.num_elements:
                for index in range(len(self.readers)):
                    self._record_digest(tensor, index, str(new_hasher().hexdigest()))
        chunks = list(cut_chunks(self.task.tensors, self.task.chunk_bytes))
        fills = (self._fill(chunk, index) for chunk in chunks for index in self._inputs_of(chunk))
        filled = fill_ahead(fills, num_buffers=self.task.buffers, buffer_bytes=self.task.chunk_bytes)
        for chunk in chunks:
            if chunk[0].tensor.accumulate:
                self._average(chunk, filled)
            else:
                self._compare(chunk, filled)

    def _inputs_of(self, chunk: Chunk) -> list[int]:
        return [index for index in range(len(self.readers)) if self.task.reads(chunk[0].tensor, index)]

    def _fill(self, chunk: Chunk, index: int) -> Callable[[memoryview], int]:
        return functools.partial(_fill, self.readers[index], chunk, index)

    def _average(self, chunk: Chunk, filled: Iterator[memoryview]) -> None:
        tensor = chunk[0].tensor
        sums = self._sums_of(tensor)
        started = [False] * len(sums)
        for index in self._inputs_of(chunk):
            data = next(filled)
            self._hash(chunk, index, data)
            for number, (chunk_sum, output) in enumerate(zip(sums, self.outputs, strict=True)):
                vector = output.vectors[tensor.vector]
                if vector[index] is not None:
                    weight = vector[index] if equal_weight(vector) is None else None
                    chunk_sum.add(data, tensor.sources[index].dtype, weight, first=not started[number])
                    started[number] = True
        size = sum(segment.size for segment in chunk)
        for chunk_sum, output, writer in zip(sums, self.outputs, self.writers, strict=True):
            scale = equal_weight(output.vectors[tensor.vector])
            stored, bad = chunk_sum.store(size, tensor.write_dtype, scale)
            if bad is not None:
                stored = self._rescue(chunk, bytearray(stored), bad, output)
            writer.write(stored)

    def _sums_of(self, tensor: PlannedTensor) -> list[ChunkSum]:
        dtypes = tuple(place.dtype for place in tensor.sources)
        kind = (dtypes, tensor.read_as, tensor.accumulate)
        if kind not in self._sums:
            size = self.task.chunk_bytes // max(DTYPE_BYTES[dtype] for dtype in dtypes) + 1
            self._sums[kind] = [new_sum(size, dtypes, tensor.read_as, tensor.accumulate) for _ in self.outputs]
        return self._sums[kind]

    def _compare(self, chunk: Chunk, filled: Iterator[memoryview]) -> None:
        """Integers: the values of the newest input of each merge, after they were found equal to its others'."""
        read = {}
        for index in self._inputs_of(chunk):
            data = next(filled)
            self._hash(chunk, index, data)
            read[index] = bytes(data)
        for output, writer in zip(self.outputs, self.writers, strict=True):
            members = [i for i, weight in enumerate(output.vectors[chunk[0].tensor.vector]) if weight is not None]
            for index in members[:-1]:
                if read[index] != read[members[-1]]:
                    raise self._unequal(chunk, index, members[-1], read)
            writer.write(memoryview(read[members[-1]]))

    def _hash(self, chunk: Chunk, index: int, data: memoryview) -> None:
        self.bytes_read += len(data)
        position = 0
        for segment, length in _byte_lengths(chunk, index):
            key = (segment.tensor.name, index)
            hasher = self._hashers.get(key) or self._hashers.setdefault(key, new_hasher())
            hasher.update(data[position : position + length])
            position += length
            if segment.end == segment.tensor.num_elements:
                self._record_digest(segment.tensor, index, str(self._hashers.pop(key).hexdigest()))

    def _record_digest(self, tensor: PlannedTensor, index: int, digest: str) -> None:
        place = tensor.sources[index]
        if place.digest and place.digest != digest:
            raise CheckpointError(
                f"{self.task.input_urls[index]}/{place.regions[0].key}: tensor {tensor.name!r} has digest {digest[:16]}, "
                f"its manifest says {place.digest[:16]}: the object was changed or damaged after it was committed"
            )
        self.input_digests[index][tensor.name] = digest

    def _rescue(self, chunk: Chunk, stored: bytearray, bad: int, output: TaskOutput) -> memoryview:
        """Name the input that is not finite; if none is, equal weights overflowed before they were applied.

        Then only the elements that overflowed are weighted first and added after: so an element's bits do not depend
        on its neighbours.
        """
        vector = output.vectors[chunk[0].tensor.vector]
        members = [index for index, weight in enumerate(vector) if weight is not None]
        for index in members:
            self._require_finite(chunk, index)
        tensor = chunk[0].tensor
        size = sum(segment.size for segment in chunk)
        dtypes = tuple(place.dtype for place in tensor.sources)
        careful = new_sum(size, dtypes, tensor.read_as, tensor.accumulate)
        for index in members:
            data = memoryview(bytearray(self.task.chunk_bytes))
            length = _fill(self.readers[index], chunk, index, data)
            careful.add(data[:length], dtypes[index], vector[index], first=index == members[0])
        better, still_bad = careful.store(size, tensor.write_dtype)
        if still_bad is not None:
            segment, offset = _locate(chunk, still_bad)
            raise CheckpointError(
                f"the mean of tensor {segment.tensor.name!r} overflows {tensor.write_dtype} at element {offset}; "
                "all inputs are finite: choose a wider --dtype"
            )
        width = DTYPE_BYTES[tensor.write_dtype]
        for element in range(bad, size):
            place = slice(element * width, (element + 1) * width)
            if first_nonfinite_stored(stored[place], tensor.write_dtype) is not None:
                stored[place] = better[place]
        return memoryview(stored)

    def _require_finite(self, chunk: Chunk, index: int) -> None:
        for segment, length in _byte_lengths(chunk, index):
            data = memoryview(bytearray(length))
            place = segment.tensor.sources[index]
            self.readers[index].read_into(place, segment.start, segment.end, data)
            found = first_nonfinite_stored(data, place.dtype)
            if found is not None:
                raise CheckpointError(
                    f"{self.task.input_urls[index]}/{place.regions[0].key}: tensor {segment.tensor.name!r} "
                    f"is not finite at element {segment.start + found}"
                )

    def _unequal(self, chunk: Chunk, older: int, newest: int, read: dict[int, bytes]) -> CheckpointError:
        first = next(i for i, (a, b) in enumerate(zip(read[older], read[newest], strict=True)) if a != b)
        segment, offset = _locate(chunk, first // DTYPE_BYTES[chunk[0].tensor.write_dtype])
        return CheckpointError(
            f"integer tensor {segment.tensor.name!r} differs between {self.task.input_urls[older]} and "
            f"{self.task.input_urls[newest]} at element {offset}; integers are not averaged and must be equal "
            "(a policy with integers: newest takes the newest input's)"
        )


@functools.cache
def equal_weight(vector: Vector) -> float | None:
    """The weight that all members of a sum have; None where they differ."""
    weights = {weight for weight in vector if weight is not None}
    return weights.pop() if len(weights) == 1 else None


def _fill(reader: TensorReader, chunk: Chunk, index: int, buffer: memoryview) -> int:
    """Read one input's bytes of ``chunk``; neighbours in one object are read at once."""
    position, run, run_start, run_from = 0, None, 0, 0
    for segment, length in _byte_lengths(chunk, index):
        place = segment.tensor.sources[index]
        if place.is_whole:
            region = place.regions[0]
            start = region.offset + segment.start * DTYPE_BYTES[place.dtype]
            if run != region.key or start != run_start + position - run_from:
                _read_run(reader, run, run_start, buffer[run_from:position])
                run, run_start, run_from = region.key, start, position
        else:
            _read_run(reader, run, run_start, buffer[run_from:position])
            reader.read_into(place, segment.start, segment.end, buffer[position : position + length])
            run = None
        position += length
    _read_run(reader, run, run_start, buffer[run_from:position])
    return position


def _read_run(reader: TensorReader, key: str | None, start: int, buffer: memoryview) -> None:
    if key is not None:
        reader.read_bytes(key, start, buffer)


def _byte_lengths(chunk: Chunk, index: int) -> Iterator[tuple[Segment, int]]:
    for segment in chunk:
        yield segment, segment.size * DTYPE_BYTES[segment.tensor.sources[index].dtype]


def _locate(chunk: Chunk, element: int) -> tuple[Segment, int]:
    """The segment of a chunk's ``element`` and its index in the tensor."""
    for segment in chunk:
        if element < segment.size:
            return segment, segment.start + element
        element -= segment.size
    raise AssertionError("no such element in the chunk")
