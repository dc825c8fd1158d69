"""One file of a repository on the Hub, by its client: from the client's cache, else fetched into there.

What is in the cache is taken without asking: a branch that has moved since is fetched anew only where its new commit is
named. Importing this file takes a while, for the client's sake.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError

from pocketlm.errors import DataError, PocketError
from pocketlm.text.hub_requests import refused


def hub_file(
    repository: str,
    name: str,
    *,
    instead: str,
    revision: str | None = None,
    kind: type[PocketError] = DataError,
) -> Path | None:
    """Where the file lies in the cache; None if the repository has none of that name.

    Args:
        instead: what to say that can be done where it does not come.
        revision: a branch, tag or commit; by default the main branch.
        kind: of the error that says so.

    Raises:
        PocketError: of that kind: there is no such repository, it is not for this user, or nothing can be fetched.
    """
    try:
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None  # else it is known not to be in there
        with contextlib.suppress(RemoteEntryNotFoundError):  # the download says it again, and remembers it
            # asked once: offline the download would try for 20 s
            get_hf_file_metadata(hf_hub_url(repository, name, revision=revision))
        return Path(hf_hub_download(repository, name, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise kind(f"no path {repository!r}, and no Hub id: {error}; {instead}") from None
    except Exception as error:  # the library passes on what its HTTP client raises, not all of it OSError
        words = refused(error, repository, repository, revision) if isinstance(error, HfHubHTTPError) else None
        if words is None:
            words = f"its {name} cannot be fetched from the Hub ({type(error).__name__}); {instead}"
        raise kind(f"no path {repository!r} here, and {words}") from None
