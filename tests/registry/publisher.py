"""A process that publishes adapters, for tests that kill it. Forks a child per line of standard input.

    loop              publish seed after seed until killed
    times N FIRST     publish seeds FIRST to FIRST+N-1
    crash K           publish one, and die without a trace at the K-th call that changes the file system
    limit BYTES       publish one while no file may grow beyond BYTES, and print the error's class and text

A child's process number is printed first; `done` when a child that was not killed has ended.
"""

import itertools
import os
import resource
import sys
from collections.abc import Callable

import torch

from loraserve.base.config import ModelConfig
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.config import LoraConfig
from loraserve.registry import Registry

SHAPES = ModelConfig(97, 32, 2, 4, 2, 8, 48).linear_shapes()
CALLS = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync")


def adapter_of(seed: int) -> tuple[Adapter, LoraConfig]:
    config = LoraConfig(r=1 + seed % 5, lora_alpha=2, target_modules=("q_proj", "v_proj"))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        target: LoraWeight(
            torch.randn(config.r, width, generator=generator),
            torch.randn(out, config.r, generator=generator),
            config.scaling_of(target),
        )
        for target, (out, width) in SHAPES.items()
        if config.matches(target)
    }
    return Adapter(weights, "x"), config


def publish(root: str, seed: int) -> None:
    adapter, config = adapter_of(seed)
    Registry(root, SHAPES).publish("x", adapter, config, {"metrics": {"seed": seed}}, {"README.md": b"card %d" % seed})


def die_at(number: int) -> None:
    """Let the `number`-th call that changes the file system, and every one after, never return."""
    count = itertools.count(1)

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(count) >= number:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def run(root: str, seed: int, action: str, *numbers: str) -> None:
    if action == "loop":
        for each in itertools.count(seed):
            publish(root, each)
    elif action == "times":
        for each in range(int(numbers[1]), int(numbers[1]) + int(numbers[0])):
            publish(root, each)
    elif action == "crash":
        die_at(int(numbers[0]))
        publish(root, seed)
    elif action == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(numbers[0]), resource.RLIM_INFINITY))
        try:
            publish(root, seed)
        except Exception as error:
            print(type(error).__name__, error, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed, line in enumerate(sys.stdin):
        child = os.fork()
        if not child:
            run(sys.argv[1], 1000 * (seed + 1), *line.split())
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("done", flush=True)
