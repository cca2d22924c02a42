"""`loraserve chat`: one answer on stdout, and the conversation at a real terminal."""

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loraserve import LLM, SamplingParams
from loraserve.base.load import Base
from loraserve.cli.conversation import Conversation, Screen
from loraserve.cli.repl import Repl
from loraserve.engine.service import Service
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry
from tests.cli.conftest import Cli, Shell

GREEDY = ["--temperature", "0", "--max-tokens", "12", "--dtype", "float32"]
SAMPLING = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def llm(base: Base, adapters_dir: Path) -> Iterator[LLM]:
    with LLM(str(base.path), adapters_dir, device="cpu", dtype="float32") as llm:
        yield llm


def answer(llm: LLM, spec: str, *said: str, system: str | None = None) -> str:
    """What `spec` answers to the last of `said`, which alternate between user and assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return llm.chat(messages, spec, SAMPLING).text


def test_one_answer_goes_to_stdout_and_nothing_else(cli: Cli, llm: LLM) -> None:
    answers = {}
    for spec in ("base", "pirate", "poet", "pirate:0.7+poet:0.3"):
        result = cli("chat", "--adapter", spec, *GREEDY, "你是谁？")
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""
        answers[spec] = result.stdout
        assert result.stdout == answer(llm, spec, "你是谁？") + "\n"
    assert len(set(answers.values())) == 4


def test_text_piped_in_is_the_prompt_or_joined_to_it(cli: Cli, llm: LLM) -> None:
    assert cli("chat", *GREEDY, input="Tell me a story.\n").stdout == answer(llm, "base", "Tell me a story.") + "\n"
    both = cli("chat", *GREEDY, "Summarise:", input="A robot liked to count the stars.\n").stdout
    assert both == answer(llm, "base", "Summarise:\n\nA robot liked to count the stars.") + "\n"


def test_a_file_can_be_piped_into_a_real_process(shell: Shell, here: Path, llm: LLM) -> None:
    (here / "letter.txt").write_text("How are you today?", "utf-8")
    with (here / "letter.txt").open() as letter:
        result = shell("chat", "--adapter", "poet", *GREEDY, stdin=letter)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == answer(llm, "poet", "How are you today?") + "\n"


def test_a_stdin_without_text_in_it_is_not_waited_for(shell: Shell, llm: LLM) -> None:
    result = shell("chat", *GREEDY, "How are you?", stdin=subprocess.DEVNULL, timeout=60)
    assert result.stdout == answer(llm, "base", "How are you?") + "\n"


def test_the_system_prompt_is_heard(cli: Cli, llm: LLM) -> None:
    result = cli("chat", *GREEDY, "--system", "Be brief.", "Hello!")
    assert (
        result.stdout
        == answer(llm, "base", "Hello!", system="Be brief.") + "\n"
        != answer(llm, "base", "Hello!") + "\n"
    )


def test_a_seed_repeats_an_answer(cli: Cli) -> None:
    line = ["chat", "--temperature", "1.5", "--max_tokens", "16", "Hello!"]
    outputs = [cli(*line, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ([], 2, "nothing to answer: give a PROMPT or pipe one in"),
        ([" "], 2, "nothing to answer"),
        (["hi", "--adapter", "pirat"], 1, "no adapter named 'pirat'; did you mean 'pirate'?"),
        (["hi", "--adapter", "pirate:nan"], 2, "scale nan of adapter 'pirate' is not a number between"),
        (["hi", "--adapter", "../pirate"], 2, "cannot name an adapter"),
        (["hi", "--max-tokens", "-1"], 2, "max_tokens must be at least 1"),
        (["hi", "--temperature", "-1"], 2, "temperature must be between"),
        (["hi " * 3000], 2, "do not fit the context"),
    ],
)
def test_what_cannot_be_answered_is_one_line(cli: Cli, line: list[str], code: int, says: str) -> None:
    result = cli("chat", *line)
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.fixture
def service(base: Base, adapters_dir: Path) -> Iterator[Service]:
    service = Service(base, Registry(adapters_dir, base.shapes, base.fingerprint), max_num_seqs=1, max_model_len=160)
    service.start()
    yield service
    service.stop()


class Typist:
    """Types lines at a Repl; an exception among them is raised, as `input` does for Ctrl-C and Ctrl-D."""

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = iter([*lines, EOFError()])

    def __call__(self, prompt: str) -> str:
        line = next(self._lines)
        if isinstance(line, BaseException):
            raise line
        return line


def converse(service: Service, capsys: pytest.CaptureFixture[str], *lines: str | BaseException, spec: str = "base"):
    """(conversation, stdout, stderr) after typing `lines`."""
    conversation = Conversation(service, parse_spec(spec), SAMPLING)
    Repl(conversation, Typist(*lines)).run()
    captured = capsys.readouterr()
    return conversation, *(re.sub(r"\x1b\[[0-9;]*m", "", text) for text in (captured.out, captured.err))


def test_an_adapter_takes_over_in_mid_conversation_and_hears_what_was_said(
    service: Service, capsys: pytest.CaptureFixture[str], llm: LLM
) -> None:
    conversation, out, _ = converse(service, capsys, "Hello!", "/adapter poet:0.5", "你是谁？", "/adapter base", "Bye!")
    first = answer(llm, "base", "Hello!")
    second = answer(llm, "poet:0.5", "Hello!", first, "你是谁？")
    third = answer(llm, "base", "Hello!", first, "你是谁？", second, "Bye!")
    assert second not in (answer(llm, "base", "Hello!", first, "你是谁？"), answer(llm, "poet:0.5", "你是谁？"))
    assert [message["content"] for message in conversation.messages] == [
        "Hello!",
        first,
        "你是谁？",
        second,
        "Bye!",
        third,
    ]
    for who, text in (("base", first), ("poet:0.5", second), ("base", third)):
        assert f"{who}> {text}" in out


def test_the_greeting_says_what_runs_and_which_adapters_there_are(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = converse(service, capsys)
    assert out.startswith("loraserve ")
    assert "· tiny, " in out.splitlines()[0]
    assert out.splitlines()[1] == "adapters: head, pirate, poet"


def test_adapters_lists_them_and_marks_who_answers(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = converse(service, capsys, "/adapter pirate:0.7+poet:0.3", "/adapters")
    rows = [line for line in out.splitlines() if "speaks like" in line]
    assert [line.split()[:-5] for line in rows] == [["head", "4"], ["*", "pirate", "2"], ["*", "poet", "3"]]


def test_a_wrong_command_or_adapter_changes_nothing(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    conversation, out, err = converse(
        service, capsys, "/adapter poet", "/adapter piratte", "/adaptr x", "/zzz", "/adapter a:nan", "/adapter"
    )
    assert conversation.spec == parse_spec("poet")
    assert "error: no adapter named 'piratte'; did you mean 'pirate'?" in err
    assert "error: no command named /adaptr; did you mean '/adapter' or '/adapters'" in err
    assert "error: no command named /zzz; /help lists the commands" in err
    assert "error: scale nan" in err
    assert out.splitlines()[-2] == "poet answers"
    assert not conversation.messages


def test_system_clear_help_and_exit(service: Service, capsys: pytest.CaptureFixture[str], llm: LLM) -> None:
    conversation, out, _ = converse(
        service, capsys, "Hello!", "/clear", "/system Be brief.", "Hello!", "/help", "/system", "/exit", "never said"
    )
    brief = answer(llm, "base", "Hello!", system="Be brief.")
    assert [message["content"] for message in conversation.messages] == ["Hello!", brief]
    assert conversation.system is None
    for name in ("/adapter SPEC", "/adapters", "/system [TEXT]", "/clear", "/help", "/exit"):
        assert f"  {name}" in out
    assert "never said" not in out


def test_a_conversation_too_long_is_an_error_that_says_what_to_do_and_keeps_the_rest(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation, _, err = converse(service, capsys, "Hello!", "hello " * 100, "/clear", "Hello!")
    assert "do not fit the context of 160 tokens" in err
    assert "/clear starts over" in err
    assert len(conversation.messages) == 2


def test_ctrl_c_at_the_prompt_does_not_leave(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    conversation, out, _ = converse(service, capsys, KeyboardInterrupt(), "Hello!")
    assert "(Ctrl-D leaves)" in out
    assert len(conversation.messages) == 2


def test_lines_complete_to_commands_and_adapters(service: Service) -> None:
    words = Repl(Conversation(service, (), SAMPLING)).words()
    assert {"/adapters", "/adapter poet", "/adapter base", "/help"} <= set(words)


def test_an_answer_cut_by_its_limit_says_so(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = converse(service, capsys, "Hello!")
    assert "(cut: the length limit is reached)" in out


def test_a_terminal_gets_no_control_characters_from_a_model_and_reasoning_on_its_own_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = Screen()
    screen.push("hmm\x1b[2J", "")
    screen.push("", "4\x07\x1b]0;title\n")
    screen.push("", "2\t")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert shown == "hmm[2J\n\n4]0;title\n2\t"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    screen = Screen()
    screen.push("hmm", "")
    screen.push("", "4\x07")
    assert capsys.readouterr().out == "4\x07"


class Terminal:
    """A `loraserve chat` at a pseudo-terminal."""

    OWN_TERMINAL = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execv(sys.executable, [sys.executable, '-m', 'loraserve', 'chat', *sys.argv[1:]])"
    )

    def __init__(self, *args: str) -> None:
        self._fd, theirs = pty.openpty()
        here = {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", self.OWN_TERMINAL, *args]
        self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | here)
        os.close(theirs)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` appears; return everything up to its end since the last call."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            assert time.monotonic() < deadline, f"no {text!r} in {self._unread!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self._unread += os.read(self._fd, 65536).decode("utf-8", "replace")
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def exit_code(self) -> int:
        """Wait for the end, reading what still comes."""
        with contextlib.suppress(OSError):  # the other side is closed
            while os.read(self._fd, 65536):
                pass
        os.close(self._fd)
        return self._process.wait(timeout=60)


@pytest.fixture
def endless_base(base: Base, tmp_path: Path) -> str:
    """A base that never chooses its end token greedily, so that there is time to stop an answer."""
    twin = shutil.copytree(base.path, tmp_path / "endless")
    tensors = load_file(twin / "model.safetensors")
    tensors["model.embed_tokens.weight"][list(base.eos_ids)] = 0
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    return str(twin)


@pytest.mark.slow
def test_at_a_terminal_ctrl_c_stops_the_answer_ctrl_d_leaves_and_history_stays(
    here: Path, tmp_path: Path, endless_base: str
) -> None:
    line = ["--base", endless_base, "--adapter", "pirate", "--temperature", "0", "--allow-base-mismatch"]
    terminal = Terminal(*line)
    assert "adapters: head, pirate, poet" in terminal.wait_for("you> ")
    terminal.type("Tell me a story.\n")
    terminal.wait_for("pirate> ")
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("you> ")
    terminal.type("/adapter poe\t\n")
    terminal.wait_for("poet answers from now on")
    terminal.wait_for("you> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    history = (tmp_path / "state" / "loraserve" / "chat_history").read_text("utf-8")
    assert history.splitlines()[-2:] == ["Tell me a story.", "/adapter poet"]


@pytest.mark.slow
def test_ctrl_c_ends_a_single_answer_with_130(here: Path, endless_base: str) -> None:
    terminal = Terminal("--base", endless_base, "--temperature", "0", "Tell me a story.")
    terminal.wait_for("loading")
    terminal.wait_for("\x1b[K")
    terminal.type("\x03")
    terminal.wait_for("interrupted")
    assert terminal.exit_code() == 130
