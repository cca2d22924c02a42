"""The shape of the package: which part may import which, what stays light, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "loraserve"
LAYERS = [
    "errors",
    "kernels",
    "lora",
    "base",
    "registry",
    "engine",
    "train",
    "jobs",
    "server",
    "cluster",
    "bench",
    "cli",
]
"""Imports point left only."""
ONLY_IN = {"flask": "server", "werkzeug": "server", "waitress": "server", "prometheus_client": "server", "click": "cli"}
MAX_LINES = 320
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, *, lazy: bool = True) -> Iterator[str]:
    """Full names of everything `file` imports; with `lazy=False` only what importing the file imports at once."""
    package = file.relative_to(ROOT).parent.parts
    pending: list[ast.AST] = [ast.parse(file.read_text("utf-8"))]
    while pending:
        node = pending.pop()
        if not lazy and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def layer_of(module: str) -> str | None:
    """The layer a module of ours belongs to; None for the package itself and its version."""
    parts = module.split(".")
    return parts[1] if parts[0] == "loraserve" and len(parts) > 1 and parts[1] in LAYERS else None


def test_every_module_belongs_to_a_layer() -> None:
    strangers = {module_name(file) for file in FILES if layer_of(module_name(file)) is None}
    assert strangers == {"loraserve", "loraserve.__main__"}
    assert len(FILES) > 50


def test_imports_point_left_only() -> None:
    wrong = []
    for file in FILES:
        own = layer_of(module_name(file))
        for name in imports(file):
            other = layer_of(name)
            if own and other and LAYERS.index(other) > LAYERS.index(own):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_import_rule_sees_relative_and_function_level_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loraserve" / "lora" / "batch.py"
    file.parent.mkdir(parents=True)
    file.write_text("from . import spec\nfrom ..engine.llm import LLM\ndef f():\n    from .. import server\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert set(imports(file)) == {"loraserve.lora.spec", "loraserve.engine.llm.LLM", "loraserve.server"}
    assert set(imports(file, lazy=False)) == {"loraserve.lora.spec", "loraserve.engine.llm.LLM"}


def test_only_the_server_knows_flask_and_only_the_command_line_knows_click() -> None:
    wrong = []
    for file in FILES:
        for name in imports(file):
            home = ONLY_IN.get(name.partition(".")[0])
            if home and layer_of(module_name(file)) != home:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_scheduler_and_sequence_do_not_lead_to_torch() -> None:
    by_name = {module_name(file): file for file in FILES}
    pending = ["loraserve.engine.scheduler", "loraserve.engine.sequence"]
    seen: set[str] = set()
    while pending:
        module = pending.pop()
        seen.add(module)
        for name in imports(by_name[module], lazy=False):
            assert name.partition(".")[0] != "torch", f"{module} imports torch"
            target = name if name in by_name else name.rpartition(".")[0]
            if target in by_name and target not in seen:
                pending.append(target)
    assert "loraserve.engine.params" in seen


COMMANDS = [name for file in FILES if layer_of(name := module_name(file)) == "cli" and file.stem != "__main__"]


@pytest.mark.parametrize("module", ["loraserve", *COMMANDS])
def test_importing_the_package_or_a_command_stays_light(module: str) -> None:
    heavy = "{'torch', 'flask', 'matplotlib', 'numpy', 'huggingface_hub', 'pydantic'}"
    code = f"import {module}; import sys; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_module_says_what_it_owns() -> None:
    silent = [str(f.relative_to(ROOT)) for f in FILES if not ast.get_docstring(ast.parse(f.read_text("utf-8")))]
    assert not silent


def test_no_file_is_two_things() -> None:
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text("utf-8").splitlines())) > MAX_LINES}
    assert not long
