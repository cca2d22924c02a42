"""transformers + PEFT as a contestant: `generate` with `adapter_names`, its way of mixing adapters in one batch."""

import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from loraserve.bench.contestant import Case, Timing, arguments, compete


class Clock(transformers.LogitsProcessor):
    """Notes when each step's logits are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def main() -> None:
    args = arguments("transformers + PEFT, driven by stdin")
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype, attn_implementation="sdpa").eval()
    plain.generation_config.eos_token_id = plain.config.eos_token_id = None  # else generate() stops early
    found = (p.name for p in Path(args.adapters).iterdir() if p.is_dir() and not p.name.startswith("."))
    names = sorted(found, key=lambda n: (len(n), n))
    adapted: Any = None

    def with_adapters() -> Any:
        nonlocal adapted
        if adapted is None:
            adapted = peft.PeftModel.from_pretrained(plain, Path(args.adapters) / names[0], adapter_name=names[0])
            for name in names[1:]:
                adapted.load_adapter(Path(args.adapters) / name, adapter_name=name)
            adapted = adapted.to(dtype).eval()
        return adapted

    def run(case: Case) -> Timing:
        options: dict[str, Any] = {}
        model: Any = plain
        if case.adapters:
            model = with_adapters()
            if case.adapters > 1:
                options["adapter_names"] = [names[i % case.adapters] for i in range(case.clients)]
            else:
                model.set_adapter(names[0])
        else:
            assert adapted is None, "base cases come first: PEFT wraps the model in place"
        ids = torch.tensor(case.prompts())
        clock = Clock()
        config = transformers.GenerationConfig(
            max_new_tokens=case.new, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        )
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=transformers.LogitsProcessorList([clock]),
                **options,
            )
        seconds = time.perf_counter() - started
        assert out.shape[1] == case.prompt + case.new
        return Timing(seconds, [clock.times[0] - started] * case.clients)

    compete(run)


if __name__ == "__main__":
    main()
