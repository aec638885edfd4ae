"""Released weights on this machine: found at hand or downloaded, verified, and recorded.

Where. With `folder`, at FOLDER/REPO_ID/PATH/params.npz (the repository's id is part of the path, because the residual
and the MLP repositories use the same paths). Without, in Hugging Face's own cache, where transformers and SAELens find
it too.

What is known of a file is in one small JSON record: in `mistudio.json` beside the file, or for the cache under
HF_ASSETS_CACHE/mistudio/downloads, since the cache's folders belong to huggingface_hub. It is written last. A file
whose record agrees with its size and time of change was verified before and is not read again; any other is verified
before it is used, whoever put it there.

The revision is turned into a commit before anything else, and the commit is what is downloaded and recorded.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from huggingface_hub import cached_assets_path, constants, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError, HubError, MistudioError
from mistudio.files import read_json, write_json
from mistudio.hub.entry import Entry
from mistudio.hub.names import resolve
from mistudio.hub.transfer import Remote, Transfers, explain, fetch, look_up, require_room
from mistudio.hub.verify import Verified, check_size, verify_file

CONFIG_BYTES_MAX = 2**20
TAKE_A_NEWER_ONE = "; old revisions of the hub hold such files, take a newer one (leave out --revision for the newest)"


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """A released file on this machine that was verified."""

    path: Path
    """The weights' file."""
    entry: Entry
    """What it is."""
    revision: str
    """The commit it is from, 40 hexadecimal digits."""
    sha256: str
    """Of the file."""
    bytes: int
    """Its size."""
    repo_id: str
    """The repository it is from."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One of several downloads that did not succeed."""

    wanted: Entry | str
    """What was asked for."""
    error: MistudioError
    """Why it is not here, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was found out about one file, as it is on disk."""

    format: Literal["mistudio-download"] = "mistudio-download"
    version: Literal[1] = 1
    repo_id: str
    """The repository."""
    filename: str
    """The file's path in it."""
    revision: str
    """The commit."""
    sha256: str
    """Of the whole file."""
    bytes: int
    """Its size."""
    changed_ns: int
    """Its time of change, in nanoseconds since 1970."""


def download(
    wanted: Entry | str,
    *,
    folder: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    force: bool = False,
    progress: bool = True,
) -> Downloaded:
    """The file of an entry or a name, on this machine and verified.

    folder: None for Hugging Face's cache. revision: a branch, tag or commit; None for main. offline: only what is at
    hand (HF_HUB_OFFLINE=1 says the same). force: download even if the file is here; the old one stays until the new one
    is whole and verified. progress: bytes, speed and time left on stderr. HubError: one sentence, with what to do.
    """
    entry = resolve(wanted) if isinstance(wanted, str) else wanted
    with Transfers(show=progress) as transfers:
        return _Download(folder, revision, offline, force, transfers).get(entry)


def find_local(entry: Entry) -> Downloaded | None:
    """The entry's file in Hugging Face's cache, or None where it is not there. HubError: it is there, and unsound."""
    with Transfers(show=False) as transfers:
        one = _Download(None, None, True, False, transfers)
        return None if one.place.at_hand(entry, None) is None else one.get(entry)


def download_many(
    wanted: Sequence[Entry | str],
    *,
    folder: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    force: bool = False,
    progress: bool = True,
    jobs: int = 4,
) -> list[Downloaded | Failure]:
    """One result for each of `wanted`, in their order; `jobs` files at a time, going on after failures.

    The other arguments are those of `download`. HubError: the files that are missing do not fit on the disk together.
    """
    if jobs < 1:
        raise HubError(f"jobs must be at least 1, not {jobs}.")
    found = [_resolved(name) for name in wanted]
    with Transfers(show=progress) as transfers:
        one = _Download(folder, revision, offline, force, transfers)
        if not one.offline:
            missing = [e for e in found if isinstance(e, Entry) and one.must_fetch(e)]
            require_room(
                sum(e.bytes_expected for e in missing), one.place.root, f"Files missing: {len(missing)}; the download"
            )
        pool = ThreadPoolExecutor(jobs)
        try:
            return list(pool.map(lambda e: e if isinstance(e, Failure) else _attempt(one, e), found))
        except BaseException:  # Ctrl-C too: the other threads stop, and it is raised again
            transfers.stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _resolved(name: Entry | str) -> Entry | Failure:
    if isinstance(name, Entry):
        return name
    try:
        return resolve(name)
    except MistudioError as error:
        return Failure(wanted=name, error=error)


def _attempt(one: "_Download", entry: Entry) -> Downloaded | Failure:
    try:
        return one.get(entry)
    except MistudioError as error:
        return Failure(wanted=entry, error=error)


class _Place(Protocol):
    """Where files are kept."""

    root: Path
    """A folder on the disk that will hold them."""

    def at_hand(self, entry: Entry, revision: str | None) -> tuple[Path, str] | None:
        """The weights' file and its commit, where it is here for that revision as far as can be told offline."""

    def target(self, remote: Remote) -> Path:
        """Where the content of a file goes."""

    def settle(self, remote: Remote) -> Path:
        """The file's own path, once its content is at `target`."""

    def record(self, repo_id: str, filename: str, commit: str) -> Path:
        """Where its record is."""


class _Folder:
    """Files in a folder of the user's."""

    def __init__(self, root: Path):
        self.root = root

    def at_hand(self, entry: Entry, revision: str | None) -> tuple[Path, str] | None:
        filename = f"{entry.path}/{entry.filename}"
        path = self.root / entry.repo_id / filename
        record = _read_record(self.record(entry.repo_id, filename, ""))
        if record is None or not path.is_file() or revision not in (None, record.revision):
            return None
        return path, record.revision

    def target(self, remote: Remote) -> Path:
        return self.root / remote.repo_id / remote.filename

    def settle(self, remote: Remote) -> Path:
        return self.target(remote)

    def record(self, repo_id: str, filename: str, commit: str) -> Path:
        return (self.root / repo_id / filename).parent / "mistudio.json"


class _Cache:
    """Files in Hugging Face's cache: the content in blobs/, named by its ETag; a link in snapshots/COMMIT/."""

    def __init__(self) -> None:
        self.root = Path(constants.HF_HUB_CACHE)

    def at_hand(self, entry: Entry, revision: str | None) -> tuple[Path, str] | None:
        filename = f"{entry.path}/{entry.filename}"
        path = try_to_load_from_cache(entry.repo_id, filename, revision=revision)
        if not isinstance(path, str):
            return None
        return Path(path), Path(path).parents[filename.count("/")].name

    def target(self, remote: Remote) -> Path:
        return self.root / repo_folder_name(repo_id=remote.repo_id, repo_type="model") / "blobs" / remote.etag

    def settle(self, remote: Remote) -> Path:
        """The link to the content; huggingface_hub makes it, finding the content there, and notes the branch."""
        try:
            path = Path(hf_hub_download(remote.repo_id, remote.filename, revision=remote.revision))
        except (HTTPError, OSError) as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            known = cause if isinstance(cause, Exception) else error
            raise explain(known, remote.repo_id, remote.filename, remote.revision) from error
        if remote.commit not in path.parts:
            raise HubError(f"{remote.revision} of {remote.repo_id} moved during the download; run the same again.")
        return path

    def record(self, repo_id: str, filename: str, commit: str) -> Path:
        assets = constants.HF_ASSETS_CACHE
        folder = cached_assets_path("mistudio", "downloads", f"{repo_id}/{commit}", assets_dir=assets)
        return folder / f"{filename.replace('/', '--')}.json"


class _Download:
    """How files are fetched: the arguments of `download`, and the place they come to."""

    def __init__(
        self, folder: str | Path | None, revision: str | None, offline: bool, force: bool, transfers: Transfers
    ):
        self.place: _Place = _Cache() if folder is None else _Folder(Path(folder))
        self.revision, self.force, self.transfers = revision, force, transfers
        self.offline = offline or is_offline_mode()
        if self.offline and force:
            raise HubError("--force downloads again, and --offline (or HF_HUB_OFFLINE) forbids it; leave one out.")

    def get(self, entry: Entry) -> Downloaded:
        """The entry's file, at hand or fetched."""
        pinned = self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None
        at_hand = self.place.at_hand(entry, self.revision) if self.offline or (pinned and not self.force) else None
        if at_hand is not None:
            return self._known(entry, *at_hand, remote=None)
        if self.offline:
            which = "" if self.revision is None else f" at revision {self.revision}"
            raise HubError(
                f"{entry.hf_path}/{entry.filename}{which} is not in {self.place.root}; run this once without --offline "
                "(and without HF_HUB_OFFLINE) to download it."
            )
        return self._fetch(entry)

    def must_fetch(self, entry: Entry) -> bool:
        """Whether bytes must come from the hub, as far as can be told without asking it."""
        try:
            return self.force or self.place.at_hand(entry, self.revision) is None
        except HubError:  # a damaged record: `get` reports it
            return True

    def _fetch(self, entry: Entry) -> Downloaded:
        filename = f"{entry.path}/{entry.filename}"
        remote = look_up(entry.repo_id, filename, self.revision)
        if remote is None:
            asked = constants.DEFAULT_REVISION if self.revision is None else self.revision
            raise HubError(
                f"{entry.repo_id} has no file {filename} at revision {asked}; it may exist at another one: see "
                f"{constants.ENDPOINT}/{entry.repo_id}/commits/main, or `mistudio sae index --refresh`."
            )
        check_size(remote.size, entry, str(remote), TAKE_A_NEWER_ONE)
        label = f"{entry.repo_id.split('/')[-1]}/{entry.path}"

        def check(path: Path) -> Verified:
            return _verify(path, entry, remote)

        target = self.place.target(remote)
        verified = fetch(remote, target, force=self.force, check=check, transfers=self.transfers, label=label)
        path = self.place.settle(remote)
        if entry.generation == 2:
            self._fetch_config(entry, remote.commit)
        if verified is None:
            return self._known(entry, path, remote.commit, remote=remote)
        return self._recorded(entry, path, remote.commit, verified)

    def _fetch_config(self, entry: Entry, commit: str) -> None:
        """config.json beside the weights, where the hub has one."""
        remote = look_up(entry.repo_id, f"{entry.path}/config.json", commit)
        if remote is None:
            return
        if remote.size > CONFIG_BYTES_MAX:
            raise HubError(f"{remote} is {remote.size:,} bytes long: it is no configuration.")
        target = self.place.target(remote)
        fetch(remote, target, force=self.force, check=_check_config, transfers=self.transfers, label="config.json")
        self.place.settle(remote)

    def _known(self, entry: Entry, path: Path, commit: str, remote: Remote | None) -> Downloaded:
        """A file that was here before: as recorded, or verified now. `remote`: what the hub says of it, if asked."""
        record = _read_record(self.place.record(entry.repo_id, f"{entry.path}/{entry.filename}", commit))
        stat = path.stat()
        if record is None or (record.bytes, record.changed_ns) != (stat.st_size, stat.st_mtime_ns):
            try:
                return self._recorded(entry, path, commit, _verify(path, entry, remote))
            except HubError as error:
                raise HubError(f"{str(error).rstrip('.')}; replace it with --force.") from error
        if remote is not None and remote.sha256 not in (None, record.sha256):
            raise HubError(
                f"{path} is from revision {record.revision[:12]}, and {remote} is another file. Replace it with "
                f"--force, or keep it with --revision {record.revision}."
            )
        if record.revision != commit:
            record = dataclasses.replace(record, revision=commit)
            write_json(self.place.record(entry.repo_id, record.filename, commit), to_dict(record))
        return _downloaded(entry, path, record)

    def _recorded(self, entry: Entry, path: Path, commit: str, verified: Verified) -> Downloaded:
        filename = f"{entry.path}/{entry.filename}"
        record = Record(
            repo_id=entry.repo_id,
            filename=filename,
            revision=commit,
            sha256=verified.sha256,
            bytes=verified.bytes,
            changed_ns=path.stat().st_mtime_ns,
        )
        write_json(self.place.record(entry.repo_id, filename, commit), to_dict(record))
        return _downloaded(entry, path, record)


def _downloaded(entry: Entry, path: Path, record: Record) -> Downloaded:
    return Downloaded(
        path=path,
        entry=entry,
        revision=record.revision,
        sha256=record.sha256,
        bytes=record.bytes,
        repo_id=record.repo_id,
    )


def _verify(path: Path, entry: Entry, remote: Remote | None) -> Verified:
    """The file verified, and compared with the hash that the hub gives."""
    verified = verify_file(path, entry)
    if remote is not None and remote.sha256 not in (None, verified.sha256):
        raise HubError(f"{path} has sha256 {verified.sha256[:12]}…, but {remote} has {remote.etag[:12]}….")
    return verified


def _read_record(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        return from_dict(Record, read_json(path), source=str(path))
    except ConfigError as error:
        raise HubError(f"{error}. Delete {path}; the file it describes will be verified anew.") from error


def _check_config(path: Path) -> None:
    try:
        if isinstance(json.loads(path.read_bytes()), dict):
            return
    except ValueError as error:
        raise HubError(f"{path} is not valid JSON: {error}.") from error
    raise HubError(f"{path} holds no mapping of settings.")
