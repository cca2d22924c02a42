"""vLLM's in-process engine loop as a contestant.

Runs under the interpreter of vLLM's own environment, so it imports nothing of this package: the protocol is loaded by
its path.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

_spec = importlib.util.spec_from_file_location("contestant", Path(__file__).with_name("contestant.py"))
assert _spec and _spec.loader
contestant = importlib.util.module_from_spec(_spec)
sys.modules["contestant"] = contestant
_spec.loader.exec_module(contestant)


def main() -> None:
    args, channel = contestant.arguments("vLLM, driven by stdin")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine steps in this process
    import vllm
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {}
    if args.num_adapters:
        lora = {"enable_lora": True, "max_loras": args.num_adapters, "max_lora_rank": args.r}
    engine = vllm.LLM(
        model=args.base,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        seed=0,
        **lora,
    ).llm_engine
    numbers: dict[str, int] = {}
    count = 0

    def lora_of(name: str | None) -> Any:
        if name is None:
            return None
        number = numbers.setdefault(name, len(numbers) + 1)
        return LoRARequest(name, number, os.path.join(args.adapters, name))

    def serve(requests: list[Any]) -> list[Any]:
        nonlocal count
        answers = {}
        for request in requests:
            params = vllm.SamplingParams(temperature=0.0, max_tokens=request.new, ignore_eos=True)
            count += 1
            answers[str(count)] = contestant.Answer([], [])
            prompt = {"prompt_token_ids": request.prompt}
            engine.add_request(str(count), prompt, params, lora_request=lora_of(request.adapter))
        while engine.has_unfinished_requests():
            for output in engine.step():
                # An engine may append to a request's number to keep it unique.
                answer = answers[output.request_id.partition("-")[0]]
                answer.times.append(time.perf_counter())
                answer.token_ids[:] = output.outputs[0].token_ids
        return list(answers.values())

    contestant.compete(serve, channel, version=f"vllm {vllm.__version__}")


if __name__ == "__main__":
    main()
