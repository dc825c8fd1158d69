"""The requests of a data set on the Hub: what there is at a commit, and the bytes of its files.

A request that fails for a reason that may pass is repeated, the range of a file from the byte on where it broke off,
after delays that double. The session, the token, the endpoint and the proxies are those of huggingface_hub; its own
retries are not used, because they begin a range anew and wait in silence, nor is its listing of trees, which has no
time limit.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, TypeVar

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers

from pocketlm.errors import DataError, Unfetched
from pocketlm.text.documents import BLOCK_BYTES
from pocketlm.text.hub_names import FORM, Address, Choice, configs_of

TOKEN = "give a token that may read it (hf auth login, or HF_TOKEN)"
AGAIN = "run the command again"  # last in a message: see Unfetched
FIRST_TRIES = 2  # repetitions, before anything was ever answered: who is offline wants to know

# what httpx, or httpx2, calls HTTPError: which of them it is, the client's version decides
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

T = TypeVar("T")
Say = Callable[[str], None]


class _Short(Exception):
    """A response that is not, or not all of, what was asked for."""


@dataclass(frozen=True)
class Patience:
    """How long a request is repeated. There is no chance in it: the same failures take the same time."""

    delays_s: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64)
    timeout_s: float = 30
    """Without a byte, or without an answer to a connection."""
    longest_s: float = 600
    """That a server may ask to wait; where it wants more, the user is told."""
    sleep: Callable[[float], None] = time.sleep


# --- the connection


class Hub:
    """The requests for one data set.

    Attributes:
        fetched_bytes: of files, until now.
        revision: what the requests name: what the user wrote, then the commit.
    """

    def __init__(self, address: Address, patience: Patience, say: Say) -> None:
        self.address, self.patience, self.say = address, patience, say
        self.fetched_bytes = 0
        self.reached = False
        self.revision = address.revision

    def info(self) -> tuple[str, dict[str, Choice]]:
        """The commit of the revision, and the configs of its card."""
        return self._repeated("the data set", self._info)

    def _info(self) -> tuple[str, dict[str, Choice]]:
        try:
            info = HfApi().dataset_info(
                self.address.repo, revision=self.revision, timeout=self.patience.timeout_s, expand=["sha", "cardData"]
            )
        except HfHubHTTPError:
            raise
        except HFValidationError as error:
            raise DataError(f"{self._source}: {str(error).splitlines()[0]}; the form is {FORM}") from None
        except (ValueError, KeyError, TypeError):
            raise _Short("the answer describes no data set") from None
        if not info.sha:
            raise _Short("the answer names no commit")
        return info.sha, configs_of(info.card_data.get("configs") if info.card_data else None)

    def tree(self, folder: str) -> list[HubFile]:
        """The files below a folder of the commit, on all levels, by name; none where there is no such folder."""
        path = "".join(f"%{ord(char):02X}" if char in "%/?#" else char for char in folder)
        url = f"{constants.ENDPOINT}/api/datasets/{self.address.repo}/tree/{self.revision}{'/' if path else ''}{path}"
        files, at = list[HubFile](), f"{url}?recursive=true"
        while at:
            page, at = self._repeated(f"the list of files in {folder or 'the data set'}", partial(self._page, at))
            files += page
        return sorted(files, key=lambda file: file.path)

    def _page(self, url: str) -> tuple[list[HubFile], str]:
        """Files, and where the list goes on."""
        response = get_session().get(url, headers=build_hf_headers(), timeout=self.patience.timeout_s)
        if response.headers.get("X-Error-Code") == "EntryNotFound":
            return [], ""
        hf_raise_for_status(response)
        try:
            entries = [entry for entry in response.json() if entry["type"] == "file"]
            files = [HubFile(self, one["path"], one["size"], (one.get("lfs") or one)["oid"]) for one in entries]
        except (ValueError, KeyError, TypeError):
            raise _Short("the answer is no list of files") from None
        return files, response.links.get("next", {}).get("url", "")

    def fill(self, file: HubFile, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a file from `start` on; what has come is not asked for again."""
        filled = 0

        def fetch() -> None:
            nonlocal filled
            if filled == len(into):
                return  # the last try broke off behind the last byte
            for chunk in self._stream(file, start + filled, start + len(into)):
                into[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
                self.fetched_bytes += len(chunk)
            if filled < len(into):
                raise _Short(f"the response ended at byte {start + filled:,} of {start + len(into):,}")

        self._repeated(str(file), fetch)

    def _stream(self, file: HubFile, start: int, end: int) -> Iterator[memoryview]:
        """Bytes start .. end - 1 of a file, as they come."""
        url = hf_hub_url(self.address.repo, file.path, repo_type="dataset", revision=self.revision)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=self.patience.timeout_s) as response:
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            skipped = self._checked(response, file, start)
            left = end - start
            for chunk in response.iter_raw():
                part = memoryview(chunk)[skipped : skipped + left]
                skipped, left = max(0, skipped - len(chunk)), left - len(part)
                yield part
                if not left and response.status_code != 206:
                    return  # but a range is read to its end, which leaves the connection fit for the next one

    def _checked(self, response: Any, file: HubFile, start: int) -> int:
        """How many bytes of a response come before `start`: none, or all where a server knows no ranges.

        Raises:
            DataError: the response is of another commit or file than was listed.
            _Short: it does not say that it has these bytes, as the page of a proxy does not.
        """
        commits = {one.headers.get("X-Repo-Commit", self.revision) for one in (*response.history, response)}
        said = response.headers.get("Content-Range" if response.status_code == 206 else "Content-Length", "")
        part = re.fullmatch(rf"bytes {start}-[0-9]+/([0-9]+)", said) if response.status_code == 206 else None
        if commits != {self.revision} or (part and int(part[1]) != file.size):
            raise DataError(
                f"{file} is not what the Hub listed at commit {self.revision} ({file.size:,} bytes); "
                "run the command again, and if that does not help give another @REVISION"
            )
        if part is None and (response.status_code != 200 or said != str(file.size)):
            raise _Short(f"bytes from {start:,} on of {file.size:,} were asked for, {said!r:.40} came")
        return 0 if part else start

    def _repeated(self, what: str, request: Callable[[], T]) -> T:
        """A request, until it succeeds or patience ends.

        Raises:
            DataError: it can not succeed, or did not.
        """
        delays_s = self.patience.delays_s
        for count in range(len(delays_s) + 1):
            try:
                result = request()
                self.reached = True
                return result
            except OfflineModeIsEnabled:
                raise DataError(f"{self._source}: HF_HUB_OFFLINE is set; unset it, or give files:GLOB") from None
            except (TRANSPORT_ERROR, _Short) as error:
                if (refusal := self._refusal(error, what)) is not None:
                    raise refusal from None
                reason = _reason(error)
                if not self.reached and count == FIRST_TRIES and not isinstance(error, HfHubHTTPError):
                    offline = f"{constants.ENDPOINT} cannot be reached ({reason}); give local files as files:GLOB, or"
                    raise DataError(f"{self._source}: {offline} check the connection") from None
                if count == len(delays_s):
                    raise Unfetched(f"{self._source}: {what}: {reason}, {count + 1} times in a row; {AGAIN}") from None
                wait_s = self._wait_s(error, delays_s[count])
            self.say(f"{what}: {reason}; asking again in {wait_s:g} s ({count + 1} of {len(delays_s)})")
            self.patience.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    @property
    def _source(self) -> str:
        return f"source {self.address.spec!r}"

    def _wait_s(self, error: Exception, delay_s: float) -> float:
        """The delay, or what the server asks for, if that is longer.

        Raises:
            DataError: it asks for more than is waited.
        """
        asked_s = _asked_s(error)
        if asked_s > self.patience.longest_s:
            asked = f"the Hub asks to wait {asked_s:,.0f} s, with a token (hf auth login, or HF_TOKEN) often less"
            raise Unfetched(f"{self._source}: {asked}; then {AGAIN}")
        return max(delay_s, asked_s)

    def _refusal(self, error: Exception, what: str) -> DataError | None:
        """What a failure says that will not pass; None for one that may."""
        if not isinstance(error, HfHubHTTPError):
            return None
        repo, revision, status = self.address.repo, self.revision, error.response.status_code
        words = refused(error, repo, f"datasets/{repo}", revision)
        if isinstance(error, RevisionNotFoundError) and revision != self.address.revision:
            words = f"commit {revision}, with which this set was begun, is gone; delete its folder to begin anew"
        elif words is None and (isinstance(error, EntryNotFoundError) or status in (404, 410, 416)):
            words = f"{what} is no longer there at commit {revision}; give another @REVISION, or files:GLOB"
        if words is not None:
            return DataError(f"{self._source}: {words}")
        if status in (408, 429) or status >= 500:
            return None
        return Unfetched(f"{self._source}: {what}: the Hub answers {status}; {AGAIN}")


def refused(error: HfHubHTTPError, repo: str, path: str, revision: str | None) -> str | None:
    """What to say where a repository, or this revision of it, is not for this user; None for any other failure.

    Args:
        path: of its page.
    """
    page, status = f"{constants.ENDPOINT}/{path}", error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated; accept its terms at {page}, then {TOKEN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{page} is not there, or is private; correct the name, or {TOKEN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; there are those of {page}/commits/main"
    return f"{repo}: access refused ({status}); {TOKEN}" if status in (401, 403) else None


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers {error.response.status_code}"
    return f"{type(error).__name__} ({error})" if not isinstance(error, _Short) else str(error)


def _asked_s(error: Exception) -> float:
    """Seconds that a server asks to wait, in either of the two headers that the Hub has for it."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    after, limit = headers.get("Retry-After", ""), parse_ratelimit_headers(headers)
    if after.isdecimal():
        return float(after)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else 0.0


# --- files


@dataclass(frozen=True)
class HubFile:
    """A file at the commit."""

    hub: Hub
    path: str
    size: int
    oid: str
    """SHA-256 of a large file, git's hash of a small one."""

    def __str__(self) -> str:
        return f"{self.hub.address.repo}/{self.path}"

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.path).suffixes

    def open(self) -> IO[bytes]:
        reader: Any = RangeReader(self)
        return reader if self.path.lower().endswith(".parquet") else io.BufferedReader(reader, BLOCK_BYTES)


class RangeReader(io.RawIOBase):
    """A file's bytes. Each read is requests for exactly the bytes that it returns."""

    def __init__(self, file: HubFile) -> None:
        self.file = file
        self.at = 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, short only at the end of the file: what asks for a page takes less for damage."""
        view = memoryview(buffer).cast("B")[: max(0, self.file.size - self.at)]
        for begin in range(0, len(view), BLOCK_BYTES):
            part = view[begin : begin + BLOCK_BYTES]
            self.file.hub.fill(self.file, self.at, part)
            self.at += len(part)
        return len(view)
