"""Adapters on the Hugging Face hub: a repository is a PEFT directory. Weights travel as safetensors only."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraserve.errors import AdapterNotFound, Conflict, InvalidRequest, StorageError
from loraserve.lora.header import PICKLE_FILE
from loraserve.registry.adopt import EXTRA_SUFFIXES
from loraserve.registry.folder import WATCHED
from loraserve.registry.manifest import MANIFEST_FILE

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/(?P<name>[\w.-]+?))(?:@(?P<revision>[\w./-]+))?")


def split_hub_id(hub_id: str) -> tuple[str, str, str | None]:
    """The repository, its own name and the revision of `owner/name[@revision]`. Raises InvalidRequest."""
    match = HUB_ID.fullmatch(hub_id)
    if not match:
        raise InvalidRequest(f"{hub_id!r} is not a hub id: write owner/name or owner/name@revision")
    return match["repo"], match["name"], match["revision"]


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch an adapter's files into the hub's local cache and return their directory.

    Raises:
        AdapterNotFound: there is no such repository or revision.
        Conflict: the repository is gated.
        StorageError: the hub cannot be reached and the cache does not hold the adapter.
    """
    from huggingface_hub import snapshot_download

    wanted = [*WATCHED, MANIFEST_FILE, *(f"*{suffix}" for suffix in EXTRA_SUFFIXES)]
    with _hub_errors(repo, revision), _bars_on_a_terminal_only():
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if not (folder / WATCHED[0]).exists():
            hint = f"the repository has no {WATCHED[0]}: it is not an adapter"
            raise AdapterNotFound(repo, hint=hint)
        if not (folder / WATCHED[1]).exists():
            hint = f"the repository has no {WATCHED[1]}; a {PICKLE_FILE} is a pickle and is not taken: convert it"
            raise AdapterNotFound(repo, hint=hint)
    return folder


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Commit a version's files to a repository, which is made if it does not exist, and return its address.

    Raises as `download` does; needs a token that may write (`hf auth login`).
    """
    from huggingface_hub import HfApi

    with _hub_errors(repo, None), _bars_on_a_terminal_only():
        address = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=[".*"])
    return str(address)


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise Conflict(f"{repo} is gated: accept its terms on the hub and run `hf auth login`") from None
    except RevisionNotFoundError:
        raise AdapterNotFound(f"{repo}@{revision}", hint="the repository exists, this revision does not") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise AdapterNotFound(repo, hint="no such repository on the hub, or it is private") from None
    except LocalTokenNotFoundError:
        raise Conflict("the hub wants to know who you are: run `hf auth login`") from None
    except LocalEntryNotFoundError as error:
        reason = _first_line(error.__cause__ or error)
        raise StorageError(f"the hub cannot be reached for {repo} ({reason}), its cache does not hold it") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise Conflict(
                f"the hub does not let you write to {repo}: run `hf auth login` with a token that may"
            ) from None
        raise StorageError(f"the hub refused {repo}: {_first_line(error)}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise StorageError(f"the hub could not be reached for {repo}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
