"""Bytes from the hub into a file: resumable, locked, checked before they get their name, shown while they come.

The requests are huggingface_hub's own (its client, token, endpoint, offline switch, retries and Retry-After). What is
added is the partial file. `hf_hub_download` of huggingface_hub 2.4 writes to a name of its own for each call and
deletes that file on any failure: it resumes after a cut connection only within the call, and a 19 GB download that was
interrupted starts again from nothing. Here the partial file has a lasting name made of the content's ETag, is continued
by a Range request, and is renamed only after `check` has passed; a file that fails is deleted. Plain HTTP is used even
where the hub offers Xet, which cannot continue a partial file.
"""

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from huggingface_hub import cached_assets_path, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mistudio.errors import HubError
from mistudio.progress import Bar

T = TypeVar("T")
WAITS_S = (1, 2, 4, 8)
"""Pauses between attempts where the hub is busy."""
WAIT_MAX_S = 300
"""A hub that asks for a longer pause than this is told to the user instead."""
BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class Remote:
    """One file of one commit on the hub."""

    repo_id: str
    """The repository."""
    filename: str
    """The file's path in it."""
    revision: str
    """What was asked for: a branch, a tag or a commit."""
    commit: str
    """The commit it stood for; what is downloaded is this commit's file."""
    etag: str
    """Names the content: the sha256 of a large file, git's hash of a small one."""
    size: int
    """Bytes."""

    @property
    def sha256(self) -> str | None:
        """The file's sha256, where the hub says it."""
        return self.etag if re.fullmatch(r"[0-9a-f]{64}", self.etag) else None

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.filename} at revision {self.commit[:12]}"


class Transfers:
    """Several transfers at once on stderr, each with bytes, speed and time left: bars on a terminal, else a line every
    ten seconds. A `with` block; leaving it by an exception ends the transfers of other threads too."""

    def __init__(self, *, show: bool):
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        on_terminal = show and console.is_terminal
        self.bars = Progress(*columns, TimeRemainingColumn(), console=console) if on_terminal else None
        self.lines = show and not on_terminal
        self.stopped = threading.Event()

    def __enter__(self) -> "Transfers":
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self.stopped.set()
        if self.bars is not None:
            self.bars.stop()


class _TransferBar:
    """What huggingface_hub wants of a progress bar. A bar that is done leaves the screen."""

    def __init__(self, transfers: Transfers, label: str, total: int | None, initial: int):
        self.transfers, self.label = transfers, label
        self.line = Bar(label, None if total is None else total - initial, "B", None) if transfers.lines else None
        self.task = transfers.bars.add_task(label, total=total, completed=initial) if transfers.bars else None

    def __enter__(self) -> "_TransferBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.transfers.bars is not None and self.task is not None:
            self.transfers.bars.update(self.task, visible=False)

    def update(self, n: int) -> None:
        """`n` more bytes have come (negative: the hub began again from the start)."""
        if self.transfers.stopped.is_set():
            raise InterruptedError("stopped, because another transfer was")
        if self.line is not None:
            self.line.advance(n)
        if self.transfers.bars is not None and self.task is not None:
            self.transfers.bars.update(self.task, advance=n)


def look_up(repo_id: str, filename: str, revision: str | None) -> Remote | None:
    """What the hub has under that name now (one HEAD request); None where repository and revision exist but the file
    does not. `revision` None: main. HubError: anything else, told apart."""
    asked = constants.DEFAULT_REVISION if revision is None else revision
    url = hf_hub_url(repo_id, filename, revision=asked)
    try:
        found = _patiently(lambda: get_hf_file_metadata(url), lambda: 0)
    except RemoteEntryNotFoundError:
        return None
    except (HTTPError, OSError) as error:
        raise explain(error, repo_id, filename, asked) from error
    commit, etag, size = found.commit_hash or "", found.etag or "", found.size
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not re.fullmatch(r"[0-9A-Za-z_-]{8,128}", etag) or size is None:
        raise HubError(
            f"{constants.ENDPOINT} did not say commit, ETag and size of {repo_id}/{filename}; "
            "it does not seem to be a Hugging Face hub: see HF_ENDPOINT, or the proxy."
        )
    return Remote(repo_id=repo_id, filename=filename, revision=asked, commit=commit, etag=etag, size=size)


def fetch(
    remote: Remote, target: Path, *, force: bool, check: Callable[[Path], T], transfers: Transfers, label: str
) -> T | None:
    """`target` holds the file, and `check(file)` passed before it got that name: what `check` returned. None where
    `target` was there before and `force` is off.

    `check` raises HubError for a file that must not stay. HubError also: no room, no permission, no network. After a
    failure that is not the content's, the partial file stays, and the next call goes on where it ended.
    """
    locks = cached_assets_path("mistudio", "locks", assets_dir=constants.HF_ASSETS_CACHE)
    lock = locks / f"{hashlib.sha256(str(target.absolute()).encode()).hexdigest()}.lock"
    partial = target.with_name(f"{target.name}.{remote.etag[:12]}.incomplete")
    try:
        with WeakFileLock(lock):
            if target.exists() and not force:
                return None
            target.parent.mkdir(parents=True, exist_ok=True)
            _receive(remote, partial, transfers, label)
            result = _keep_or_delete(partial, remote, check)
            os.replace(partial, target)
            return result
    except InterruptedError:
        raise
    except (HTTPError, OSError) as error:
        raise explain(error, remote.repo_id, remote.filename, remote.revision, partial) from error


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that `folder` is, or would be, on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(needed: int, folder: Path, what: str) -> None:
    """Returns where `folder` has room for `needed` more bytes. HubError: it does not."""
    free = free_bytes(folder.absolute())
    if needed > free:
        raise HubError(
            f"{what} needs {needed:,} more bytes ({_short(needed)}) in {folder}, where {free:,} ({_short(free)}) are "
            "free. Make room there, or choose another disk with --folder, or with HF_HOME for the cache."
        )


def explain(error: Exception, repo_id: str, filename: str, revision: str, partial: Path | None = None) -> HubError:
    """The HubError that says what happened and what to do."""
    if isinstance(error, HfHubHTTPError):
        return HubError(_explain_status(error, repo_id, filename, revision))
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{repo_id}/{filename} must be fetched, and HF_HUB_OFFLINE forbids it; unset it.")
    if isinstance(error, FileMetadataError):
        return HubError(
            f"{constants.ENDPOINT} does not answer as a Hugging Face hub does: see HF_ENDPOINT and the proxy."
        )
    resumes = "; run the same again, and it goes on where it stopped" if partial is not None else ""
    if isinstance(error, HTTPError):
        reason = " ".join(str(error).split()) or type(error).__name__
        return HubError(
            f"No connection to {constants.ENDPOINT} for {repo_id}/{filename} ({reason}). Check the network, "
            f"HF_ENDPOINT and the proxy{resumes}. --offline uses only what is already on disk."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"The disk is full: {repo_id}/{filename} could not be written to {_folder(partial)}. Make room, or choose "
            f"another disk with --folder (HF_HOME for the cache){resumes}."
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HubError(
            f"{_folder(partial)} may not be written to ({error.strerror}); choose another place with --folder, "
            "or with HF_HOME for the cache."
        )
    reason = " ".join(str(error).split())
    return HubError(f"{repo_id}/{filename} did not come whole ({reason}){resumes}.")


def _explain_status(error: HfHubHTTPError, repo_id: str, filename: str, revision: str) -> str:
    status, repo_url = error.response.status_code, f"{constants.ENDPOINT}/{repo_id}"
    token = "`hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated ({status}): accept its terms at {repo_url}, then {token}."
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo_id} has no revision {revision}; leave out --revision for main, or take one from {repo_url}/commits."
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo_id} has no file {filename} at revision {revision}; `mistudio sae find` lists those that exist."
    if status == 401:
        return (
            f"The hub does not let this user read {repo_id} (401): it is private or gated, or does not exist, or the "
            f"token is wrong. {token[0].upper() + token[1:]}; `hf auth whoami` says whose token is used."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"There is no repository {repo_id} on {constants.ENDPOINT} (404); `mistudio sae find` lists those known."
    if status == 403:
        return (
            f"The token may not read {repo_id} (403); accept its terms at {repo_url}, or use a token that may read it."
        )
    if status == 429:
        after = _retry_after(error)
        when = f"wait {after} s" if after else "wait some minutes"
        return f"The hub asks for fewer requests (429): {when}, use fewer --jobs, or {token}, which raises the limit."
    if status >= 500:
        return f"The hub has trouble of its own ({status}) with {repo_id}/{filename}; try again later."
    return f"The hub refused {repo_id}/{filename} ({status}): {' '.join(str(error).split())}"


def _patiently(call: Callable[[], T], received: Callable[[], int]) -> T:
    """`call()`; again, after a pause, where the hub is busy, and at once where it was cut off but bytes had come.

    A connection that brought nothing gets one more attempt.
    """
    failures, before = 0, received()
    while True:
        try:
            return call()
        except HTTPError as error:
            if received() > before:
                failures, before = 0, received()
                continue
            pause = _pause(error, failures)
            if pause is None:
                raise
            failures += 1
            time.sleep(pause)


def _pause(error: HTTPError, failures: int) -> int | None:
    """Seconds to wait after an error that followed so many others; None where waiting does not help."""
    if not isinstance(error, HfHubHTTPError):
        return WAITS_S[0] if failures == 0 else None
    if error.response.status_code not in BUSY or failures >= len(WAITS_S):
        return None
    pause = max(WAITS_S[failures], _retry_after(error))
    return pause if pause <= WAIT_MAX_S else None


def _retry_after(error: HfHubHTTPError) -> int:
    """Seconds the hub asks to wait; 0 where it does not say."""
    text = str(error.response.headers.get("Retry-After", "")).strip()
    return int(text) if text.isdigit() else 0


def _receive(remote: Remote, partial: Path, transfers: Transfers, label: str) -> None:
    """`partial` holds all bytes of the file."""

    def received() -> int:
        return partial.stat().st_size if partial.exists() else 0

    def bar(*, desc: str, total: int | None, initial: int, unit: str, unit_scale: bool) -> _TransferBar:
        return _TransferBar(transfers, label, total, initial)

    def go_on() -> None:
        with open(partial, "ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=remote.size,
                tqdm_class=cast(Any, bar),
            )

    if received() > remote.size:
        partial.unlink()
    require_room(remote.size - received(), partial.parent, str(remote))
    url = hf_hub_url(remote.repo_id, remote.filename, revision=remote.commit)
    _patiently(go_on, received)


def _keep_or_delete(partial: Path, remote: Remote, check: Callable[[Path], T]) -> T:
    """What `check` returned; the file is on disk. A file that it refuses is deleted."""
    try:
        result = check(partial)
    except HubError as error:
        partial.unlink()
        raise HubError(
            f"{remote} was downloaded and is not kept: {str(error).replace(str(partial), 'the file')}"
        ) from error
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    return result


def _folder(partial: Path | None) -> str:
    return "the cache" if partial is None else str(partial.parent)


def _short(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
