"""From what a user writes after `--base` to a path on disk: `bundled`, a directory, a `.pth`, or a hub id."""

import os
from pathlib import Path

from loraserve.base import hub
from loraserve.errors import CheckpointError, ModelNotFound

BUNDLED = "bundled"
SMALL_FILES = ["*.json", "*.model", "*.jinja"]


def bundled_path() -> Path:
    """The directory of the base that comes with the package."""
    return Path(__file__).parent / BUNDLED


def resolve_base(ref: str) -> Path:
    """Return the directory or `.pth` file that `ref` names, downloading a hub id first.

    Raises:
        ModelNotFound: nothing there, locally or on the hub.
        HubError: the hub cannot be reached and its cache does not hold the base, or it is gated.
    """
    if ref == BUNDLED:
        return bundled_path()
    path = Path(os.path.expanduser(ref))
    if ref and os.path.exists(path):  # unlike Path.exists it takes any string
        return path
    match = hub.HUB_ID.fullmatch(ref)
    if match and not ref.startswith((".", "/")) and path.suffix != ".pth":
        return _download(match["repo"], match["revision"])
    raise ModelNotFound(ref, [BUNDLED], hint="a base is 'bundled', a directory, a .pth file or a hub id owner/name")


def _download(repo: str, revision: str | None) -> Path:
    folder = hub.download(repo, revision, [*SMALL_FILES, "*.safetensors"], ModelNotFound)
    if any(folder.glob("*.safetensors")):
        return folder
    return hub.download(repo, revision, [*SMALL_FILES, "*.bin"], ModelNotFound)


def minimind_weights(from_weight: str, hidden_size: int, use_moe: bool, save_dir: Path) -> Path:
    """Where MiniMind's own scripts would look for `--from_weight`: `../out`, then `save_dir`.

    Raises:
        ModelNotFound: in neither; both paths are named.
    """
    name = f"{from_weight}_{hidden_size}{'_moe' if use_moe else ''}.pth"
    places = [Path("../out") / name, save_dir / name]
    for place in places:
        if place.is_file():
            return place
    raise ModelNotFound(name, hint=f"looked for {places[0]} and {places[1]}; give the base's path with --base")


def tokenizer_path(base: Path, tokenizer: str | None) -> Path:
    """The directory of the tokenizer: as given, beside the weights, or MiniMind's `../model`.

    Raises:
        CheckpointError: none of them has one; all are named.
    """
    if tokenizer is not None:
        return Path(tokenizer).expanduser()
    if base.is_dir():
        return base
    places = [base.parent, Path("../model"), base.parent.parent / "model"]
    for place in places:
        if (place / "tokenizer.json").exists() or (place / "tokenizer.model").exists():
            return place
    shown = ", ".join(str(place) for place in places)
    raise CheckpointError(f"{base} comes without a tokenizer: looked in {shown}; give its directory with --tokenizer")
