"""The processes of one training run, and what they tell each other.

    rank    which of them this is, from 0; rank 0 leads: it alone writes the run's files and says how it goes
    size    how many there are; in a run alone nothing here costs anything or changes a result

torchrun starts them, or whatever else sets the variables of `environment`. What is on CPUs goes by gloo, what is on
GPUs by NCCL. Every rank makes the same calls in the same order, and gets the same bits.

A rank that fails ends, which breaks what the others wait for, so that they end, too. Why is told once: by the first
that claims it in the store through which the ranks met.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from loraserve.errors import InvalidRequest, PeerFailed, ProcessLost
from loraserve.train.environment import rank_and_size

T = TypeVar("T")

PATIENCE = timedelta(days=2)
"""How long a rank waits for another: for the first one while it reads the data, and while it publishes."""
SPOKEN = "loraserve/spoken"


@dataclass(frozen=True)
class Ranks:
    """All processes of a run as one of them sees them. Raises ProcessLost wherever another one is gone."""

    rank: int = 0
    size: int = 1
    device: str = "auto"
    """Where this one's model runs, as `--device` has it."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over all ranks of each value."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with _connected():
            dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum([flag]) != [0]

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.any(False)

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Add up float32 tensors over all ranks, in place and in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _connected():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """What each rank has, in their order."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        with _connected():
            dist.all_gather_object(found, value)
        return found

    def from_lead(self, make: Callable[[], T]) -> T:
        """What `make` returns to the leading rank, which alone calls it; the others wait."""
        if self.size == 1:
            return make()
        box = [make() if self.leads else None]
        with _connected():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return cast(T, box[0])

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """Let the leading rank go through a block before the others: they find what it made."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


ALONE = Ranks()


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """Meet the other processes of this run for the duration of a block, in which only the leading one is heard.

    Args:
        device: `--device`; where there are several processes a GPU becomes that of LOCAL_RANK.

    Raises:
        InvalidRequest: see `rank_and_size`; or there is no GPU of that number.
        PeerFailed: instead of the error that ended the block, if another process says why.
    """
    if rank_and_size()[1] == 1:
        yield Ranks(device=device)
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # on one machine torchrun keeps its store for those it starts again
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        with _heard(rank == 0):
            yield Ranks(rank, size, _own_gpu() if on_gpus else device)
    except (Exception, KeyboardInterrupt) as error:
        if not _speaks(store):
            raise PeerFailed("another process of this run says why it ended") from error
        raise
    finally:
        dist.destroy_process_group()


def _own_gpu() -> str:
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise InvalidRequest(
            f"process {index + 1} of this machine has no GPU of its own, torch sees {count}; start no more processes "
            "than there are GPUs, or give --device cpu",
            param="device",
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"


@contextmanager
def _heard(heard: bool) -> Iterator[None]:
    if heard:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def _speaks(store: Store) -> bool:
    try:
        return bool(store.add(SPOKEN, 1) == 1)
    except RuntimeError:  # it has gone with the process that kept it
        return True


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            "another process of this run was killed or cannot be reached; nothing that was saved is lost: run the same "
            "command with --resume to go on from the last checkpoint"
        ) from error
