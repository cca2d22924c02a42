"""Steps that only decode, recorded once for each size and replayed: on a GPU as CUDA graphs.

A small model's step is a few hundred kernels of some microseconds each; to launch them takes longer than to run them. A
recording has fixed shapes and addresses, so a step is padded to the next bucket of rows and of adapters' entries, its
inputs are written into buffers, and everything that changes between steps lies in those or in the cache. Padding has no
slot of the cache and no entries: it stores nothing, and no row reads another's. Steps without adapters have recordings
of their own, without adapters' code.

What cannot be recorded, the caller runs as usual: prompts, models with experts (whose rows choose their shapes), and
more adapters or entries than there is room for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from loraserve.base.model import Model
from loraserve.engine.kv_cache import KVCache
from loraserve.engine.scheduler import Chunk
from loraserve.kernels import dispatch
from loraserve.kernels.dispatch import Kernels
from loraserve.lora.adapter import Adapter
from loraserve.lora.table import AdapterTable

MAX_ADAPTERS = 64
MAX_ENTRIES_PER_ROW = 16
"""Adapters of the largest blend."""

Step = Callable[[], Tensor]
"""Computes a step from the buffers; replaying it computes it again from what they hold then."""


class DecodeGraphs:
    """Recorded steps of one model over one cache. The model must be packed, and have kernels.

    Args:
        record: turns a step into one that can be replayed; `cuda_graphs()` on a GPU.
    """

    def __init__(self, model: Model, cache: KVCache, record: Callable[[Step], Step]) -> None:
        weight, config = model.lm_head.weight, model.config
        kernels = dispatch.of(weight.device, weight.dtype, config.head_dim)
        assert kernels is not None and model.model.fused and not config.num_experts
        self._model, self._cache, self._kernels, self._record = model, cache, kernels, record
        self._max_rows = cache.num_slots
        self._inputs = torch.zeros(3 * self._max_rows, dtype=torch.int64, device=weight.device)
        max_entries = self._max_rows * MAX_ENTRIES_PER_ROW
        self._adapters = AdapterTable(config.linear_shapes(), MAX_ADAPTERS, max_entries, weight.device, weight.dtype)
        self._steps: dict[tuple[int, int], tuple[Step, Tensor]] = {}

    def run(self, chunks: list[Chunk]) -> Tensor | None:
        """Compute a step in which every sequence decodes.

        Returns:
            The logits (len(chunks), vocab_size), valid until the next call; None if the step cannot be recorded.
        """
        if any(chunk.num_rows != 1 or not chunk.samples for chunk in chunks):
            return None
        entries = [(row, adapter, weight) for row, chunk in enumerate(chunks)
                   for adapter, weight in chunk.sequence.adapters if weight]  # fmt: skip
        active: dict[Adapter, None] = dict.fromkeys(adapter for _, adapter, _ in entries)
        if len(entries) > self._adapters.max_entries or not self._adapters.fits(active):
            return None
        rows = bucket(len(chunks), self._max_rows)
        padded = bucket(max(len(entries), rows), self._adapters.max_entries) if entries else 0
        if entries:
            if self._adapters.hold(active):
                self._steps = {key: step for key, step in self._steps.items() if not key[1]}
            self._adapters.fill(entries, padded)
        columns = [(chunk.sequence.tokens(chunk.start, 1)[0], chunk.start, chunk.sequence.slot) for chunk in chunks]
        columns += [(0, 0, -1)] * (rows - len(chunks))
        self._inputs[: 3 * rows].copy_(torch.tensor(columns).T.flatten(), non_blocking=True)
        return self._step(rows, padded)()[: len(chunks)]

    def forget_adapters(self) -> None:
        """Let go of the adapters of past steps."""
        self._adapters.forget()

    def forget(self, adapter: Adapter) -> None:
        """Let go of one of them."""
        self._adapters.drop(adapter)

    def _step(self, rows: int, padded: int) -> Step:
        if (rows, padded) not in self._steps:
            # A recording reads the table of positions where it lay, even after a longer one has replaced it.
            table = self._model.model.rope.reach(self._cache.max_model_len)
            with torch.cuda.device_of(table):
                self._steps[rows, padded] = self._record(lambda: self._forward(rows, padded)), table
        return self._steps[rows, padded][0]

    def _forward(self, rows: int, padded: int) -> Tensor:
        input_ids, positions, slots = self._inputs[: 3 * rows].view(3, rows)
        attention = _FixedAttention(self._kernels, self._cache, slots, positions)
        return self._model(input_ids, positions, attention, self._adapters.batch(padded) if padded else None)


class _FixedAttention:
    """One token of each of some slots, wherever the buffers say that they are."""

    def __init__(self, kernels: Kernels, cache: KVCache, slots: Tensor, positions: Tensor) -> None:
        self.max_position = cache.max_model_len
        self.cached = None
        self._kernels, self._cache, self._slots, self._positions = kernels, cache, slots, positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (N, H, D)
        self._kernels.store_and_attend(q, k, v, self._cache.keys[layer], self._cache.values[layer], self._slots,
                                       self._positions, len(self._slots), self.max_position, out)  # fmt: skip
        return out


def bucket(count: int, most: int) -> int:
    """The next power of two, or `most`."""
    return min(1 << (count - 1).bit_length(), most)


def cuda_graphs() -> Callable[[Step], Step]:
    """What records steps as CUDA graphs. They share memory, for no two run at once and their results are used up."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles kernels and makes what is made once, which a recording must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load adapters meanwhile: what they allocate and copy is not this recording's business.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture
