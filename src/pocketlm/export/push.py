"""An exported folder sent to a repository on the Hub, with the user's token."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from pocketlm.errors import FileError, UsageError
from pocketlm.reading import MANIFEST
from pocketlm.text.hub_requests import TOKEN, refused

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OLD_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
MESSAGE = "Upload a model made with pocketlm"


def check_push(repository: str) -> None:
    """What can be known before anything is written.

    Raises:
        UsageError: no name of a repository, or no token.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"--push {repository!r}: allowed is OWNER/NAME, the repository on the Hub")
    if get_token() is None:
        raise UsageError(f"--push {repository} needs a token that may write there: hf auth login, or HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Makes the repository where it is not there yet, and commits the folder's files; returns its address.

    The manifest stays here: what the Hub serves it hashes itself. Of what the repository has already, and the folder
    has not, weights go, which would be read in place of these; other files stay there.

    Raises:
        FileError: the Hub refuses, or cannot be reached; the folder stands.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[MANIFEST],
            delete_patterns=OLD_WEIGHTS,
            commit_message=MESSAGE,
        )
    except HfHubHTTPError as error:
        words = refused(error, repository, repository, None) or f"the Hub answers {error.response.status_code}; {TOKEN}"
        raise FileError(f"{folder} stands, and is not sent to {repository}: {words}") from None
    except Exception as error:  # the library passes on what its HTTP client raises, not all of it OSError
        why = f"{type(error).__name__} ({str(error)[:200]}); try again by hf upload {repository} {folder}"
        raise FileError(f"{folder} stands, and is not sent to {repository}: {why}") from None
    return f"{constants.ENDPOINT}/{repository}"
