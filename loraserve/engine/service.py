"""One base and its adapters, answering requests: the engine behind `LLM`, the server and the terminal chat.

Callers may be many threads; each gets a `Generation` to iterate. What can be refused is refused in `generate`, before
anything is queued; only a fault in an adapter's weights shows when they are loaded, and fails that request.
"""

import itertools
import secrets
from typing import Any

import torch
from torch import Tensor

from loraserve.base.attention import PackedAttention
from loraserve.base.load import Base
from loraserve.engine.adapter_cache import AdapterCache
from loraserve.engine.engine import Engine
from loraserve.engine.generation import Generation
from loraserve.engine.hot_merge import HotMerges, MergedAdapter
from loraserve.engine.kv_cache import KVCache
from loraserve.engine.params import SamplingParams
from loraserve.engine.runner import Runner
from loraserve.engine.scheduler import Scheduler
from loraserve.engine.sequence import Sequence
from loraserve.engine.slots import Slots
from loraserve.engine.text import TextStream
from loraserve.engine.worker import Worker
from loraserve.errors import ContextLengthExceeded, InvalidRequest
from loraserve.kernels.threads import apart
from loraserve.lora.batch import LoraBatch
from loraserve.lora.spec import Spec
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry

MAX_BATCHED_TOKENS = 512
ADAPTER_MEMORY = 1 << 30
"""Bytes of A and B on the device."""
PREFIX_MEMORY = 1 << 29
"""Bytes of keys and values of ended requests; on a CPU only what is used is taken."""
MERGE_MEMORY = 1 << 30
"""Bytes of merged layers on the device."""
MAX_PREFIXES = 256
"""Ended requests whose keys and values are kept at most: each newcomer is compared with all of them."""
MAX_ACTIVE_ADAPTERS = 64
"""Distinct adapters in one step; requests for more wait. Four times the largest blend."""

SPECULATE = 3
"""Drafts of a sequence in one step at most."""


class Service:
    """A base, a registry and an engine.

    Args:
        max_model_len: tokens of prompt and answer together; by default the base's limit, at most 2048.
        max_num_seqs: requests that run at once.
        max_queue: requests that may wait beyond those.
        kv_memory: bytes for keys and values; lowers `max_num_seqs` to what fits.
        adapter_memory: bytes for adapters on the device; a request waits until its own are among them.
        prefix_memory: bytes for keys and values of requests that have ended, beyond the free part of those for running
            ones; 0 turns the sharing of prefixes off.
        deterministic: a request's tokens do not depend on what else is in the batch, bit for bit.
        merge_memory: bytes for the layers of merged adapters; a merge that does not fit is refused.
        speculate: tokens that a sequence may guess in one step at most, 0 for none; see `speculation`. Only on a CPU,
            and for models without experts: elsewhere more rows cost more time.
        seed: makes requests without a seed of their own repeatable in order of submission.

    Raises:
        InvalidRequest: the limits contradict each other, or int8 or deterministic cannot be had on this machine.
    """

    def __init__(
        self,
        base: Base,
        registry: Registry,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_queue: int = 64,
        kv_memory: int | None = None,
        adapter_memory: int = ADAPTER_MEMORY,
        prefix_memory: int = PREFIX_MEMORY,
        deterministic: bool = False,
        merge_memory: int = MERGE_MEMORY,
        speculate: int = SPECULATE,
        seed: int | None = None,
    ) -> None:
        limit = base.config.max_position_embeddings
        self.max_model_len = max_model_len or min(limit, 2048)
        if self.max_model_len > limit:
            raise InvalidRequest(f"max-model-len {max_model_len} is beyond the base's {limit}", param="max_model_len")
        per_sequence = KVCache.bytes_per_token(base.config, base.dtype) * self.max_model_len
        self.max_num_seqs = max_num_seqs if kv_memory is None else min(max_num_seqs, kv_memory // per_sequence)
        if self.max_num_seqs < 1:
            raise InvalidRequest(
                f"no sequence fits: one of {self.max_model_len} tokens needs {per_sequence / 2**20:.0f} MiB of keys "
                "and values; raise --kv-memory or lower --max-model-len",
                param="kv_memory",
            )
        self.base = base
        self.registry = registry
        self.max_queue = max_queue
        self.adapters = AdapterCache(registry, base.device, base.dtype, adapter_memory, weight_of=base.weight_of)
        num_slots = self.max_num_seqs + min(prefix_memory // per_sequence, MAX_PREFIXES)
        self._slots = Slots(num_slots, share_prefixes=prefix_memory > 0)
        cache = apart(KVCache, base.config, num_slots, self.max_model_len, base.device, base.dtype)
        budget = max(MAX_BATCHED_TOKENS, self.max_num_seqs)
        drafts = speculate if base.device.type == "cpu" and not base.config.num_experts else 0
        scheduler = Scheduler(self._slots, self.max_num_seqs, budget, MAX_ACTIVE_ADAPTERS, drafts)
        self._engine = Engine(Runner(base.model, cache, base.int8, deterministic), scheduler)
        self._worker = Worker(self._engine, self.max_num_seqs + max_queue)
        self.adapters.on_change = lambda: self._worker.post(self._engine.wake)
        self.adapters.on_evict = lambda adapter: self._worker.post(lambda: self._engine.forget(adapter))
        self.merges = HotMerges(base, registry, merge_memory, self._worker.call)
        self._seed = seed
        self._numbers = itertools.count(1)

    def start(self) -> None:
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop()

    @property
    def ready(self) -> bool:
        return self._worker.ready

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            ContextLengthExceeded: no tokens of this base could fit it into the context, so it is not even read.
        """
        limit = self.max_model_len
        if len(text) > limit and len(text) > limit * self.base.tokenizer.longest_token:
            raise ContextLengthExceeded(
                f"the prompt's {len(text)} characters cannot fit the context of {limit} tokens; "
                "shorten the conversation",
                param="messages",
            )
        return self.base.tokenizer.encode(text)

    def generate(self, prompt_token_ids: list[int], spec: Spec, params: SamplingParams) -> Generation:
        """Queue a request.

        Args:
            prompt_token_ids: at least one token.
            spec: the adapters, see `parse_spec`; () is the base.

        Raises:
            AdapterNotFound, AdapterRefused: an adapter of the SPEC cannot be used, as far as can be told without its
                weights; what their load reveals comes from iterating the Generation.
            ContextLengthExceeded: prompt and max_tokens do not fit `max_model_len`.
            InvalidRequest: an empty prompt, a token id the base does not have, or adapters larger than the memory for
                them.
            QueueFull, NotReady: not now.
        """
        sequence = self._sequence(prompt_token_ids, spec, params)
        sequence.lease = None if sequence.merged else self.adapters.lease(spec)
        outbox = self._worker.submit(sequence)
        text = TextStream(self.base.tokenizer, params.stop, params.logprobs is not None)
        return Generation(self._worker, sequence, outbox, text)

    def logits(self, token_ids: list[int], spec: Spec = ()) -> Tensor:
        """Return the logits (T, vocab_size) float32 after each of `token_ids`, computed without a cache."""
        sequence = self._sequence(token_ids, spec, SamplingParams(max_tokens=1))

        def run() -> Tensor:
            attention = PackedAttention([len(token_ids)], self.base.device)
            stack = AdapterStack([adapter.weights for adapter, _ in held])
            entries = [(slot, weight) for slot, (_, weight) in enumerate(held)]
            lora = LoraBatch.from_segments(stack, [(len(token_ids), entries)], self.base.device)
            ids = torch.tensor(token_ids, device=self.base.device)
            model = sequence.merged.model if sequence.merged else self.base.model
            with torch.inference_mode():
                return model(ids, attention.positions, attention, lora).float()

        with self.adapters.hold(() if sequence.merged else spec) as held:
            return self._worker.call(run)

    def loaded(self) -> list[str]:
        """Names of the adapters that are in the device's memory."""
        return self.adapters.names()

    def is_loaded(self, name: str) -> bool:
        """Whether an adapter is in the device's memory."""
        return self.adapters.has(name)

    def is_pinned(self, name: str) -> bool:
        """Whether an adapter is kept there."""
        return name in self.adapters.pinned()

    def pin(self, name: str) -> None:
        """Bring an adapter to the device's memory and keep it there.

        Raises as `AdapterCache.pin` does; NotReady if the engine is not running.
        """
        self._worker.check_ready()
        self.adapters.pin(name)

    def unpin(self, name: str) -> None:
        """Let an adapter be dropped like any other."""
        self.adapters.unpin(name)

    def unload(self, name: str) -> bool:
        """Drop an adapter's copies in memory, its pin and its merge; requests that run on it end undisturbed."""
        merged, loaded = self.merges.drop(name), self.adapters.drop(name)
        return merged or loaded

    def merge(self, name: str) -> MergedAdapter:
        """Give an adapter merged layers of its own, so that it answers as fast as the base; see `HotMerges.merge`."""
        return self.merges.merge(name)

    def unmerge(self, name: str) -> bool:
        """Free an adapter's merged layers; return whether it had any. Requests that run on them end undisturbed."""
        return self.merges.drop(name)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges, as `/metrics` and `/health` show them."""
        scheduler = self._engine.scheduler
        return {
            "ready": self.ready,
            "requests_running": len(scheduler.running),
            "requests_waiting": max(self._worker.num_requests - len(scheduler.running), 0),
            "max_num_seqs": self.max_num_seqs,
            "max_queue": self.max_queue,
            "max_model_len": self.max_model_len,
            "requests_total": self._worker.num_submitted,
            "steps_total": self._engine.num_steps,
            "prompt_tokens_total": self._engine.num_prompt_tokens,
            "generated_tokens_total": self._engine.num_generated_tokens,
            "drafted_tokens_total": self._engine.num_drafted_tokens,
            "accepted_tokens_total": self._engine.num_accepted_tokens,
            "prefix_shared_tokens_total": self._slots.num_shared_tokens,
            "prefix_slots_held": self._slots.num_held,
            "adapters_loaded": len(self.adapters.names()),
            "adapters_pinned": len(self.adapters.pinned()),
            "adapters_waiting": self.adapters.num_waiting,
            "adapter_bytes": self.adapters.num_bytes,
            "adapter_host_bytes": self.adapters.host_bytes,
            "adapter_loads_total": self.adapters.num_loads,
            "adapter_load_seconds_total": self.adapters.load_seconds,
            "adapter_evictions_total": self.adapters.num_evictions,
            "adapters_merged": len(self.merges.current()),
            "merged_bytes": self.merges.num_bytes,
        }

    def _sequence(self, prompt: list[int], spec: Spec, params: SamplingParams) -> Sequence:
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        vocab = self.base.config.vocab_size
        if not all(0 <= token_id < vocab for token_id in prompt):
            raise InvalidRequest(f"the prompt has token ids outside 0 to {vocab - 1}", param="prompt")
        room = self.max_model_len - len(prompt)
        if room < (params.max_tokens or 1):
            asked = f" and max_tokens {params.max_tokens}" if params.max_tokens else ""
            raise ContextLengthExceeded(
                f"the prompt's {len(prompt)} tokens{asked} do not fit the context of {self.max_model_len} tokens; "
                "shorten the conversation or lower max_tokens",
                param="max_tokens" if room > 0 else "messages",
            )
        if params.seed is not None:
            seed = params.seed
        else:
            seed = secrets.randbits(63) if self._seed is None else hash((self._seed, next(self._numbers)))
        merged = self.merges.find(spec)
        eos = frozenset() if params.ignore_eos else self.base.eos_ids
        return Sequence(
            prompt_token_ids=list(prompt),
            params=params,
            max_tokens=params.max_tokens or room,
            stop_ids=eos | frozenset(params.stop_token_ids),
            seed=seed,
            merged=merged,
        )
