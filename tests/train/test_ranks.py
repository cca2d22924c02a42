"""Several processes train what one process trains, and end together whatever happens to one of them."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from loraserve.cli.main import main
from loraserve.registry import Registry
from loraserve.train import memory
from loraserve.train.environment import NEEDED, VARIABLES
from loraserve.train.run import Run
from loraserve.train.trainer import _Trained
from tests.train.conftest import PAIRS, write_base
from tests.train.test_full_disk import files_up_to
from tests.train.test_kills import FORKS
from tests.train.test_train_command import arguments, run, wait_for  # noqa: F401

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def rank(line, folder, environment, limit, fails_after, in_use):
    """One process of a run: `loraserve train` as torchrun starts it, which keeps its weights for the test."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(folder / f"log-{environment['RANK']}", "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    loop = _Trained.loop

    def looped(self):
        loop(self)
        weights = [each.state()["weights"] for each in (run.optimizer for run in self.runs)]
        torch.save(weights, folder / f"weights-{environment['RANK']}.pt")

    window = Run.window

    def broken(self):
        if self.optimizer.step >= fails_after:
            raise OSError(errno.EIO, "Input/output error", "tokens")
        return window(self)

    _Trained.loop = looped
    if fails_after is not None:
        Run.window = broken
    memory.bytes_in_use = lambda base: in_use or 0  # which differs from one machine to the next
    if in_use is not None:
        memory.weight_bytes = lambda config, dtype, how: (20 if how else 30) << 20
    with files_up_to(limit) if limit else contextlib.nullcontext():
        main(["train", *map(str, line)])


class Ranks:
    """The processes of a run, the store where they meet, and a log of each."""

    def __init__(self, folder, size):
        self.folder, self.size, self.processes = folder, size, []
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False
        )

    def start(self, line, limit=None, last=(), last_fails_after=None, in_use=()):
        """Start all.

        Args:
            last: what the last one alone has on its command line.
            in_use: bytes of each without the base, which is then as if it had 30 MB, or 20 in fewer bits.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "GLOO_SOCKET_IFNAME": "lo"}
        meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        for i in range(self.size):
            environment = meeting | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(self.size)}
            own = ([*line, *last], last_fails_after) if i == self.size - 1 else (line, None)
            what = (own[0], self.folder, environment, limit, own[1], in_use[i] if in_use else None)
            self.processes.append(FORKS.Process(target=rank, args=what))
            self.processes[-1].start()
        return self

    def codes(self):
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]

    def logs(self):
        return [(self.folder / f"log-{i}").read_text() for i in range(self.size)]

    def errors(self):
        return [line for log in self.logs() for line in log.splitlines() if line.startswith("error: ")]

    def wait_for(self, text):
        while not any(text in log.read_text() for log in self.folder.glob("log-*")):
            assert all(process.is_alive() for process in self.processes), self.logs()
            time.sleep(0.01)

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def ranks(tmp_path):
    FORKS.set_forkserver_preload(["loraserve.train.trainer", "matplotlib.figure", "tests.train.test_ranks"])
    begun = []

    def begin(line, size=2, **how):
        begun.append(Ranks(tmp_path / f"ranks-{len(begun)}", size))
        return begun[-1].start(line, **how)

    yield begin
    for each in begun:
        each.end()


@pytest.fixture
def settings(arguments):  # noqa: F811
    """A run that learns enough for a difference to show."""
    return [*arguments, "--learning-rate", "1e-2", "--log-interval", "1", "--publish", "always"]


def records(registry, name):
    return [json.loads(line) for line in (registry.get(name).path / "metrics.jsonl").read_text().splitlines()]


def assert_alike(together, alone, name="robot"):
    """The same losses, norms and rates all along, and the same adapter, but for rounding."""
    found, expected = records(together, name), records(alone, name)
    assert len(found) == len(expected) > 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds"}:
            assert (ours[key] is None) == (theirs[key] is None)  # the norm inside a window
            assert (ours[key] or 0) == pytest.approx(theirs[key] or 0, abs=2e-3, rel=5e-3), (key, ours, theirs)
    ours, theirs = together.get(name).manifest, alone.get(name).manifest
    assert ours.recipe == theirs.recipe and ours.metrics["best_epoch"] == theirs.metrics["best_epoch"]
    ours, theirs = together.load(name).weights, alone.load(name).weights
    assert ours.keys() == theirs.keys()
    for target, weight in ours.items():
        assert weight.named_tensors.keys() == theirs[target].named_tensors.keys()
        for name, tensor in weight.named_tensors.items():
            torch.testing.assert_close(tensor, theirs[target].named_tensors[name], atol=3e-3, rtol=0)
    assert max(weight.B.abs().max() for weight in ours.values()) > 1e-2


def assert_same_bits(ranks):
    first, *others = [torch.load(ranks.folder / f"weights-{i}.pt") for i in range(ranks.size)]
    assert others and any(tensor.any() for weights in first for tensor in weights.values())
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)


def torchrun(*words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GLOO_SOCKET_IFNAME": "lo"}
    command, pipe = [*TORCHRUN, *words], subprocess.PIPE
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, env=environment)


def test_torchrun_trains_what_one_process_trains_and_one_process_goes_on_with_it(settings, tmp_path):
    settings += ["--epochs", "15", "--val-split", "0.1", "--accumulation-steps", "2"]
    alone, together = Registry(tmp_path / "alone"), Registry(tmp_path / "adapters")
    assert run(*settings, "--adapters-dir", tmp_path / "alone").exit_code == 0
    with torchrun("-m", "loraserve", "train", *settings) as process:
        wait_for(process, "step 10/60")
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(errors) == 1, stderr
    assert "stopped by SIGTERM after step" in errors[0] and "--resume to go on" in errors[0]
    assert together.names() == []
    result = run(*settings, "--resume")
    assert result.exit_code == 0 and "resuming after step 1" in result.stderr
    assert_alike(together, alone)


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed_and_the_run_goes_on(settings, tmp_path):
    """Catches processes that look for those of the first start."""
    settings += ["--epochs", "15", "--save-interval", "5", "--resume"]
    with torchrun("--max-restarts", "1", "-m", "loraserve", "train", *settings) as process:
        wait_for(process, "step 20/60")
        psutil.Process(process.pid).children()[-1].kill()
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming after step" in stderr, stderr
    assert run(*settings, "--adapters-dir", tmp_path / "alone").exit_code == 0
    assert_alike(Registry(tmp_path / "adapters"), Registry(tmp_path / "alone"))


SETTINGS = {
    "accumulation": "--accumulation-steps 3 --grad-clip 0.2 --val-split 0.2 --lora-plus-ratio 4",
    "mean": "--loss-reduction mean --accumulation-steps 2 --random-system-prompt 0.5 --val-split 0.1 --targets all",
    "lonely": "--batch-size 1 --val-split 0.1 --patience 1 --epochs 4",
    "half": "--batch-size 1 --dtype float16",
    "budget": "--memory-budget 3MB --batch-size 8 --epochs 3",
    "dora": "--dora --val-split 0.1 --accumulation-steps 2",
    "quantized": "--quantize int8 --val-split 0.1",
}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("accumulation", 2),
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name, size in zip(SETTINGS, (3, 2, 3, 2, 2, 2, 3), strict=True)
        ),
    ],
)
def test_each_way_to_train_gives_what_one_process_gives(ranks, settings, tmp_path, name, size):
    """Catches a loss over a rank's own tokens, gradients added twice or by some, and ranks that drift apart.

    In `lonely` and `half` all but one rank have no row in a step.
    """
    settings += SETTINGS[name].split()
    together = ranks(settings, size)
    assert together.codes() == [0] * size, together.logs()
    assert_same_bits(together)
    assert [bool(log) for log in together.logs()] == [True] + [False] * (size - 1)
    assert ("passes of up to" in together.logs()[0]) == (name == "budget")
    assert run(*settings, "--adapters-dir", tmp_path / "alone", "--memory-budget", "64GB").exit_code == 0
    assert_alike(Registry(tmp_path / "adapters"), Registry(tmp_path / "alone"))
    assert [path.name for path in (tmp_path / "adapters" / ".training").iterdir()] == ["robot.lock"]


@pytest.mark.parametrize("in_use", [(0, 10 << 20), (10 << 20, 0)])
def test_all_keep_the_base_in_the_bits_that_one_of_them_needs(ranks, settings, tmp_path, in_use):
    """Catches ranks that choose for themselves, and would train on different bases."""
    together = ranks([*settings, "--memory-budget", "35MB"], in_use=in_use)
    assert together.codes() == [0, 0], together.logs()
    assert_same_bits(together)
    reason = "otherwise the least is" if in_use[0] else "for want of memory in another process"
    assert f"the base's layers in int8 ({reason}" in together.logs()[0]
    assert Registry(tmp_path / "adapters").get("robot").manifest.recipe["quantize"] == "int8"
    assert run(*settings, "--adapters-dir", tmp_path / "alone", "--quantize", "int8").exit_code == 0
    assert_alike(Registry(tmp_path / "adapters"), Registry(tmp_path / "alone"))


@pytest.mark.slow
def test_preference_pairs_are_learned_as_by_one_process(ranks, settings, tmp_path, write_rows):
    def messages(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": messages(q, a), "rejected": messages(q, a[::-1])} for q, a in PAIRS * 2]
    data = write_rows(tmp_path / "likes.jsonl", rows)
    settings[settings.index("--data") + 1] = data
    settings += ["--name", "robot", "--objective", "dpo", "--val-split", "0.2", "--accumulation-steps", "2"]
    together = ranks(settings)
    assert together.codes() == [0, 0], together.logs()
    assert_same_bits(together)
    assert run(*settings, "--adapters-dir", tmp_path / "alone").exit_code == 0
    assert_alike(Registry(tmp_path / "adapters"), Registry(tmp_path / "alone"))
    assert "reward_margin" in records(Registry(tmp_path / "adapters"), "robot")[1]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["tokens", "mean"])
def test_experts_that_meet_no_row_are_left_as_by_one_process(ranks, settings, tmp_path, reduction):
    """Each rank runs the dialogue that it would alone, so with `mean`, too, experts are balanced over the same rows."""
    base = write_base(tmp_path / "moe", num_experts=4)
    settings += ["--base", base, "--batch-size", "1", "--loss-reduction", reduction]
    together = ranks(settings)
    assert together.codes() == [0, 0], together.logs()
    assert_same_bits(together)
    assert run(*settings, "--adapters-dir", tmp_path / "alone").exit_code == 0
    assert_alike(Registry(tmp_path / "adapters"), Registry(tmp_path / "alone"))


@pytest.mark.slow
def test_a_set_and_a_sweep_come_out_as_by_one_process(ranks, settings, dialogue_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(dialogue_file.read_text().replace("robot", "parrot"))
    settings += ["--val-split", "0.1"]
    several = [*settings, "--name", "robot", "--data", other, "--name", "parrot"]
    rate = settings.index("--learning-rate")
    sweeping = [*settings[:rate], *settings[rate + 2 :], "--name", "swept", "--lr-sweep", "1e-4,1e-2,1e30"]
    alone, together = Registry(tmp_path / "alone"), Registry(tmp_path / "adapters")
    for line, names in ((several, ("robot", "parrot")), (sweeping, ("swept",))):
        processes = ranks(line)
        assert processes.codes() == [0, 0], processes.logs()
        assert processes.logs()[1] == ""
        assert run(*line, "--adapters-dir", tmp_path / "alone").exit_code == 0
        for name in names:
            assert_alike(together, alone, name)
    assert together.get("swept").manifest.metrics["lr_sweep"]["1e+30"] is None
    failing = ranks([*several, "--learning-rate", "1e30"])
    assert failing.codes() == [1, 1]
    assert [line.partition(": the loss")[0] for line in failing.errors()] == ["error: 'robot'", "error: 'parrot'"]


@pytest.mark.parametrize(
    "kills", [[(1, 2, 18)], pytest.param([(0, 2, 14), (1, 3, 22), (2, 3, 30)], marks=pytest.mark.slow)]
)
def test_one_process_is_stopped_more_go_on_and_one_of_them_is_killed(ranks, settings, tmp_path, kills):
    """From one process to two or three and back to one, with a kill of each rank; nothing is lost on the way."""
    settings += ["--epochs", "30", "--save-interval", "4", "--val-split", "0.1", "--resume"]
    alone, together = Registry(tmp_path / "alone"), Registry(tmp_path / "adapters")
    assert run(*settings, "--adapters-dir", tmp_path / "alone").exit_code == 0
    first = ranks(settings, 1)
    first.wait_for("step 6/120")
    first.processes[0].terminate()
    assert first.codes() == [130] and "stopped by SIGTERM" in first.errors()[0]
    for victim, size, step in kills:
        killed = ranks(settings, size)
        killed.wait_for(f"step {step}/120")
        killed.processes[victim].kill()
        codes = killed.codes()
        assert codes.pop(victim) == -signal.SIGKILL and set(codes) == {1}
        assert "resuming after step" in killed.logs()[0]
        assert len(killed.errors()) == 1, killed.logs()
        assert "another process of this run was killed or cannot be reached" in killed.errors()[0]
        assert together.names() == []
    stopped = ranks(settings, 2)
    stopped.wait_for("step 38/120")
    stopped.processes[1].terminate()  # the other one knows of no signal
    assert set(stopped.codes()) <= {1, 130}
    assert len(stopped.errors()) == 1 and "stopped by SIGTERM after step" in stopped.errors()[0]
    result = run(*settings)
    assert result.exit_code == 0 and "resuming after step" in result.stderr
    assert_alike(together, alone)


@pytest.mark.parametrize(
    ("extra", "code", "text"),
    [
        ("--epochs many", 2, "'many' is not a valid integer"),
        ("--data {folder}/bad.jsonl", 1, "bad.jsonl: no row can be used; 1 row cannot be used: line 1: broken JSON"),
        ("--learning-rate 1e30", 1, "the loss became"),
        ("--base {folder}/none", 1, "none"),
    ],
)
def test_a_mistake_is_told_once_and_ends_all(ranks, arguments, tmp_path, extra, code, text):  # noqa: F811
    (tmp_path / "bad.jsonl").write_text("{")
    extra = extra.format(folder=tmp_path).split()
    line = [*arguments[:2], *arguments[4:]] if "--data" in extra else arguments
    together = ranks([*line, *extra])
    codes = together.codes()
    assert set(codes) <= {1, code} and code in codes
    assert len(together.errors()) == 1 and text in together.errors()[0], together.logs()
    assert "Traceback" not in "".join(together.logs())
    assert Registry(tmp_path / "adapters").names() == []


@pytest.mark.parametrize(
    ("last", "after", "text"),
    [
        (["--seed", "7"], None, "process 1 has another seed than process 0; give all of them the same files"),
        ([], 5, "tokens: Input/output error"),
    ],
)
def test_what_fails_on_one_process_is_told_by_it_and_ends_all(ranks, settings, last, after, text):
    together = ranks([*settings, "--save-interval", "2"], last=last, last_fails_after=after)
    assert 0 not in together.codes()
    assert together.logs()[1] == f"{together.errors()[0]}\n" and text in together.errors()[0], together.logs()
    assert len(together.errors()) == 1
    if after:
        again = ranks([*settings, "--resume"])
        assert again.codes() == [0, 0] and "resuming after step 4 of 8" in again.logs()[0]


def test_a_disk_that_is_full_ends_all_and_the_run_goes_on_when_there_is_room(ranks, settings, tmp_path):
    settings += ["--resume", "--save-interval", "1"]
    assert run(*settings, "--adapters-dir", tmp_path / "alone").exit_code == 0
    full = ranks(settings, limit=20_000)
    assert sorted(full.codes()) == [1, 1]
    assert len(full.errors()) == 1 and "cannot save the run in" in full.errors()[0], full.logs()
    again = ranks(settings)
    assert again.codes() == [0, 0], again.logs()
    assert_alike(Registry(tmp_path / "adapters"), Registry(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "0"}, "the environment has RANK and not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "the environment has RANK and not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE and not RANK, MASTER_ADDR, MASTER_PORT"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
            "not MASTER_ADDR: start several processes with torchrun",
        ),
        (dict.fromkeys(NEEDED, "2"), "RANK=2 and WORLD_SIZE=2 are no process of a run"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"MASTER_ADDR": "127.0.0.1"}, None),
    ],
)
def test_an_environment_that_says_half_of_it_is_refused(arguments, monkeypatch, environment, text):  # noqa: F811
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for line in ((*arguments, "--dry-run"), (*arguments, "--epochs", "many")) if text else ((*arguments, "--dry-run"),):
        result = run(*line)
        assert result.exit_code == (2 if text else 0)
        assert not text or (text in result.stderr and len(result.stderr.splitlines()) == 1)


def test_a_dry_run_is_printed_once(ranks, arguments, tmp_path):  # noqa: F811
    together = ranks([*arguments, "--dry-run"])
    assert together.codes() == [0, 0]
    shown, silent = together.logs()
    assert shown.count("14 accepted") == 1 and silent == ""
