"""`LLM`: the whole of loraserve in a Python process, without a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from loraserve.base.load import load_base
from loraserve.engine.generation import Generation
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.engine.text import TokenLogprob
from loraserve.errors import InvalidRequest
from loraserve.lora.spec import format_spec, parse_spec
from loraserve.registry import Registry

UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    adapter: str
    """The SPEC that answered, `base` for none."""
    logprobs: list[TokenLogprob] | None
    prompt_tokens: int


class LLM:
    """A frozen base and a directory of adapters.

    Args:
        base: `bundled`, a Hugging Face directory, a native `.pth`, or a hub id.
        adapters_dir: the registry; need not exist.
        tokenizer: the tokenizer's directory, for a `.pth`.
        device, dtype: see `load_base`.
        seed: makes requests without a seed of their own repeatable.
        limits: `max_model_len`, `max_num_seqs`, `kv_memory`, `adapter_memory`, `merge_memory` and `speculate` of
            `Service`.

    Usable as a context manager; `close` ends the engine's thread.
    """

    def __init__(
        self,
        base: str = "bundled",
        adapters_dir: str | Path = "adapters",
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        **limits: Any,
    ) -> None:
        loaded = load_base(base, device=device, dtype=dtype, tokenizer=tokenizer)
        registry = Registry(Path(adapters_dir), loaded.shapes, loaded.fingerprint)
        self.service = Service(loaded, registry, max_queue=UNBOUNDED, seed=seed, **limits)
        self.service.start()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's thread; the LLM cannot be used afterwards."""
        self.service.stop()

    def generate(
        self,
        prompts: str | list[int] | Sequence[str | list[int]],
        adapter: str | Sequence[str | None] | None = None,
        sampling: SamplingParams | None = None,
    ) -> list[Completion]:
        """Complete prompts, all in one continuous batch.

        Args:
            prompts: one prompt or many, each a text or a list of token ids.
            adapter: a SPEC for all, or one per prompt.
            sampling: by default greedy, up to 64 tokens.

        Returns:
            One Completion per prompt, in order.

        Raises:
            InvalidRequest: as many adapters as prompts are needed; and see `Service.generate`.
        """
        texts: list[str | list[int]]
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            texts = [prompts]  # type: ignore[list-item]
        else:
            texts = list(prompts)  # type: ignore[arg-type]
        specs = [adapter] * len(texts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(specs) != len(texts):
            raise InvalidRequest(f"{len(texts)} prompts need as many adapters, not {len(specs)}", param="adapter")
        sampling = sampling or SamplingParams(max_tokens=64, temperature=0.0)
        parsed = [parse_spec(spec) for spec in specs]
        generations: list[Generation] = []
        try:
            for text, spec in zip(texts, parsed, strict=True):
                ids = self.service.encode(text) if isinstance(text, str) else text
                generations.append(self.service.generate(ids, spec, sampling))
            return [_collect(g, format_spec(spec)) for g, spec in zip(generations, parsed, strict=True)]
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        adapter: str | None = None,
        sampling: SamplingParams | None = None,
        **template: Any,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: OpenAI's, each with `role` and `content`.
            adapter: a SPEC.
            sampling: by default greedy, as long as the context allows.
            template: variables for the chat template, such as `tools` or `open_thinking`.
        """
        prompt = self.service.base.template.render(messages, **template)
        ids = self.service.encode(prompt)
        return self.generate([ids], adapter, sampling or SamplingParams(temperature=0.0))[0]

    def logits(self, token_ids: list[int], adapter: str | None = None) -> Tensor:
        """Return the logits (T, vocab_size) float32 after each of `token_ids`."""
        return self.service.logits(token_ids, parse_spec(adapter))


def _collect(generation: Generation, adapter: str) -> Completion:
    text, ids, scores, reason = "", [], [], "stop"
    for piece in generation:
        text += piece.text
        ids += piece.token_ids
        scores += piece.logprobs or []
        reason = piece.finish_reason or reason
    return Completion(text, ids, reason, adapter, scores or None, generation.prompt_tokens)
