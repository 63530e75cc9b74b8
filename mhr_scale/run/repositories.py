"""Repositories of the Hugging Face hub: their names, what is fetched from them, what is pushed.

A place on the hub is written `owner/name@revision:folder`; revision (a branch, a tag, a commit) and
folder may be left out. What lies here by that very name comes first. Whoever is asked for a token
takes the one that huggingface_hub knows (`hf auth login`, HF_TOKEN): none is ever written down.
"""

import glob
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path

from mhr_scale.errors import RunError, UserError, first_line, some

log = getLogger("mhr_scale")

NAME = re.compile(
    r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<revision>[^\s:@]+))?(:(?P<folder>[^:]+))?", re.ASCII
)
LOG_IN = "log in (hf auth login) or set HF_TOKEN"
#: What inputs of a run begin with that name a commit: another one may hold the same content.
COMMIT_OF = "commit of "
#: The branch of a repository that a name without one means.
MAIN = "main"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, or a file, in a repository of the hub."""

    id: str
    revision: str | None = None
    folder: str = ""

    @property
    def name(self) -> str:
        """Repository and folder, of whatever revision."""
        return str(replace(self, revision=None))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.id}{revision}" + (f":{self.folder}" if self.folder else "")


@dataclass(frozen=True, slots=True)
class Found:
    """Where something lies on this machine, and the commit it was fetched at, if from the hub."""

    path: Path
    place: Place | None = None
    commit: str | None = None

    @property
    def facts(self) -> dict[str, str | None]:
        """What provenance says of it."""
        if self.place is None:
            return {"path": str(self.path)}
        return {"hub": self.place.name, "revision": self.place.revision, "commit": self.commit}

    def name_inside(self, folder: Path) -> str:
        """The name of a folder in this one, by which it is found as this one was."""
        if self.place is None:
            return str(folder)
        inside = [self.place.folder, folder.relative_to(self.path).as_posix()]
        return str(replace(self.place, folder="/".join(part for part in inside if part)))


#: What this process has found last, by the names that it was asked for.
_found: dict[str, Found] = {}


def parse(text: str) -> Place | None:
    """The place on the hub that a text may name; None if it can only be a path."""
    match = NAME.fullmatch(text)
    if match is None:
        return None
    folder = (match["folder"] or "").strip("/")
    parts = folder.split("/") if folder else []
    if any(part in ("", ".", "..") for part in parts) or (match["folder"] and not parts):
        return None
    if parts and "/" not in match["id"]:
        return None
    return Place(match["id"], match["revision"], folder)


def is_here(text: str) -> bool:
    """Whether a name is that of a file or folder on this machine."""
    with suppress(OSError):  # too long for a path
        return Path(text).expanduser().exists()
    return False


def split(text: str) -> tuple[str, str | None]:
    """A name without its revision, and the revision; what lies here has none."""
    place = parse(text)
    if place is None or place.revision is None or is_here(text):
        return text, None
    return place.name, place.revision


def name_of(text: str) -> str:
    """What names that differ in their revisions alone have in common."""
    return split(text)[0]


def joined(name: str, revision: str | None) -> str:
    """A name with its revision, if it has one; the opposite of `split`."""
    place = parse(name)
    if place is None or revision is None or is_here(name):
        return name
    return str(replace(place, revision=revision))


def find(text: str, get: Callable[[Place], Found]) -> Found:
    """What a name with a revision names: what lies here by that name, else what `get` fetches.

    Without a revision it is a path.
    """
    place = parse(text)
    if place is None or place.revision is None or is_here(text):
        return here(text, Path(text))
    return remember(text, get(place))


def here(text: str, path: Path) -> Found:
    """A path that a name leads to, which is told of a name that reads like one of the hub."""
    place = parse(text)
    if place is not None and place.revision is not None:
        log.info("%s: is read here, and not from the hub", text)
    return remember(text, Found(path))


def remember(text: str, found: Found) -> Found:
    """Keep in mind what a name has led to."""
    _found[text] = found
    return found


def last_found(text: str) -> Found:
    """What a name led to when this process looked last, and if it never did, the path it is."""
    return _found.get(text, Found(Path(text)))


def commits(*names: str | None) -> dict[str, str]:
    """At which commits this process has fetched things, as inputs of a run (`RunFolder`).

    Without names, everything that it has.
    """
    found = [_found[name] for name in names or _found if name in _found]
    return {f"{COMMIT_OF}{one.place.name}": str(one.commit) for one in found if one.place}


def pinned(text: str | None) -> str | None:
    """A name as it leads to the same content at any time: with the commit for its revision."""
    found = _found.get(text or "")
    if found is None or found.place is None or found.commit is None:
        return text
    return str(replace(found.place, revision=found.commit))


# -- from the hub ----------------------------------------------------------------------------------


def fetch(
    place: Place,
    choose: Callable[[Sequence[str]], Sequence[str]],
    *,
    what: str,
    error: type[UserError],
    way_out: str,
) -> Found:
    """The local copy of a place, after downloading what it lacks of the files that are chosen.

    `choose` picks them from all files there, by their names in the folder of the place; of a place
    that is a file it is not asked. The hub is asked once, and in vain for `HF_HUB_ETAG_TIMEOUT`
    seconds at most; what was fetched before counts then. Downloads have the hub's own patience.
    Errors begin with `what` and end with the `way_out`.
    """
    from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    refusal: Exception | None = None
    files: list[str] | None = None
    try:
        info = HfApi().model_info(
            place.id, revision=place.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = [file.rfilename for file in info.siblings or ()]
    except RevisionNotFoundError as fault:
        known = _revisions(place)
        there = f" (there are: {some(known)})" if known else ""
        raise error(
            f"{what}: {place.id} has no revision '{place.revision}' on the hub{there}; {way_out}"
        ) from fault
    except Exception as fault:
        refusal = fault
        with suppress(Exception):  # fetched by an earlier version of the hub's library
            tree = get_cached_repo_tree(place.id, revision=place.revision)
            files = [file.path for file in tree]
    wanted = None if files is None else _inside(place, files, choose, what, error)
    try:
        root = snapshot_download(
            place.id,
            revision=place.revision,
            allow_patterns=None if wanted is None else [glob.escape(file) for file in wanted],
            local_files_only=refusal is not None,
        )
    except Exception as fault:
        raise error(
            f"{what}: '{place}' is no local folder and the hub does not give it "
            f"({_reason(refusal or fault, place)}); {way_out}"
        ) from fault
    path = Path(root)
    if refusal is not None:
        log.info("%s: as fetched before, %s (%s)", place, path.name[:12], _reason(refusal, place))
    return Found(path / place.folder, place, path.name)


def _inside(
    place: Place,
    files: Sequence[str],
    choose: Callable[[Sequence[str]], Sequence[str]],
    what: str,
    error: type[UserError],
) -> list[str]:
    """The chosen files of a place by their names in the repository.

    Raises `error` if the repository has no such folder.
    """
    if place.folder in files:
        return [place.folder]
    prefix = f"{place.folder}/" if place.folder else ""
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    if prefix and not inside:
        folders = sorted({file.rpartition("/")[0] for file in files if "/" in file})
        there = f"there are: {some(folders)}" if folders else "it has no folders"
        raise error(f"{what}: {place}: no folder '{place.folder}' in that repository; {there}")
    return [prefix + file for file in choose(inside)]


def _revisions(place: Place) -> list[str]:
    """Branches and tags of a repository; none if they are not to be had."""
    from huggingface_hub import HfApi

    with suppress(Exception):
        refs = HfApi().list_repo_refs(place.id)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    return []


def _reason(fault: Exception, place: Place) -> str:
    """Why the hub does not give or take something, and what helps, in one line."""
    from huggingface_hub import errors

    if isinstance(fault, errors.GatedRepoError):
        return f"gated: ask for access on the page of {place.id}, and {LOG_IN}"
    if isinstance(fault, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one: if it is, {LOG_IN}"
    if isinstance(fault, errors.HfHubHTTPError) and fault.response.status_code in (401, 403):
        return f"the token may not do that: {LOG_IN} with one that may"
    return f"{type(fault).__name__}: {first_line(fault)}"


# -- to the hub ------------------------------------------------------------------------------------


def target(text: str) -> Place:
    """The place to push to; raises `RunError` if the name is none, or nothing can be pushed."""
    from huggingface_hub import constants, get_token

    place = parse(text)
    if place is None or "/" not in place.id:
        raise RunError(
            f"hub: '{text}' is no place to push to; write owner/name, owner/name@branch or "
            "owner/name@branch:folder"
        )
    if constants.HF_HUB_OFFLINE:
        raise RunError("hub: HF_HUB_OFFLINE is set, and nothing can be pushed; unset it")
    if get_token() is None:
        raise RunError(f"hub: no token to push to {place.id} with; {LOG_IN}")
    return place


def push(folder: Path, place: Place, *, private: bool, message: str) -> str:
    """Push a folder's files, and return the commit of the hub that holds them.

    A missing repository, or branch, is made. Raises `RunError` with the reason and the way out; the
    folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(place.id, private=private, exist_ok=True)
        if private and not api.model_info(place.id).private:
            raise RunError(
                f"hub: {place.id} is public, and hub_private is true; set hub_private: false to "
                f"push {folder} there"
            )
        if place.revision not in (None, MAIN):
            api.create_branch(place.id, branch=str(place.revision), exist_ok=True)
        pushed = api.upload_folder(
            repo_id=place.id,
            folder_path=folder,
            path_in_repo=place.folder or None,
            revision=place.revision,
            commit_message=message,
            ignore_patterns=["**/.*"],
        )
    except RunError:
        raise
    except Exception as fault:
        raise RunError(
            f"hub: {place}: not pushed ({_reason(fault, place)}); {folder} is whole: the same "
            "command pushes it again"
        ) from fault
    return str(pushed.oid)
