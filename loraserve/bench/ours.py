"""loraserve's engine as a contestant: in process, no HTTP, as the peers are measured."""

import threading
import time
from pathlib import Path

from loraserve.base.load import load_base
from loraserve.bench.contestant import Case, Timing, arguments, compete
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Generation, Service
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry


def main() -> None:
    args = arguments("loraserve's engine, driven by stdin")
    base = load_base(args.base, dtype=args.dtype)
    registry = Registry(Path(args.adapters), base.shapes, base.fingerprint)
    service = Service(base, registry, max_model_len=512, max_num_seqs=64, max_queue=1000)
    service.start()

    def run(case: Case) -> Timing:
        params = SamplingParams(max_tokens=case.new, temperature=0.0, ignore_eos=True)
        specs = [parse_spec(f"a{i % case.adapters}" if case.adapters else None) for i in range(case.clients)]
        first = [0.0] * case.clients
        started = time.perf_counter()

        def consume(i: int, generation: Generation) -> None:
            count = len(next(generation).token_ids)
            first[i] = time.perf_counter() - started
            count += sum(len(piece.token_ids) for piece in generation)
            assert count == case.new

        generations = [service.generate(p, s, params) for p, s in zip(case.prompts(), specs, strict=True)]
        threads = [threading.Thread(target=consume, args=pair) for pair in enumerate(generations)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Timing(time.perf_counter() - started, first)

    compete(run)
    service.stop()


if __name__ == "__main__":
    main()
