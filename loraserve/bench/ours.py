"""loraserve's engine as a contestant: in process, no HTTP."""

import threading
import time
from pathlib import Path

from loraserve import __version__
from loraserve.base.load import load_base
from loraserve.bench.contestant import Answer, Request, arguments, compete
from loraserve.engine.generation import Generation
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry

ADAPTER_MEMORY = 8 << 30
MAX_QUEUE = 4096


def main() -> None:
    args, channel = arguments("loraserve's engine, driven by stdin")
    base = load_base(args.base, dtype=args.dtype)
    registry = Registry(Path(args.adapters), base.shapes, base.fingerprint)
    service = Service(
        base,
        registry,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_queue=MAX_QUEUE,
        adapter_memory=ADAPTER_MEMORY,
        speculate=0,  # random weights repeat themselves as no text does
        deterministic=args.deterministic,
    )
    service.start()

    def submit(request: Request) -> Generation:
        params = SamplingParams(max_tokens=request.new, temperature=0.0, ignore_eos=True)
        return service.generate(request.prompt, parse_spec(request.adapter), params)

    def consume(answer: Answer, generation: Generation) -> None:
        for piece in generation:
            answer.times.append(time.perf_counter())
            answer.token_ids.extend(piece.token_ids)

    def serve(requests: list[Request]) -> list[Answer]:
        answers = [Answer([], []) for _ in requests]
        threads = []
        for request, answer in zip(requests, answers, strict=True):
            threads.append(threading.Thread(target=consume, args=(answer, submit(request))))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return answers

    compete(serve, channel, version=__version__)
    service.stop()


if __name__ == "__main__":
    main()
