"""The local hub cache: found as huggingface_hub finds it, and nothing outside it."""

import os
import re
from pathlib import Path

import pytest

from minillava.checkpoint.folders import bundled_weights, find_folder, find_folders
from minillava.files.hub import CLIP_DOWNLOAD, SIZES, cache_folder, find_snapshot, is_repo_id

REPO = "org/name"
FIRST, SECOND, THIRD = "0123456789abcdef" * 2 + "01234567", "abcd" * 10, "abcd1" * 8
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, whatever this machine has."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def store(
    cache: Path, commit: str = FIRST, refs: tuple[str, ...] = ("main",), files=("config.json",)
) -> Path:
    """A snapshot as huggingface_hub writes it: files are relative links into blobs/."""
    home = cache / "models--org--name"
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True)
    (home / "blobs").mkdir(exist_ok=True)
    for name in files:
        blob = home / "blobs" / f"{commit[:8]}-{name}"
        blob.write_text("{}", encoding="utf-8")
        (folder / name).symlink_to(Path("..", "..", "blobs", blob.name))
    for name in refs:
        path = home / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="utf-8")
    return folder


def refusal(error: type[Exception], *arguments: str | None) -> str:
    with pytest.raises(error) as caught:
        find_snapshot(*arguments)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "revision",
    [None, "main", "v1.0", "refs/pr/1", FIRST, FIRST[:7], FIRST[:4]],
    ids=lambda r: str(r)[:10],
)
def test_a_snapshot_is_found_by_branch_tag_and_commit(cache, revision):
    """A revision that the hub's own tools accept would not be found, though it is downloaded."""
    folder = store(cache, refs=("main", "v1.0", "refs/pr/1"))
    store(cache, SECOND, refs=("other",))
    assert find_snapshot(REPO, revision) == folder
    assert (find_snapshot(REPO, revision) / "config.json").read_text(encoding="utf-8") == "{}"


def test_a_branch_goes_before_the_commit_that_it_is_spelled_like(cache):
    """A branch called abcd would give the commit that begins with these letters."""
    store(cache, SECOND, refs=())
    assert find_snapshot(REPO, "abcd").name == SECOND
    folder = store(cache, FIRST, refs=("abcd",))
    assert find_snapshot(REPO, "abcd") == folder


def test_files_need_not_be_links(cache):
    """On Windows without developer mode huggingface_hub copies."""
    folder = store(cache, files=())
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert find_snapshot(REPO) == folder


@pytest.mark.parametrize("count", range(4))
def test_the_cache_is_where_the_first_of_these_variables_says(monkeypatch, tmp_path, count):
    """A model would not be found because we look in another folder than the download used."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("SOMEWHERE", str(tmp_path / "some"))
    for i, name in enumerate(VARIABLES):
        monkeypatch.setenv(name, "" if i < count else f"~/{i}/$SOMEWHERE_NOT")
    below = ("", "", "hub", "huggingface/hub")[count]
    assert cache_folder() == tmp_path / "home" / str(count) / "$SOMEWHERE_NOT" / below
    monkeypatch.setenv(VARIABLES[count], "$SOMEWHERE/deep")
    assert cache_folder() == tmp_path / "some" / "deep" / below


def test_without_variables_the_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    """Without any variable set, as for most users, the cache would not be found."""
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"


# --- what is not there ----------------------------------------------------------------------------


def test_what_is_not_there_names_the_folder_the_size_and_the_one_command(cache):
    """A user would have to find out the download command, or learn only while it runs that it takes
    14 GB."""
    repo = "llava-hf/llava-1.5-7b-hf"
    home = cache / "models--llava-hf--llava-1.5-7b-hf"
    command = f"put it there with: hf download {repo}"
    assert refusal(FileNotFoundError, repo) == (
        f"{repo}: no revision 'main' of it in the hub cache {home}; {command} (14.1 GB)"
    )
    assert refusal(FileNotFoundError, repo, "v2").endswith(f"{command} --revision v2 (14.1 GB)")
    assert refusal(FileNotFoundError, repo, "$(v2)").endswith(
        f"{command} --revision '$(v2)' (14.1 GB)"
    )
    for known in ("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"):
        assert refusal(FileNotFoundError, known).endswith(
            f"; put it there with: hf download {known}"
        )
    assert all(is_repo_id(name) and re.match(r"\d+\.\d GB", size) for name, size in SIZES.items())


def test_a_mistyped_folder_does_not_become_advice_to_download_a_strangers_model(cache):
    """Anybody may register weights/shapes on the hub."""
    found = f"no such folder here, and no such model in the hub cache {cache}; check the name"
    assert refusal(FileNotFoundError, "weights/shapes") == f"weights/shapes: {found}"
    # but for one of which something was downloaded before, or whose revision was named: it is meant
    assert refusal(FileNotFoundError, REPO, "v2").endswith("hf download org/name --revision v2")
    store(cache, refs=())
    assert refusal(FileNotFoundError, REPO).endswith("; put it there with: hf download org/name")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("weights/shape", "weights/shapes"),
        ("weigths/shapes", "weights/shapes"),
        ("./weight/shaps", "weights/shapes"),
        ("other/shapes", None),  # but for the bundled model, which is not far
        ("weights/llava-7b", "weights/llava-1.5-7b"),
    ],
)
def test_a_mistyped_folder_leads_to_the_one_most_like_it(tmp_path, monkeypatch, given, meant):
    """A mistyped path looks like a name on the hub: a user would be told to download it."""
    monkeypatch.chdir(tmp_path)
    for name in ("shapes", "llava-1.5-7b", "empty"):
        (tmp_path / "weights" / name).mkdir(parents=True)
    meant = bundled_weights() if meant is None else Path(meant)
    with pytest.raises(FileNotFoundError, match=re.escape(f"; did you mean {meant}?")) as caught:
        find_folder(given)
    assert "hf download weights" not in str(caught.value)
    assert "?;" not in str(caught.value)  # one sentence after the other


@pytest.mark.parametrize("name", ["nosuch", "openai/clip-x", "someone/clip"])
def test_each_folder_beside_the_weights_gets_its_own_advice(tmp_path, monkeypatch, name):
    """For a missing adapter it was to download LLaVA, and for a tower that is not on the hub to
    download that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    told = []
    for others in ((name, None, None), (None, name, None), (None, None, name)):
        with pytest.raises(FileNotFoundError) as caught:
            find_folders(Path(__file__).parent, None, *others)
        told.append(str(caught.value))
    tower, *rest = told
    assert tower.endswith(f"; get one with: {CLIP_DOWNLOAD}")
    assert tower.count("hf download") == 1
    for message in rest:
        assert "no such" in message
        assert "; check the " in message
        assert "hf download" not in message


@pytest.mark.parametrize("revision", ["v2", SECOND, "ffff", "ff", "refs", "refs/pr"])
def test_another_revision_is_not_taken_for_the_one_asked_for(cache, revision):
    """Another revision than the one asked for would answer, without a word."""
    store(cache, refs=("main", "refs/pr/1"))
    message = refusal(FileNotFoundError, REPO, revision)
    assert f"no revision {revision!r}" in message
    assert f"which holds other revisions ({FIRST[:8]})" in message


def test_without_main_no_snapshot_is_guessed(cache):
    """Some snapshot would be taken for the main branch because it is the only one there."""
    store(cache, refs=())
    assert "no revision 'main'" in refusal(FileNotFoundError, REPO)


def test_an_abbreviation_of_two_commits_is_refused_naming_both(cache):
    """One of two commits would be chosen by the order of the folder."""
    store(cache, SECOND, refs=())
    store(cache, THIRD, refs=())
    message = refusal(ValueError, REPO, "abcd")
    assert SECOND in message
    assert THIRD in message
    assert find_snapshot(REPO, "abcd1").name == THIRD


@pytest.mark.parametrize("damage", ["no file", "dangling link", "directory", "no snapshot", "loop"])
def test_a_snapshot_without_config_json_says_so_and_how_to_finish_it(cache, damage):
    """An interrupted download would be reported as a broken model, not as one to be finished."""
    folder = store(cache, files=("model.safetensors",))
    # a download that was interrupted: the blob is still called .incomplete
    if damage == "dangling link":
        (folder / "config.json").symlink_to(Path("..", "..", "blobs", "absent"))
    elif damage == "directory":
        (folder / "config.json").mkdir()
    elif damage == "loop":
        (folder / "config.json").symlink_to("config.json")
    elif damage == "no snapshot":
        folder.rename(folder.with_name("away"))
    message = refusal(FileNotFoundError, REPO)
    assert message.startswith(
        f"{folder}: " + ("no such folder" if damage == "no snapshot" else "holds no config.json")
    )
    assert message.endswith("finish it with: hf download org/name")


# --- nothing outside the cache --------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["../../etc", f"../{FIRST}", "/etc", "", "main", FIRST + "0", FIRST.upper(), "\udc80"],
)
def test_a_reference_cannot_lead_out_of_the_snapshots(cache, content):
    """A reference in the cache could have a folder anywhere on the disk read as a model."""
    store(cache)
    reference = cache / "models--org--name" / "refs" / "main"
    reference.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert refusal(ValueError, REPO).startswith(f"{reference}: holds ")


@pytest.mark.parametrize(
    "revision",
    [
        "../x",
        "..",
        ".",
        "",
        "/etc/hostname",
        "a/../../b",
        "a//b",
        "a\\b",
        "C:x",
        "a b",
        "a\nb",
        "*",
        "a/",
        "x" * 300,
    ],
)
def test_a_revision_cannot_lead_out_of_the_references(cache, revision):
    """A revision that is a path would read a file anywhere on the disk."""
    store(cache)
    (cache / "models--org--name" / "x").write_text(FIRST, encoding="utf-8")
    message = refusal(ValueError, REPO, revision)
    assert message.startswith("org/name: ")
    assert "is no revision" in message


NO_REPOS = [
    "", "name", "/", "org/", "/name", "a/b/c", "../x", "..", "./x", "x/..", "x/.", "/etc/passwd", "~/x", "a b/c",
    "org/na--me", "org/na..me", "-org/name", "org/name-", "org/.name", "org\\name", "C:/x", "org/näme", "org/name\n",
    "o" * 97 + "/name", "org/name.git",
]  # fmt: skip


@pytest.mark.parametrize("repo", NO_REPOS)
def test_what_is_no_name_on_the_hub_is_refused(repo):
    """A path or a URL would be looked for in the cache as if it were a name on the hub."""
    assert not is_repo_id(repo)
    assert "expected ORG/NAME" in refusal(ValueError, repo)


def test_an_adapter_needs_no_config_json(cache):
    """A downloaded adapter, which has no config.json, would be called an unfinished download."""
    folder = store(cache, files=("adapter_config.json",))
    assert find_snapshot(REPO) == folder


def test_a_path_that_exists_is_no_repo_id(tmp_path, monkeypatch):
    """A folder of the user's that is spelled ORG/NAME would be looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    assert is_repo_id("weights/mine")
    Path("weights").mkdir()
    assert not is_repo_id("weights/mine")  # but a typing error, or a folder that is not there yet
    Path("weights/mine").symlink_to("nowhere")
    assert not is_repo_id("weights/mine")
    assert is_repo_id("liuhaotian/llava-v1.5-7b")


# --- huggingface_hub itself -----------------------------------------------------------------------


@pytest.fixture
def huggingface_hub():
    return pytest.importorskip(
        "huggingface_hub", reason="huggingface_hub is not installed to compare with"
    )


@pytest.mark.parity
@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/1", FIRST, SECOND, THIRD, "v2"])
def test_huggingface_hub_finds_the_same(cache, huggingface_hub, revision):
    """A model that huggingface_hub has downloaded would not be found, or another revision of it."""
    store(cache, refs=("main", "refs/pr/1"))
    store(cache, SECOND, refs=("v1.0",))
    options = {"revision": revision, "cache_dir": cache}
    try:
        ours = find_snapshot(REPO, revision)
    except FileNotFoundError:
        assert huggingface_hub.try_to_load_from_cache(REPO, "config.json", **options) is None
        with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
            huggingface_hub.snapshot_download(REPO, local_files_only=True, **options)
        return
    assert ours == Path(huggingface_hub.snapshot_download(REPO, local_files_only=True, **options))
    assert str(ours / "config.json") == huggingface_hub.try_to_load_from_cache(
        REPO, "config.json", **options
    )


@pytest.mark.parity
def test_huggingface_hub_allows_the_same_names(huggingface_hub):
    """It also allows names without an organisation, of which there is no LLaVA; and it allows no
    path."""
    for repo in [*NO_REPOS, *SIZES, "a/b", "A_b/c.d-e"]:
        try:
            huggingface_hub.utils.validate_repo_id(repo)
            allowed = "/" in repo
        except huggingface_hub.errors.HFValidationError:
            allowed = False
        assert is_repo_id(repo) == allowed, repo


@pytest.mark.parity
def test_huggingface_hub_writes_what_is_found_here(cache, huggingface_hub, tmp_path):
    """Its own code makes folders and links; only the download is left out."""
    folder_name = huggingface_hub.file_download.repo_folder_name(repo_id=REPO, repo_type="model")
    home = cache / folder_name
    blob, pointer = home / "blobs" / "b10b", home / "snapshots" / FIRST / "config.json"
    for path in (blob, pointer):
        path.parent.mkdir(parents=True)
    blob.write_text("{}", encoding="utf-8")
    huggingface_hub.file_download._create_symlink(str(blob), str(pointer))
    huggingface_hub.file_download._cache_commit_hash_for_specific_revision(
        str(home), "refs/pr/7", FIRST
    )
    assert find_snapshot(REPO, "refs/pr/7") == pointer.parent
    assert os.path.samefile(pointer, blob)
