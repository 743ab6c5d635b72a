"""Files in a folder or a Hub repository, and pushes to one: what goes wrong is said in a sentence.

All files of one loading are of one commit. Where they are in the cache, a branch or tag costs one request and a commit
hash costs none. Without a Hub, the cache is used and a warning says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.constants import REGEX_COMMIT_OID
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version of the client uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from .cards import README, is_ours, read_card

logger = logging.getLogger(__name__)

# What the client raises where the Hub, the network or the disk says no; RuntimeError comes from hf_xet.
_FAULTS = (HTTPError, HFValidationError, OSError, RuntimeError, XetDownloadError)
#: Of a commit.
MESSAGE = "Push with hf_sl2o"
# Seconds to wait for an answer about a file; the client's own choice for that request.
_TIMEOUT = 10.0
_BUSY = (408, 429, 500, 502, 503, 504)


def locate(place: str, kind: str, subfolder: str = "", **options: object) -> Callable[[str], Path]:
    """Returns what gives the path of a file by its name: in a folder, or of one commit of a Hub repository.

    Args:
        place (`str`): A folder, or `user/name`; a folder goes first.
        kind (`str`): What is looked for, for messages.
        subfolder (`str`, *optional*, defaults to `""`): Where in it.
        **options: Of a [`Repository`].

    Raises:
        `FileNotFoundError`: by what is returned: there is no such file; says what was looked for where.
        `ValueError`: `subfolder` leads out of the place.
    """
    inside = PurePosixPath(subfolder)
    if inside.is_absolute() or ".." in inside.parts or "\\" in subfolder or ":" in subfolder:
        raise ValueError(f"subfolder is {subfolder!r}, expected a folder inside of {place}, such as 'rule'")
    if not Path(place).is_dir():
        repository = Repository(place, kind, **options)  # type: ignore[arg-type]
        return lambda name: repository.file(str(inside / name))

    def in_folder(name: str) -> Path:
        path = Path(place) / inside / name
        if not path.is_file():
            raise FileNotFoundError(
                f"looked for a saved {kind} in the folder {path.parent}, which has no {name}; give the folder that "
                "`save_pretrained` wrote"
            )
        return path

    return in_folder


@dataclass
class Repository:
    """A Hub repository whose files are had one after another, all of the commit that the first one was of.

    Args:
        name (`str`): `user/name`.
        kind (`str`): What is looked for, for messages.
        revision, token, cache_dir, force_download, local_files_only (*optional*): As in
            `huggingface_hub.hf_hub_download`.
    """

    name: str
    kind: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False

    def __post_init__(self) -> None:
        self.commit: str | None = None
        self.asks = not (self.local_files_only or is_offline_mode())
        self.fault: Exception | None = None  # why only the cache is left
        if REGEX_COMMIT_OID.fullmatch(self.wanted) and len(self.wanted) == 40:
            self.commit = self.wanted

    @property
    def wanted(self) -> str:
        return self.revision or "main"

    def file(self, path: str) -> Path:
        """Returns where a file is on disk; it is downloaded if the cache does not have it.

        Raises:
            `FileNotFoundError`: it could not be had; one sentence says why. Nothing of it is kept.
        """
        try:
            if self.commit is None:
                found = self._first(path)
                self.commit = found.parts[-1 - len(PurePosixPath(path).parts)]
                return found
            return self._download(path, self.commit)
        except (*_FAULTS, ValueError) as error:
            fault = error
            if isinstance(error, ValueError) and not isinstance(error, _FAULTS):
                if not isinstance(error.__cause__, _FAULTS):
                    raise  # of arguments
                fault = error.__cause__  # why a forced download did not work
            # The client's own traceback would stand before the sentence.
            raise FileNotFoundError(self._sentence(path, fault)) from None

    def _first(self, path: str) -> Path:
        if not self.asks:
            return self._from_cache(path)
        url = hf_hub_url(self.name, path, revision=self.wanted)
        try:
            now = get_hf_file_metadata(url, token=self.token, timeout=_TIMEOUT).commit_hash
        except (EntryNotFoundError, RevisionNotFoundError):
            raise  # the Hub knows that there is none
        except (HTTPError, OSError) as error:
            return self._first_without_hub(path, error)
        known = try_to_load_from_cache(self.name, path, cache_dir=self.cache_dir, revision=self.wanted)
        if isinstance(known, str) and now in Path(known).parts and not self.force_download:
            return Path(known)
        return self._download(path, self.wanted)  # notes in the cache what the branch stands for now

    def _first_without_hub(self, path: str, error: Exception) -> Path:
        """From the cache; the client would use it without a word."""
        if not self.force_download:
            self.asks, self.fault = False, error
            try:
                return self._from_cache(path)
            except LocalEntryNotFoundError:
                pass
            if isinstance(error, HfHubHTTPError) and error.response.status_code in _BUSY:
                self.asks, self.fault = True, None
                return self._download(path, self.wanted)  # the client tries again, some seconds later
        raise error

    def _from_cache(self, path: str) -> Path:
        """As asked for, or without the Hub, which is said."""
        found = self._download(path, self.wanted)
        if self.fault is not None:
            logger.warning(
                "%s (revision %s) is taken from the cache, which may be older than what the Hub has: %s",
                self.name, self.wanted, self._why(path, self.fault),
            )  # fmt: skip
        return found

    def _download(self, path: str, revision: str) -> Path:
        return Path(
            hf_hub_download(
                self.name,
                path,
                revision=revision,
                cache_dir=self.cache_dir,
                force_download=self.force_download,
                local_files_only=not self.asks,
                token=self.token,
            )
        )

    def _sentence(self, path: str, error: Exception) -> str:
        tried = f"looked for a saved {self.kind} at {self.name!r}: it is no local folder (here: {Path.cwd()}), and"
        if isinstance(error, HFValidationError):
            return f"{tried} no name of a Hub repository, which is 'user/name'; check the path"
        where = f"{path} of the Hub repository of that name (revision {self.wanted})"
        return f"{tried} {where} could not be had: {self._why(path, error)}"

    def _why(self, path: str, error: Exception) -> str:
        if isinstance(error, LocalEntryNotFoundError) and self.fault is not None:
            return f"the cache has only a part, and {self._why(path, self.fault)}"
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            if other := self._other_type():
                return f"it is a {other} on the Hub, not a {self.kind}; give the name of a repository that holds one"
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return (
                f"the repository is there and has no {path}; what `{self.kind}.push_to_hub` writes has one: is it "
                "something else?"
            )
        return why(error, self.token, f"the repository has no revision {self.wanted!r}; check the name")

    def _other_type(self) -> str | None:
        """Whether a data set or a space has this name."""
        for kind, word in (("dataset", "data set"), ("space", "space")):
            try:
                HfApi(token=self.token).repo_info(self.name, repo_type=kind, timeout=_TIMEOUT)
                return word
            except _FAULTS:
                continue
        return None


def why(error: Exception, token: str | bool | None, no_revision: str = "there is no such revision") -> str:
    """Returns a sentence, without a stop, on what a request to the Hub ended with, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    text = (str(error).strip().splitlines() or [""])[0]
    given = isinstance(token, str) or (token is not False and get_token() is not None)
    if isinstance(error, GatedRepoError):
        return f"access to it must be granted by its owner ({status}); ask for it on its page on the Hub"
    if isinstance(error, RevisionNotFoundError):
        return f"{no_revision} ({status})"
    if isinstance(error, RepositoryNotFoundError):
        access = "the token that was sent may not see it" if given else "no token was sent"
        remedy = "check the name and the token" if given else "check the name, or log in with `hf auth login`"
        return f"there is no such repository, or it is private and {access} ({status}); {remedy}"
    if status == 401 and not given:
        return "no token was sent (401); log in with `hf auth login`, or set HF_TOKEN"
    if status == 401:
        return "the Hub does not know the token that was sent (401); log in again with `hf auth login`"
    if status == 403:
        return "the token that was sent does not allow that (403); take one with write access to that name"
    if status in _BUSY:
        return f"the Hub has trouble ({status}); try again later"
    if isinstance(error, OfflineModeIsEnabled) or (isinstance(error, LocalEntryNotFoundError) and is_offline_mode()):
        return "HF_HUB_OFFLINE is set, and the cache does not have it; unset it once to download"
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, Exception) and not isinstance(cause, OfflineModeIsEnabled):
            return why(cause, token, no_revision)
        return "nothing may be downloaded (local_files_only), and the cache does not have it"
    if isinstance(error, HTTPError) and status is None:
        return f"the Hub could not be reached, or hung up ({type(error).__name__}: {text}); try again with a network"
    return f"{type(error).__name__}: {text}"


# Pushing


def push(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = MESSAGE,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Commits all files of a folder to a repository, which is made if there is none; all of them or none.

    A card that somebody wrote or changed on the Hub stays, unless the one in the folder is somebody's own, too.

    Args:
        folder (`Path`): Where they are, one a README.md.
        repo_id (`str`): `user/name`, or the name alone.
        commit_message, private, token, branch, create_pr: As in `huggingface_hub.HfApi`. A branch is made.

    Returns:
        The URL of the commit.

    Raises:
        `ValueError`: the card's metadata are refused; nothing was sent.
        `PermissionError`: the token is missing, unknown or not enough.
        `ConnectionError`: the Hub cannot be reached; the repository is as it was.
    """
    card = read_card(folder / README)
    api = HfApi(token=token)
    with _in_words(repo_id, token):
        try:
            card.validate()  # before anything is made
        except ValueError as error:
            raise ValueError(
                f"the Hub refuses the metadata of README.md: {_faults(error)}; nothing was sent"
            ) from None
        made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(made).private:
            raise ValueError(f"{made} is there and public, and private=True was asked for; nothing was sent to it")
        if branch and not create_pr and not branch.startswith("refs/"):
            api.create_branch(made, branch=branch, exist_ok=True)
        kept = [README] if is_ours(folder / README) and not _card_is_ours(api, made, branch) else []
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        operations = [CommitOperationAdd(name, folder / name) for name in names if name not in kept]
        done = api.create_commit(made, operations, commit_message=commit_message, revision=branch, create_pr=create_pr)
        return str(done.commit_url)


def _card_is_ours(api: HfApi, repo_id: str, branch: str | None) -> bool:
    """Whether the card on the Hub may be written again."""
    with TemporaryDirectory() as folder:
        try:
            return is_ours(Path(api.hf_hub_download(repo_id, README, revision=branch, cache_dir=folder)))
        except (EntryNotFoundError, RevisionNotFoundError):
            return True


def _faults(error: Exception) -> str:
    """What stands in the Hub's answer to a card."""
    try:
        return "; ".join(str(fault["message"]) for fault in json.loads(str(error))["errors"])
    except (ValueError, KeyError, TypeError):
        return str(error)


@contextmanager
def _in_words(repo_id: str, token: str | bool | None) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"repo_id is {repo_id!r}, expected 'user/name' ({str(error).splitlines()[0]})") from None
    except (HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        kind: type[OSError] = OSError
        if status in (401, 403):
            kind = PermissionError
        elif status in _BUSY or (status is None and isinstance(error, HTTPError | ConnectionError)):
            kind = ConnectionError
        end = "files arrive all together or not at all" if status is None else "no file there was changed"
        raise kind(f"could not push to {repo_id!r}: {why(error, token)}; {end}") from None
