"""The group itself: what it imports, how it spells options, what it says and returns when something fails."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from loraserve.cli import main as module
from loraserve.cli.main import SUMMARIES, LazyGroup, main
from loraserve.cli.options import LoraserveCommand
from loraserve.errors import AdapterNotFound, LoraserveError, TrainingInterrupted

ERRORS = {
    "lost": AdapterNotFound("pirat", ["pirate", "poet"]),
    "lines": LoraserveError("the first line\n  and the second"),
    "stopped": TrainingInterrupted("the run is saved; go on with --resume"),
    "ctrl-c": KeyboardInterrupt(),
    "bug": ValueError("this should not be"),
    "disk": OSError(28, "No space left on device", "out/model"),
    "memory": MemoryError("8 GiB"),
}


class Probe(LazyGroup):
    """The real group around commands that fail, print or return."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.commands.get(cmd_name)


@pytest.fixture
def probe() -> Probe:
    group = Probe("loraserve")

    def add(name: str, error: BaseException) -> None:
        @group.command(name)
        def fail() -> None:
            raise error

    for name, error in ERRORS.items():
        add(name, error)

    @group.command("echo", cls=LoraserveCommand)
    @click.option("--batch-size", type=int)
    @click.option("--under_scored", default="")
    @click.option("--use-moe/--no-use-moe", default=False)
    @click.option("--kind", type=click.Choice(["all-linear", "all_linear_too"]))
    @click.argument("words", nargs=-1)
    def echo(**values: object) -> None:
        click.echo(repr(values))

    @group.command("three")
    def three() -> int:
        return 3

    @group.command("log")
    def log() -> None:
        logging.getLogger("loraserve.train").info("step %d", 7)
        logging.getLogger("loraserve.train").debug("details")

    return group


def run(group: click.Group, *args: str) -> Result:
    return CliRunner().invoke(group, args, prog_name="loraserve")


def test_help_and_version_import_no_command_and_nothing_heavy() -> None:
    code = (
        "import sys\nfrom loraserve.cli.main import main\n"
        "for line in (['--help'], ['--version']):\n"
        "    try: main(line)\n    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'flask', 'numpy', 'jinja2', 'tokenizers', 'transformers', 'huggingface_hub'}\n"
        f"commands = {{f'loraserve.cli.{{name}}' for name in {list(SUMMARIES)}}}\n"
        "assert not (heavy | commands) & set(sys.modules), (heavy | commands) & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loraserve 0" in done.stdout


def test_help_lists_the_commands_that_are_there_with_their_own_summaries() -> None:
    shown = run(main, "--help").stdout
    folder = Path(module.__file__).parent
    for name, summary in SUMMARIES.items():
        there = (folder / f"{name}.py").exists()
        assert (f"  {name} " in shown) == there
        if there:
            command = main.get_command(click.Context(main), name)
            assert command is not None
            assert command.help is not None
            assert command.help.partition("\n")[0] == summary


def test_every_command_of_every_group_helps_and_knows_debug() -> None:
    def walk(command: click.Command, path: list[str]) -> None:
        shown = run(main, *path, "--help")
        assert shown.exit_code == 0
        assert "--debug" in shown.stdout
        assert run(main, *path, "-h").stdout == shown.stdout
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                child = command.get_command(click.Context(command), name)
                assert child is not None
                walk(child, [*path, name])

    walk(main, [])


@pytest.mark.parametrize("size", [["--batch-size", "4"], ["--batch_size", "4"], ["--batch_size=4"], ["--batch-size=4"]])
@pytest.mark.parametrize("other", ["--under-scored", "--under_scored"])
def test_hyphens_and_underscores_are_one_in_names_of_options(probe: Probe, size: list[str], other: str) -> None:
    result = run(probe, "echo", *size, other, "x", "--use_moe")
    assert result.exit_code == 0, result.stderr
    assert eval(result.stdout) == {
        "batch_size": 4, "under_scored": "x", "use_moe": True, "kind": None, "words": ()
    }  # fmt: skip


def test_values_and_arguments_keep_their_underscores(probe: Probe) -> None:
    line = [
        "--under_scored=--full_sft",
        "--under-scored",
        "--a_b",
        "--kind",
        "all_linear_too",
        "out_dir",
        "--",
        "--c_d",
    ]
    values = eval(run(probe, "echo", *line).stdout)
    assert values["under_scored"] == "--a_b"
    assert values["kind"] == "all_linear_too"
    assert values["words"] == ("out_dir", "--c_d")
    assert eval(run(probe, "echo", "--under_scored=--full_sft").stdout)["under_scored"] == "--full_sft"


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("lost", 1, "error: no adapter named 'pirat'; did you mean 'pirate'?"),
        ("lines", 1, "error: the first line; and the second"),
        ("stopped", 130, "error: the run is saved; go on with --resume"),
        ("ctrl-c", 130, "interrupted"),
        (
            "bug",
            1,
            "error: unexpected ValueError: this should not be; run it again with --debug and report the traceback",
        ),
        ("disk", 1, "error: out/model: No space left on device"),
        (
            "memory",
            1,
            "error: out of memory (8 GiB); use a smaller batch, context or number of sequences, or another --device",
        ),
    ],
)
def test_a_failure_is_one_line_and_a_code(probe: Probe, name: str, code: int, line: str) -> None:
    result = run(probe, name)
    assert result.exit_code == code
    assert result.stderr.strip() == line
    assert result.stdout == ""


@pytest.mark.parametrize("line", [["--debug", "lost"], ["lost", "--debug"]])
def test_debug_adds_the_traceback_wherever_it_stands(probe: Probe, line: list[str]) -> None:
    result = run(probe, *line)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "raise error" in result.stderr
    assert result.stderr.strip().endswith("did you mean 'pirate'?")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["ech"], "error: no command named 'ech'; did you mean 'echo'? (see loraserve --help)"),
        (["zzz"], "error: no command named 'zzz' (see loraserve --help)"),
        (["echo", "--batchsize", "3"], "no such option '--batchsize'. Did you mean '--batch-size'?"),
        (["echo", "--batch_siz", "3"], "Did you mean '--batch-size'?"),
        (["echo", "--batch-size", "many"], "'many' is not a valid integer (see loraserve echo --help)"),
        (["echo", "--kind", "none"], "'none' is not one of"),
    ],
)
def test_wrong_usage_is_one_line_that_helps_and_code_2(probe: Probe, line: list[str], says: str) -> None:
    result = run(probe, *line)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_mistyped_commands_of_subgroups_are_answered_with_close_matches() -> None:
    result = run(main, "base", "sho")
    assert result.exit_code == 2
    assert result.stderr == "error: no command named 'sho'; did you mean 'show'? (see loraserve base --help)\n"


def test_no_command_at_all_shows_the_help(probe: Probe) -> None:
    result = run(main)
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_a_number_returned_by_a_command_is_the_exit_code(probe: Probe) -> None:
    assert run(probe, "three").exit_code == 3
    assert run(probe, "echo").exit_code == 0


def test_log_lines_go_to_stderr_once_with_time_where_they_are_kept(probe: Probe) -> None:
    for _ in range(2):
        result = run(probe, "log")
        assert result.stdout == ""
        assert result.stderr.count("step 7") == 1
        assert " INFO step 7" in result.stderr
        assert "details" not in result.stderr


def test_debug_messages_end_with_the_command_that_asked_for_them(probe: Probe) -> None:
    assert "details" in run(probe, "log", "--debug").stderr
    assert "details" not in run(probe, "log").stderr


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m loraserve version | head -0; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stderr.strip() in ("0", "1")  # 0 if all was written before the reader left
    line = "import click, sys\nfrom loraserve.cli.main import main\n" + (
        "@main.command('flood')\ndef flood():\n    while True: click.echo('x' * 1000)\n"
        "type(main).get_command = lambda self, ctx, name: self.commands.get(name)\nmain(['flood'])\n"
    )
    flood = f'{sys.executable} -c "$CODE" | head -1 | wc -c; echo ${{PIPESTATUS[0]}} >&2'
    done = subprocess.run(
        ["bash", "-c", flood],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"CODE": line, "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.strip() == "1001"
    assert done.stderr.strip() == "1"


def test_ctrl_c_ends_a_process_with_130(tmp_path: Path) -> None:
    code = (
        "import click, time\nfrom loraserve.cli.main import main\n"
        "@main.command('wait')\ndef wait():\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "type(main).get_command = lambda self, ctx, name: self.commands.get(name)\nmain(['wait'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip() == "interrupted"
