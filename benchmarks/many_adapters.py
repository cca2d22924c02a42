"""What thousands of adapters cost: starting, traffic over more of them than fit in memory, a cold one, and the others.

    python benchmarks/many_adapters.py                 # some minutes; the last line of stdout is JSON
    python benchmarks/many_adapters.py --quick         # a look

A random minimind-3 (64M) in bfloat16 with rank-8 all-linear adapters. A few files stand for many adapters: the names
share them as hard links, which the engine does not know, so each is read, checked and converted for itself. Rounds are
interleaved, and medians are given.

    start      `loraserve serve` from launch to ready, with few and with many adapters registered
    traffic    clients in a closed loop, each request for the next of many adapters, beside the same with a resident few
    cold       time to first token of an adapter that is on disk (in the page cache), beside the same when it is loaded
    base       time to first token of base requests while adapters are loaded all the time, beside loaded ones asked for
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from loraserve.base.load import Base, load_base
from loraserve.bench.contestants import free_port
from loraserve.bench.machine import machine
from loraserve.bench.models import make_adapters, make_base, minimind3_config
from loraserve.bench.over_http import wait_until_ready
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.lora.spec import Spec, parse_spec
from loraserve.registry import Registry

FILES = 16
"""Adapters with files of their own; the others are links to them."""
BASE: Spec = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registered", type=int, default=10_000, help="adapters at the start")
    parser.add_argument("--adapters", type=int, default=1000, help="distinct adapters of the traffic")
    parser.add_argument("--room", type=int, default=64, help="adapters that fit in memory")
    parser.add_argument("--few", type=int, default=8, help="adapters of the traffic it is compared with")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round of traffic")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["start", "traffic", "cold", "base"], action="append")
    parser.add_argument("--quick", action="store_true", help="small figures for all of these")
    args = parser.parse_args()
    if args.quick:
        args.registered, args.seconds, args.repeats = 2000, 6.0, 2
    with tempfile.TemporaryDirectory() as scratch:
        base_path, adapters = Path(scratch) / "base", Path(scratch) / "adapters"
        made = make_base(base_path, minimind3_config())
        make_adapters(made, adapters, [f"a{i}" for i in range(FILES)], 8)
        result: dict[str, Any] = {"machine": machine()}
        if not args.only or "start" in args.only:
            result["start"] = start(Path(scratch), base_path, adapters / "a0", args.registered, args.repeats)
            print(result["start"], file=sys.stderr)
        base = load_base(str(base_path), device="cpu", dtype="bfloat16")
        multiply(adapters, args.adapters)
        for name, measure in (("traffic", traffic), ("cold", cold), ("base", beside)):
            if not args.only or name in args.only:
                result[name] = measure(base, adapters, args)
                print(name, result[name], file=sys.stderr)
    print(json.dumps(result))


def multiply(adapters: Path, count: int) -> None:
    """Make the adapters a0 … `count` in number, by hard links to the files of the first ones."""
    for i in range(FILES, count):
        source, target = adapters / f"a{i % FILES}", adapters / f"a{i}"
        target.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors", "loraserve.json"):
            os.link(source / file, target / file)


def start(scratch: Path, base: Path, sample: Path, many: int, repeats: int) -> dict[str, float]:
    """Seconds until the server is ready, with 10 and with `many` tiny adapters registered."""
    tensors = load_file(sample / "adapter_model.safetensors")
    tiny = {key: tensor[..., :1, :] if ".lora_A." in key else tensor[:, :1] for key, tensor in tensors.items()
            if ".layers.0.self_attn.q_proj." in key}  # fmt: skip
    config = json.loads((sample / "adapter_config.json").read_text())
    config |= {"r": 1, "lora_alpha": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    registries = {}
    for count in (10, many):
        registries[count] = scratch / f"registered-{count}"
        for i in range(count):
            folder = registries[count] / f"tiny-{i:05}"
            folder.mkdir(parents=True)
            save_file({key: tensor.copy() for key, tensor in tiny.items()}, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config))
    seconds: dict[int, list[float]] = {count: [] for count in registries}
    for _ in range(repeats):
        for count, registry in registries.items():
            seconds[count].append(_start(base, registry))
    shutil.rmtree(registries[many])
    few, lots = (round(statistics.median(seconds[count]), 2) for count in (10, many))
    return {"registered": many, "few_s": few, "many_s": lots, "more_s": round(lots - few, 2)}


def _start(base: Path, adapters: Path) -> float:
    port = free_port()
    command = [sys.executable, "-m", "loraserve", "serve", "--base", str(base), "--adapters-dir", str(adapters)]
    began = time.perf_counter()
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(server, port, "/ready", timeout=300.0)
        return time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()


def traffic(base: Base, adapters: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second over many adapters and over a few that stay, and the longest wait beyond a request's turn."""
    loads = {"few": args.few, "many": args.adapters}
    services = {name: _service(base, adapters, args.room, args.clients) for name in loads}
    names = {name: itertools.cycle(range(count)) for name, count in loads.items()}
    waits = {name: _watch(service) for name, service in services.items()}
    rates: dict[str, list[float]] = {name: [] for name in loads}
    for repeat in range(-1, args.repeats):  # the first is a warm-up
        for name, service in services.items():
            rate = _closed_loop(service, args, names[name], args.seconds if repeat >= 0 else min(args.seconds, 5.0))
            if repeat >= 0:
                rates[name].append(rate)
    stats = services["many"].stats()
    for service in services.values():
        service.stop()
    few, many = (statistics.median(rates[name]) for name in ("few", "many"))
    return {
        "few_tokens_per_s": round(few, 1),
        "many_tokens_per_s": round(many, 1),
        "ratio": round(many / few, 3),
        "longest_wait_beyond_turn_s": round(max(waits["many"], default=0.0), 3),
        "loads": stats["adapter_loads_total"],
        "load_ms": round(stats["adapter_load_seconds_total"] / max(stats["adapter_loads_total"], 1) * 1e3, 2),
    }


def _service(base: Base, adapters: Path, room: int, slots: int) -> Service:
    registry = Registry(adapters, base.shapes, base.fingerprint)
    size = registry.get("a0").num_parameters * base.dtype.itemsize
    limits = {"max_model_len": 512, "max_num_seqs": slots, "max_queue": 1000, "adapter_memory": room * size}
    service = Service(base, registry, prefix_memory=0, **limits)  # every prompt is the same, and computed all the same
    service.start()
    return service


def _watch(service: Service) -> list[float]:
    """Collect the seconds between each request's turn and its admission."""
    waits: list[float] = []
    scheduler = service._engine.scheduler
    schedule = scheduler.schedule

    def watched(now: float) -> Any:
        waiting = set(scheduler.waiting)
        chunks = schedule(now)
        waits.extend(now - s.turn for s in scheduler.running if s in waiting and s.turn is not None)
        return chunks

    scheduler.schedule = watched  # type: ignore[method-assign]
    return waits


def _closed_loop(service: Service, args: argparse.Namespace, names: Iterator[int], seconds: float) -> float:
    """Tokens per second of clients that ask again as soon as they are answered."""
    deadline = time.perf_counter() + seconds
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    lock, counts = threading.Lock(), [0] * args.clients

    def client(number: int) -> None:
        while time.perf_counter() < deadline:
            with lock:
                spec = parse_spec(f"a{next(names)}")
            for piece in service.generate(list(range(10, 42)), spec, params):
                counts[number] += len(piece.token_ids)

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def cold(base: Base, adapters: Path, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to the first token of an idle server: cold, loaded, and loaded again after it was dropped."""
    service = _service(base, adapters, args.room, 4)
    for _ in range(5):
        _first_token(service, parse_spec("a0"))
    samples: dict[str, list[float]] = {"cold": [], "warm": [], "again": []}
    for i in range(1, min(args.adapters, 12 * args.repeats)):
        spec = parse_spec(f"a{i}")
        samples["cold"].append(_first_token(service, spec))
        samples["warm"].append(_first_token(service, spec))
        service.unload(f"a{i}")
        samples["again"].append(_first_token(service, spec))
    service.stop()
    medians = {f"{name}_ms": round(statistics.median(times), 2) for name, times in samples.items()}
    more = statistics.median(c - w for c, w in zip(samples["cold"], samples["warm"], strict=True))
    return {**medians, "cold_more_ms": round(more, 2)}


def beside(base: Base, adapters: Path, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to a base request's first token while clients ask for cold adapters, and for loaded ones."""
    service = _service(base, adapters, args.room, 8)
    samples: dict[str, list[float]] = {"loaded": [], "loading": []}
    cold_names = itertools.cycle(range(args.few, args.adapters))
    loaded_names = itertools.cycle(range(args.few))
    for _ in range(args.repeats):
        for kind, names in (("loaded", loaded_names), ("loading", cold_names)):
            samples[kind] += _base_beside(service, lambda names=names: f"a{next(names)}")  # type: ignore[misc]
    service.stop()
    result: dict[str, float] = {}
    for kind, times in samples.items():
        result[f"{kind}_ms"] = round(statistics.median(times), 2)
        result[f"{kind}_p95_ms"] = round(statistics.quantiles(times, n=20)[-1], 2)
    return result


def _base_beside(service: Service, name: Callable[[], str], count: int = 40) -> list[float]:
    """Times of base requests while four clients ask for one adapter after the other."""
    over, lock = threading.Event(), threading.Lock()

    def client() -> None:
        while not over.is_set():
            with lock:
                spec = parse_spec(name())
            _first_token(service, spec)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    times = [_first_token(service, BASE) for _ in range(count)]
    over.set()
    for thread in threads:
        thread.join()
    return times


def _first_token(service: Service, spec: Spec) -> float:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    generation = service.generate(list(range(10, 26)), spec, params)
    next(generation)
    taken = (time.perf_counter() - began) * 1e3
    for _ in generation:
        pass
    return taken


if __name__ == "__main__":
    main()
