"""From `--base` to a path: what is here, MiniMind's own places, and the hub, spoken to over real HTTP."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.fingerprint import compute
from loraserve.base.load import load_base
from loraserve.base.resolve import bundled_path, minimind_weights, resolve_base, tokenizer_path
from loraserve.errors import CheckpointError, ModelNotFound
from tests.base.hub import Files, Hub

ROOT = Path(__file__).parents[2]
CLIENT = """
import json, sys
from loraserve.base.resolve import resolve_base
from loraserve.errors import LoraserveError
for line in sys.stdin:
    try:
        answer = ["path", str(resolve_base(line.rstrip("\\n")))]
    except LoraserveError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""
Answer = tuple[str, str]
"""('path', it) or (kind of error, its text)."""


class Client:
    """A process that resolves what it is asked, for the hub's library takes its settings when it is imported."""

    def __init__(self, url: str, home: Path, **env: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HOME": str(home)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=inherited | settings | {"PYTHONPATH": str(ROOT)} | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *refs: str) -> list[Answer]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("".join(f"{ref}\n" for ref in refs))
        self._process.stdin.flush()
        return [tuple(json.loads(self._process.stdout.readline())) for _ in refs]

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> Iterator[Client]:
    client = Client(hub.url, home)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Iterator[Client]:
    client = Client(hub.url, home, HF_HUB_OFFLINE="1")
    yield client
    client.close()


@pytest.fixture(scope="module")
def cut_off(home: Path) -> Iterator[Client]:
    """A client whose hub does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        client = Client(f"http://127.0.0.1:{taken.getsockname()[1]}", home)
    yield client
    client.close()


@pytest.fixture
def files(tiny_base_dir: Path) -> Files:
    extra = {"README.md": b"# a card", "notes.pdf": b"%PDF", "pytorch_model.bin": b"not fetched beside safetensors"}
    return {file.name: file.read_bytes() for file in tiny_base_dir.iterdir()} | extra


def test_hub_id_is_downloaded_whole_and_no_more(hub: Hub, online: Client, files: Files, tiny_base_dir: Path) -> None:
    hub.add("owner/tiny-model", files)
    [(kind, path)] = online.ask("owner/tiny-model")
    assert kind == "path", path
    got = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    assert got == {name: files[name] for name in got}
    assert set(got) == set(files) - {"README.md", "notes.pdf", "pytorch_model.bin"}
    assert compute(read_checkpoint(Path(path))) == compute(read_checkpoint(tiny_base_dir))
    assert any(line.startswith("HEAD") for line in hub.log) and any("/tree/" in line for line in hub.log)


def test_base_on_the_hub_loads_under_its_id(
    hub: Hub, online: Client, files: Files, home: Path, tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/named", files, branch="v1")
    [(kind, path)] = online.ask("owner/named@v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    base = load_base("owner/named@v1", device="cpu", dtype="float32")  # from the cache: tests are offline
    assert (kind, str(base.path), base.name) == ("path", path, "owner/named")
    assert base.fingerprint == compute(read_checkpoint(tiny_base_dir))


def test_revisions_and_later_commits(hub: Hub, online: Client, files: Files) -> None:
    first = hub.add("o/several", files | {"config.json": b'{"first": 1}'})
    hub.add("o/several", files | {"config.json": b'{"v": 1}'}, branch="v1.0")
    answers = online.ask("o/several", "o/several@v1.0", f"o/several@{first}")
    configs = [(Path(path) / "config.json").read_bytes() for _, path in answers]
    assert configs == [b'{"first": 1}', b'{"v": 1}', b'{"first": 1}']
    second = hub.add("o/several", files | {"config.json": b'{"second": 2}'})
    before = len(hub.log)
    [(_, path)] = online.ask("o/several")
    assert Path(path).name == second and (Path(path) / "config.json").read_bytes() == b'{"second": 2}'
    fetched = [line for line in hub.log[before:] if line.startswith("GET") and "/resolve/" in line]
    assert [line.rpartition("/")[2] for line in fetched] == ["config.json"]  # the weights are the same blob


def test_repository_without_safetensors_gives_its_pickle(hub: Hub, online: Client, files: Files) -> None:
    del files["model.safetensors"]
    hub.add("o/old", files)
    [(kind, path)] = online.ask("o/old")
    assert kind == "path"
    assert (Path(path) / "pytorch_model.bin").read_bytes() == files["pytorch_model.bin"]
    assert not (Path(path) / "README.md").exists()


def test_what_does_not_exist_is_said_clearly(hub: Hub, online: Client, files: Files) -> None:
    hub.add("o/m", files)
    hub.add("o/gated", files)
    hub.repos["o/gated"].gated = True
    missing, revision, gated, *invalid = online.ask("o/nothing", "o/m@v9", "o/gated", "o/a--b", "o/m.git")
    assert missing[0] == revision[0] == "ModelNotFound"
    assert (
        missing[1]
        == "no model named 'o/nothing'; no such directory here and no such repository on the hub, or it is private"
    )
    assert revision[1] == "no model named 'o/m@v9'; the repository exists, this revision does not"
    assert gated[0] == "HubError" and "o/gated is gated" in gated[1] and "hf auth login" in gated[1]
    assert [kind for kind, _ in invalid] == ["ModelNotFound"] * 2


def test_without_the_hub_the_cache_is_used(
    hub: Hub, online: Client, offline: Client, cut_off: Client, files: Files
) -> None:
    for name in ("o/cached", "o/other"):
        hub.add(name, files)
    [cached] = online.ask("o/cached")
    assert cached[0] == "path"
    before = len(hub.log)
    for client in (offline, cut_off):
        again, other, revision = client.ask("o/cached", "o/other", "o/cached@v2")
        assert again == cached
        for kind, text in (other, revision):
            assert kind == "HubError"
            assert re.search(r"cannot be reached for o/\w+ \(.*(offline mode|refused).*\).*try again when online", text)
    assert len(hub.log) == before


def test_half_a_download_is_not_taken_for_a_base(hub: Hub, online: Client, offline: Client, files: Files) -> None:
    hub.add("o/half", files)
    hub.repos["o/half"].withheld = {"model.safetensors"}
    [(kind, text)] = online.ask("o/half")
    assert kind == "HubError" and "the hub refused o/half: 404" in text
    [(kind, text)] = offline.ask("o/half")
    assert kind == "HubError" and "for o/half" in text and "does not hold all of it" in text
    hub.repos["o/half"].withheld = set()
    [(kind, path)] = online.ask("o/half")
    assert kind == "path" and (Path(path) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_existing_paths_come_before_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "base.pth").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_base("owner/name") == Path("owner/name")
    assert resolve_base("base.pth") == Path("base.pth")
    assert resolve_base("~/base.pth") == tmp_path / "base.pth"
    assert resolve_base("bundled") == bundled_path()


@pytest.mark.parametrize(
    "ref", ["bundle", "", "./owner/name", "/no/such", "out/full_sft_64.pth", "a/b/c", "a b/c", "x" * 5000, "a\0b"]
)
def test_what_is_neither_path_nor_hub_id_is_not_found(ref: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_base(ref)
    assert "a base is 'bundled', a directory, a .pth file or a hub id owner/name" in str(caught.value)
    assert ("did you mean 'bundled'?" in str(caught.value)) == (ref == "bundle")


def test_miniminds_places_for_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, out = tmp_path / "trainer", tmp_path / "out"
    trainer.mkdir()
    monkeypatch.chdir(trainer)
    with pytest.raises(ModelNotFound) as caught:
        minimind_weights("full_sft", 512, False, Path("saved"))
    assert "../out/full_sft_512.pth" in str(caught.value) and "saved/full_sft_512.pth" in str(caught.value)
    (trainer / "saved").mkdir()
    (trainer / "saved" / "full_sft_512_moe.pth").touch()
    assert minimind_weights("full_sft", 512, True, Path("saved")) == Path("saved/full_sft_512_moe.pth")
    out.mkdir()
    (out / "full_sft_512_moe.pth").touch()
    assert minimind_weights("full_sft", 512, True, Path("saved")) == Path("../out/full_sft_512_moe.pth")


def test_tokenizer_beside_the_weights_then_in_miniminds_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, out, model = (tmp_path / name for name in ("trainer", "out", "model"))
    for folder in (trainer, out, model):
        folder.mkdir()
    monkeypatch.chdir(trainer)
    weights = Path("../out/full_sft_512.pth")
    weights.touch()
    with pytest.raises(CheckpointError, match=r"without a tokenizer: looked in .*--tokenizer"):
        tokenizer_path(weights, None)
    (model / "tokenizer.json").touch()
    assert tokenizer_path(weights, None).resolve() == model
    (out / "tokenizer.model").touch()
    assert tokenizer_path(weights, None).resolve() == out
    assert tokenizer_path(weights, "elsewhere") == Path("elsewhere")
    assert tokenizer_path(model, None) == model
