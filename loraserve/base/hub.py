"""The Hugging Face hub: ids, downloads into its local cache, and its failures in our words."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraserve.errors import HubError, InvalidRequest, NotFound

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/(?P<name>[\w.-]+?))(?:@(?P<revision>[\w./-]+))?")


def split_hub_id(hub_id: str) -> tuple[str, str, str | None]:
    """The repository, its own name and the revision of `owner/name[@revision]`. Raises InvalidRequest."""
    match = HUB_ID.fullmatch(hub_id)
    if not match:
        raise InvalidRequest(f"{hub_id!r} is not a hub id: write owner/name or owner/name@revision")
    return match["repo"], match["name"], match["revision"]


def download(repo: str, revision: str | None, patterns: list[str], missing: type[NotFound]) -> Path:
    """Bring the files that match `patterns` into the hub's local cache and return their directory.

    Raises:
        NotFound: of the class `missing`: there is no such repository or revision.
        HubError: see `hub_errors`.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo, revision, missing):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


@contextmanager
def hub_errors(repo: str, revision: str | None, missing: type[NotFound]) -> Iterator[None]:
    """Put what goes wrong with the hub inside the block into our words; progress bars only on a terminal.

    Raises:
        NotFound: of the class `missing`: there is no such repository or revision.
        HubError: gated, not allowed, or out of reach while the cache does not hold the files.
    """
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
        with _bars_on_a_terminal_only():
            yield
    except GatedRepoError:
        raise HubError(f"{repo} is gated: accept its terms on the hub and run `hf auth login`") from None
    except RevisionNotFoundError:
        raise missing(f"{repo}@{revision}", hint="the repository exists, this revision does not") from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = "no such directory here and no such repository on the hub, or it is private"
        raise missing(repo, hint=hint) from None
    except LocalTokenNotFoundError:
        raise HubError("the hub wants to know who you are: run `hf auth login`") from None
    except LocalEntryNotFoundError as error:
        reason = _first_line(error.__cause__ or error)
        raise HubError(
            f"the hub cannot be reached for {repo} ({reason}) and its local cache does not hold all of it; "
            "try again when online"
        ) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            advice = "run `hf auth login` with a token that may"
            raise HubError(f"the hub does not let you read or write {repo}: {advice}") from None
        raise HubError(f"the hub refused {repo}: {_first_line(error)}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise HubError(f"nothing came of asking the hub for {repo}: {_first_line(error)}") from None


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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
