"""The engine: `schedule → run → postprocess`. Token ids in, token ids out; not thread-safe, see `worker`."""

import time

from loraserve.engine.runner import Runner
from loraserve.engine.scheduler import Scheduler
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
            self._runner.clear(sequence)
        self._release(sequence, sound)

    def step(self) -> list[tuple[Sequence, Event]]:
        """Advance every scheduled sequence; return the tokens that were generated, with reasons to stop.

        A sequence whose logits are not finite ends with NotFinite; the others never notice.
        """
        chunks = self.scheduler.schedule(time.monotonic())
        self._stalled = not chunks
        if not chunks:
            return []
        for copy in self.scheduler.copies:
            self._runner.copy(copy.source, copy.target, copy.count)
        sampled = self._runner.run(chunks)
        self.num_steps += 1
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.count
            self.num_prompt_tokens += chunk.count if chunk.start < len(chunk.sequence.prompt_token_ids) else 0
        results: list[tuple[Sequence, Event]] = []
        for sequence, token in sampled:
            if token is None:
                sequence.aborted = True
                self._end(sequence, sound=False)
                results.append((sequence, NotFinite()))
                continue
            reason = sequence.append(token.token_id)
            self.num_generated_tokens += 1
            if reason:
                self._release(sequence)
            results.append((sequence, Token(token.token_id, reason, token.logprob, token.top_logprobs)))
        return results

    def _release(self, sequence: Sequence, sound: bool = True) -> None:
        self._stalled = False
        self.scheduler.release(sequence, sound)
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.adapters = ()
        if not self.scheduler.running:
            self._runner.forget_adapters()
