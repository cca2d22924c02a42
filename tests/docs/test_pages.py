"""The pages agree with the program and with each other: generated text, links, command lines."""

import contextlib
import importlib.util
import re
import shlex
from types import ModuleType

import click
import pytest
from click.exceptions import NoArgsIsHelpError

from loraserve.cli.main import main
from tests.docs.conftest import PAGES, ROOT, Page


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    stale = [page.name for page, text in load_generator().pages().items() if page.read_text("utf-8") != text]
    assert not stale, "run `make docs`"


def test_the_command_page_has_every_command() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for command in ("train", "serve", "chat", "merge", "adapters import", "base convert", "bench serve"):
        assert f"## loraserve {command}\n" in page


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_within_the_repository_lead_somewhere(page: Page) -> None:
    broken = []
    for link in page.links:
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        path = (page.path.parent / target).resolve() if target else page.path
        if not path.exists() or (anchor and anchor not in Page(path).anchors):
            broken.append(link)
    assert not broken


def test_the_link_check_reads_links_and_anchors() -> None:
    http = Page(ROOT / "docs" / "http.md")
    assert "#post-v1chatcompletions" in http.links
    assert {"post-v1chatcompletions", "get-v1adaptersname", "post-v1load_lora_adapter"} <= http.anchors


def documented_command_lines() -> list[tuple[Page, str]]:
    """Command lines in bash blocks, and those in the text that are whole."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`(loraserve [^`]+)`", page.prose)
        lines = page.commands() + [line for line in inline if "..." not in line]
        found += [(page, line) for line in lines if line.startswith("loraserve ")]
    return found


@pytest.mark.parametrize(("page", "line"), documented_command_lines(), ids=lambda value: str(value)[:60])
def test_documented_command_lines_are_understood(page: Page, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, options and values are parsed as in earnest; nothing is run."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = main
    context = click.Context(main, info_name="loraserve")
    while isinstance(command, click.Group) and words:
        name, *words = words
        found = command.get_command(context, name)
        assert found, f"no command {name!r}"
        command = found
        with contextlib.suppress(click.MissingParameter, NoArgsIsHelpError):  # `loraserve train`, in running text
            context = command.make_context(name, list(words), parent=context)


def test_the_command_line_check_finds_what_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("loraserve trian --data x", "loraserve train --data x --no-such-option 1"):
        with pytest.raises((AssertionError, click.UsageError)):
            test_documented_command_lines_are_understood(PAGES[0], line, monkeypatch)
    assert len(documented_command_lines()) > 20


@pytest.mark.parametrize("name", ["README", "docs/quickstart"])
def test_both_languages_have_the_same_sections_and_commands(name: str) -> None:
    english, chinese = Page(ROOT / f"{name}.md"), Page(ROOT / f"{name}.zh.md")
    assert len(english.headings) == len(chinese.headings)
    for line, other in zip(english.commands(), chinese.commands(), strict=True):
        assert shlex.split(line, comments=True)[:2] == shlex.split(other, comments=True)[:2]
    stem = english.path.stem
    ours = [link for link in english.links if stem not in link]
    theirs = [link.replace(".zh.", ".") for link in chinese.links if stem not in link]
    assert ours == theirs


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    rules = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    named = set(re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[0].split())
    named |= set(re.findall(r"\"make (\w+) ", makefile))
    named |= {line.split()[1] for page in PAGES for line in page.commands() if line.startswith("make ")}
    assert {"venv", "serve", "test", "check", "bench"} <= named
    assert named - rules == set()


def test_pages_name_no_place_of_the_machine_they_were_written_on() -> None:
    files = [page.path for page in PAGES] + [ROOT / name for name in ("pyproject.toml", "constraints.txt", "Makefile")]
    for file in files:
        assert not re.search(r"/(work|root|home)/|--(extra-)?index-url|find-links", file.read_text("utf-8")), file
