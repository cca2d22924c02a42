"""transformers + PEFT as a contestant: `generate` with `adapter_names`, its way of mixing adapters in one batch."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from loraserve.bench.contestant import Answer, Request, arguments, compete


class Clock(transformers.LogitsProcessor):
    """Notes when each step's logits are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def main() -> None:
    args, channel = arguments("transformers + PEFT, driven by stdin")
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # else generate() stops early
    loaded: set[str] = set()

    def load(name: str) -> None:
        nonlocal model
        path = Path(args.adapters) / name
        if not loaded:
            model = peft.PeftModel.from_pretrained(model, path, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
        loaded.add(name)

    def choose(requests: list[Request]) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
        """Load what is missing; return what to run in and the options that give each row its adapter."""
        names = [request.adapter for request in requests]
        for name in dict.fromkeys(names):
            if name and name not in loaded:
                load(name)
        if names[0] and len(set(names)) == 1:
            model.set_adapter(names[0])
            return nullcontext(), {}
        if any(names):
            return nullcontext(), {"adapter_names": names}
        return model.disable_adapter() if loaded else nullcontext(), {}

    def serve(requests: list[Request]) -> list[Answer]:
        chosen, options = choose(requests)
        clock, new = Clock(), requests[0].new
        ids = torch.tensor([request.prompt for request in requests], device=device)
        config = transformers.GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        )
        with torch.inference_mode(), chosen:
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=transformers.LogitsProcessorList([clock]),
                **options,
            )
        return [Answer(row, clock.times) for row in out[:, ids.shape[1] :].tolist()]

    compete(serve, channel, version=f"peft {peft.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
