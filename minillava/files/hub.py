"""Models in the local Hugging Face hub cache, found by its documented layout; nothing is ever
downloaded.

models--ORG--NAME/refs/REVISION a text file: the commit that a branch or tag was at when it was
downloaded models--ORG--NAME/snapshots/COMMIT the model's files as a folder, each a link to its
content in blobs/
"""

import os
import re
import shlex
from pathlib import Path

SIZES = {
    "llava-hf/llava-1.5-7b-hf": "14.1 GB",
    "llava-hf/llava-1.5-13b-hf": "26.7 GB",
    "liuhaotian/llava-v1.5-7b": "13.5 GB, its vision tower 1.7 GB more",
    "liuhaotian/llava-v1.5-13b": "26.1 GB, its vision tower 1.7 GB more",
    "llava-hf/llava-interleave-qwen-0.5b-hf": "1.7 GB",
}
"""What the weights of a release weigh, for the message that recommends to download them."""

_ORGANISATIONS = {"llava-hf", "liuhaotian", "lmsys"}  # of LLaVA and of its language models

# as huggingface_hub's validate_repo_id
_REPO = re.compile(r"\b[A-Za-z0-9._-]{1,96}\b/\b[A-Za-z0-9._-]{1,96}\b")

_REVISION = re.compile(r"[^\s\\:~^?*\[]{1,200}")  # what git allows in the name of a branch

_COMMIT = re.compile(r"[0-9a-f]{40}")

_ABBREVIATED = re.compile(r"[0-9a-f]{4,40}")


def is_repo_id(text: str) -> bool:
    """Whether a text can only mean ORG/NAME on the hub: it is spelled like one, no such path
    exists, and the folder ORG does not exist either."""
    return (
        _is_name(str(text))
        and not os.path.lexists(text)
        and not os.path.isdir(os.path.dirname(text))
    )


def find_snapshot(repo: str, revision: str | None = None) -> Path:
    """The folder of a model ("ORG/NAME") that `hf download` has put into the cache.

    revision: a branch, a tag, or a commit, which may be abbreviated; None is "main", as for `hf
    download`. Raises FileNotFoundError, with the download command if we know the name, or
    ValueError if `repo` is not ORG/NAME or git does not allow the revision as a name.
    """
    if not _is_name(repo):
        raise ValueError(
            f"{repo!r} is not a model on the hub, expected ORG/NAME such as {next(iter(SIZES))}"
        )
    option = "" if revision is None else f" --revision {shlex.quote(revision)}"
    revision = "main" if revision is None else revision
    if not _REVISION.fullmatch(revision) or {"", ".", ".."} & set(revision.split("/")):
        raise ValueError(
            f"{repo}: {revision!r} is no revision, expected a branch, a tag or a commit"
        )
    cache = cache_folder()
    home = cache / f"models--{repo.replace('/', '--')}"
    size = f" ({SIZES[repo]})" if repo in SIZES else ""
    command = f"hf download {repo}{option}"
    commit = _commit(home, revision)
    certain = repo == CLIP_RELEASE or repo.partition("/")[0] in _ORGANISATIONS
    if commit is None and not (home.is_dir() or option or certain):
        # The name is more likely a folder's, and anybody may have registered it on the hub.
        raise FileNotFoundError(
            f"{repo}: no such folder here, and no such model in the hub cache {cache}; check the "
            "name"
        )
    if commit is None:
        others = ", ".join(path.name[:8] for path in sorted(home.glob("snapshots/*")))
        there = f", which holds other revisions ({others})" if others else ""
        looked = f"no revision {revision!r} of it in the hub cache {home}{there}"
        raise FileNotFoundError(f"{repo}: {looked}; put it there with: {command}{size}")
    folder = home / "snapshots" / commit
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        found = "holds no config.json" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: {found}, the download is incomplete; finish it with: {command}{size}"
        )
    return folder


def cache_folder() -> Path:
    """The folder in which huggingface_hub keeps its cache, from the same environment variables; an
    empty one counts as not set."""
    variables = {
        "HF_HUB_CACHE": "",
        "HUGGINGFACE_HUB_CACHE": "",
        "HF_HOME": "hub",
        "XDG_CACHE_HOME": "huggingface/hub",
    }
    given = (
        Path(os.environ[name], below) for name, below in variables.items() if os.environ.get(name)
    )
    folder = next(given, Path("~", ".cache", "huggingface", "hub"))
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def _is_name(text: str) -> bool:
    return bool(_REPO.fullmatch(text)) and not (
        "--" in text or ".." in text or text.endswith(".git")
    )


def _commit(home: Path, revision: str) -> str | None:
    """The commit that a revision means: the revision itself, what refs/ says, or the only snapshot
    whose name begins with it."""
    if _COMMIT.fullmatch(revision):
        return revision if (home / "snapshots" / revision).is_dir() else None
    reference = home / "refs" / revision
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
        if not _COMMIT.fullmatch(commit):
            raise ValueError(
                f"{reference}: holds {commit[:60]!r}, expected a commit of 40 hex digits; download "
                "again"
            )
        return commit
    found = (
        [path.name for path in home.glob(f"snapshots/{revision}*")]
        if _ABBREVIATED.fullmatch(revision)
        else []
    )
    if len(found) > 1:
        raise ValueError(
            f"{home}: revision {revision!r} begins {len(found)} commits "
            f"({', '.join(sorted(found))})"
        )
    return found[0] if found else None


CLIP_RELEASE = "openai/clip-vit-large-patch14-336"

CLIP_DOWNLOAD = f"hf download {CLIP_RELEASE} --local-dir {CLIP_RELEASE.split('/')[1]}"

RELEASE = "llava-hf/llava-1.5-7b-hf"
"""LLaVA-1.5 by its name on the Hugging Face hub."""

SMALL_RELEASE = "llava-hf/llava-interleave-qwen-0.5b-hf"
"""The small relative that a laptop runs, which messages recommend first."""

DOWNLOAD, SMALL_DOWNLOAD = (
    f"hf download {name} --local-dir weights/{name.split('/')[1]}"
    for name in (RELEASE, SMALL_RELEASE)
)
