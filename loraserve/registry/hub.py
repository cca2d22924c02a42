"""Adapters on the Hugging Face hub: a repository is a PEFT directory. Weights travel as safetensors only."""

from pathlib import Path

from loraserve.base import hub
from loraserve.errors import AdapterNotFound
from loraserve.lora.header import PICKLE_FILE
from loraserve.registry.adopt import EXTRA_SUFFIXES
from loraserve.registry.folder import WATCHED
from loraserve.registry.manifest import MANIFEST_FILE


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch an adapter's files into the hub's local cache and return their directory.

    Raises:
        AdapterNotFound: there is no such repository or revision, or it holds no adapter.
        HubError: gated, or the hub cannot be reached and the cache does not hold the adapter.
    """
    wanted = [*WATCHED, MANIFEST_FILE, *(f"*{suffix}" for suffix in EXTRA_SUFFIXES)]
    folder = hub.download(repo, revision, wanted, AdapterNotFound)
    if not (folder / WATCHED[0]).exists():
        raise AdapterNotFound(repo, hint=f"the repository has no {WATCHED[0]}: it is not an adapter")
    if not (folder / WATCHED[1]).exists():
        hint = f"the repository has no {WATCHED[1]}; a {PICKLE_FILE} is a pickle and is not taken: convert it"
        raise AdapterNotFound(repo, hint=hint)
    return folder


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Commit a version's files to a repository, which is made if it does not exist, and return its address.

    Raises HubError; needs a token that may write (`hf auth login`).
    """
    from huggingface_hub import HfApi

    with hub.hub_errors(repo, None, AdapterNotFound):
        address = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=[".*"])
    return str(address)
