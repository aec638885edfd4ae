"""Compare the index with what the hub holds now, from the hub's own file listing.

A listing says which folders hold weights and how long the files are; it does not say which are canonical or shown on
Neuronpedia, nor a second-generation target L0. So entries that were known keep what is known of them, and new ones come
without. Nothing is downloaded but the listings, a page for each thousand files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mistudio.errors import HubError
from mistudio.hub.entry import Entry, parse
from mistudio.hub.index import decode, encode, entries

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = ("params.npz", "params.safetensors")


@dataclass(frozen=True, kw_only=True)
class Refreshed:
    """An index as the hub has it now, and how it differs from the one before."""

    entries: tuple[Entry, ...]
    """All of them; `index.encode` makes a file of them, which MISTUDIO_HUB_INDEX can name."""
    added: tuple[Entry, ...]
    """On the hub, and not in the index before."""
    removed: tuple[Entry, ...]
    """In the index before, and no longer on the hub."""
    wrong_size: tuple[tuple[Entry, int], ...]
    """Files that cannot be whole, or are not what their place says, with the bytes that the hub states."""


def refresh(*, repos: Iterable[str] | None = None, endpoint: str | None = None, token: str | None = None) -> Refreshed:
    """The index, brought up to date with the hub. `repos`: only these; None: all that it knows.

    Where `endpoint` and `token` are None, those of the environment count (HF_ENDPOINT, HF_TOKEN). HubError: a
    repository cannot be listed; nothing is changed then.
    """
    from huggingface_hub import HfApi

    known = entries()
    chosen = list(dict.fromkeys(e.repo_id for e in known)) if repos is None else list(dict.fromkeys(repos))
    api = HfApi(endpoint=endpoint, token=token)
    _require_hub(api.endpoint)
    return compare(known, {repo_id: listing(repo_id, api) for repo_id in chosen})


def compare(known: Iterable[Entry], listings: Mapping[str, Mapping[str, int]]) -> Refreshed:
    """`known`, brought up to date with the listings: repository -> path of a file -> bytes. Others stay as they are."""
    before = {(e.repo_id, e.path): e for e in known}
    now = {key: entry for key, entry in before.items() if key[0] not in listings}
    added, wrong_size = [], []
    for repo_id, files in listings.items():
        for path, file_bytes in files.items():
            found = parse_file(repo_id, path)
            if found is None:
                continue
            key = found.repo_id, found.path
            if key not in before:
                added.append(found)
            now[key] = before.get(key, found)
            if not found.size_fits(file_bytes):
                wrong_size.append((now[key], file_bytes))
    return Refreshed(
        entries=decode(encode(now.values())),
        added=tuple(added),
        removed=tuple(entry for key, entry in before.items() if key not in now),
        wrong_size=tuple(wrong_size),
    )


def parse_file(repo_id: str, path: str) -> Entry | None:
    """The entry of a weights file in a repository; None for any other file.

    `layer_20/width_16k/average_l0_71/params.npz` and `resid_post/layer_13_width_16k_l0_medium/params.safetensors` are
    such files; configurations, examples, crosscoders, cross-layer transcoders and `canonical/` copies are not.
    """
    folder, _, name = path.rpartition("/")
    if name not in WEIGHTS:
        return None
    entry = parse(repo_id, folder)
    return entry if entry is not None and entry.filename == name else None


def listing(repo_id: str, api: "HfApi") -> dict[str, int]:
    """Path -> bytes of every file in a repository, at its newest revision. HubError: why not, and what to do."""
    from huggingface_hub import errors as hub
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = api.list_repo_tree(repo_id, recursive=True)
        return {item.path: item.size for item in tree if isinstance(item, RepoFile)}
    except hub.OfflineModeIsEnabled as error:
        raise HubError("The hub was not asked: HF_HUB_OFFLINE is set. Unset it to refresh the index.") from error
    except hub.HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise HubError(
                f"{repo_id} cannot be listed ({error.response.status_code}): it is gone, or wants an account that "
                f"accepted its licence at {api.endpoint}/{repo_id}. Log in with `hf auth login`, or set HF_TOKEN."
            ) from error
        raise HubError(f"{repo_id} cannot be listed: {api.endpoint} answered {_first_line(error)}") from error
    except (_transport_error(), OSError) as error:
        raise _unreachable(api.endpoint, error) from error


def _require_hub(endpoint: str) -> None:
    """Returns where the hub answers anything. HubError, at once: it does not. (A listing asks six times in 23 s.)"""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.OfflineModeIsEnabled:
        return  # which the listing says
    except (_transport_error(), OSError) as error:
        raise _unreachable(endpoint, error) from error


def _unreachable(endpoint: str, error: BaseException) -> HubError:
    return HubError(
        f"{endpoint} cannot be reached ({_first_line(error)}). The index that is there goes on working; try again "
        "with a network, or set HF_ENDPOINT to a mirror."
    )


def _transport_error() -> type[Exception]:
    """What the hub's client raises without a network: httpx's HTTPError, httpx2's from huggingface_hub 2 on."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__bases__[0])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
