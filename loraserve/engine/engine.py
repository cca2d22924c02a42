"""The engine: `schedule → run → postprocess`. Token ids in, token ids out; not thread-safe, see `worker`."""

import time
from collections.abc import Callable

from loraserve.engine.runner import Runner
from loraserve.engine.scheduler import Chunk, Scheduler
from loraserve.engine.sequence import Sequence, Token
from loraserve.errors import LoraserveError, NotFinite
from loraserve.lora.adapter import Adapter

Event = Token | LoraserveError
"""What a step brings a sequence: a token, or the end by a failure of its own."""


class Engine:
    """Continuous batching over one model."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self.scheduler = scheduler
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0
        self._stalled = False  # whoever waits, waits for something that no step brings

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work and not self._stalled

    def add(self, sequence: Sequence) -> None:
        self._stalled = False
        self.scheduler.add(sequence)

    def wake(self) -> None:
        """Look again at those who wait: adapters may have arrived."""
        self._stalled = False

    def forget(self, adapter: Adapter) -> None:
        """Let go of an adapter that has been dropped from memory."""
        self._runner.forget(adapter)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is; harmless if it has ended already."""
        if not sequence.aborted:
            sequence.aborted = True
            sound = bool(sequence.output_token_ids)  # else nobody has looked at its numbers yet
            self._end(sequence, sound)

    def _end(self, sequence: Sequence, sound: bool) -> None:
        if not sound:
            self._runner.clear(sequence, 0, sequence.num_tokens)
        self._release(sequence, sound)

    def step(self, meanwhile: Callable[[bool], None] = lambda reads_prompts: None) -> list[tuple[Sequence, Event]]:
        """Advance every scheduled sequence; return the tokens that were generated, with reasons to stop.

        A sequence whose logits are not finite ends with NotFinite; the others never notice.

        Args:
            meanwhile: called, once or more, when all that is left is for the model to compute, if anything is, with
                whether prompts are among it, which take longer.
        """
        chunks = self.scheduler.schedule(time.monotonic())
        self._stalled = not chunks
        if not chunks:
            return []
        for copy in self.scheduler.copies:
            self._runner.copy(copy.source, copy.target, copy.count)
        reads_prompts = any(chunk.count > 1 for chunk in chunks)
        sampled = self._runner.run(chunks, lambda: meanwhile(reads_prompts))
        self.num_steps += 1
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.count
            self.num_prompt_tokens += chunk.count if chunk.start < len(chunk.sequence.prompt_token_ids) else 0
        return [(chunk.sequence, event) for chunk, tokens in sampled for event in self._postprocess(chunk, tokens)]

    def _postprocess(self, chunk: Chunk, tokens: list[Token | None]) -> list[Event]:
        """Append the token sampled after a chunk, and those after its drafts as long as the drafts are what came."""
        sequence, drafts = chunk.sequence, chunk.drafts
        if drafts and None in tokens:
            # One row's NaN may have reached the others by the cache: all of them are computed again, without drafts.
            self._runner.clear(sequence, chunk.start, chunk.num_rows)
            sequence.num_computed = chunk.start
            sequence.lookup.learn(len(drafts), 0)
            return []
        events: list[Event] = []
        for token, draft in zip(tokens, (*drafts, None), strict=True):
            if token is None:
                sequence.aborted = True
                self._end(sequence, sound=False)
                return [NotFinite()]
            reason = sequence.append(token.token_id)
            events.append(Token(token.token_id, reason, token.logprob, token.top_logprobs))
            if reason:
                self._release(sequence)
            if reason or token.token_id != draft:
                break
            sequence.num_computed += 1  # the draft, whose keys and values are there
        self.num_generated_tokens += len(events)
        if drafts:
            self.num_drafted_tokens += len(drafts)
            self.num_accepted_tokens += len(events) - 1
            sequence.lookup.learn(len(drafts), len(events) - 1)
        return events

    def _release(self, sequence: Sequence, sound: bool = True) -> None:
        self._stalled = False
        self.scheduler.release(sequence, sound)
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.adapters = ()
        if not self.scheduler.running:
            self._runner.forget_adapters()
