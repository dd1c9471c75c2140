"""What surrounds the code: the contributing page, the workflow, the hooks, and the import check."""

import ast
import re
import runpy
import stat
import sys
from pathlib import Path

import pytest
from paths import ROOT

PAGE = ROOT / ".github" / "CONTRIBUTING.md"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"

imports = runpy.run_path(str(ROOT / ".ci" / "imports"))


def words_in(path: Path) -> list[str]:
    return re.split(r"[\s`():;,]+", path.read_text(encoding="utf-8"))


def named_files(path: Path) -> set[str]:
    """Every word that is a path of the repository: a known folder's, or with a file's ending."""
    return {
        word.rstrip(".")
        for word in words_in(path)
        if re.match(r"(minillava|tests|tools|\.ci|\.github)/\w", word)
    }


def test_every_file_that_the_contributing_page_names_exists():
    """A file that moves leaves the page behind."""
    named = {
        name
        for name in named_files(PAGE)
        if name not in {"minillava/files/x.py", "tests/files/test_x.py"}
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_name_that_the_contributing_page_places_is_there():
    """The page says `NAME` in `file`: it would send a reader to a file that no longer has it."""
    placed = re.findall(r"`(\w+)` in `([\w/.-]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(placed) >= 5
    for name, file in placed:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), (name, file)


def test_the_contributing_page_is_one_screen():
    """A page that grows with every rule would no longer be read."""
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("name", ["run", "imports"])
def test_the_workflow_calls_what_a_person_runs(name):
    """A check that only the workflow makes fails after the push; one that it forgets never fails."""
    commands = re.findall(r"^ *- run: (.+)$", WORKFLOW.read_text(encoding="utf-8"), re.MULTILINE)
    assert [command for command in commands if command.split()[-1] == f".ci/{name}"] != []
    assert (ROOT / ".ci" / name).stat().st_mode & stat.S_IXUSR
    if name != "run":
        assert f".ci/{name}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_oldest_python_of_the_workflow_is_that_of_the_package():
    """The package would promise a Python on which nobody runs the tests."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'python_requires=">=([\d.]+)"', setup)
    (matrix,) = re.findall(r"python: \[(.+)\]", WORKFLOW.read_text(encoding="utf-8"))
    assert matrix.split(", ")[0] == f'"{oldest}"'


# What the extra `test` brings, and modules of Python that not every system has.
NOT_EXTRAS = {"pty", "readline", "nbclient", "ipykernel"}
# Of these .ci/run runs all, in an environment that has what they need.
MARKS = re.compile(r"mark\.(parity|clients)\b")


def skips_without(function: ast.AST) -> set[str]:
    """The packages that it needs, by pytest.importorskip."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    named = [call.args[0].value for call in calls if "importorskip" in ast.unparse(call.func)]
    return {name.split(".")[0] for name in named} - NOT_EXTRAS


def unmarked(source: str) -> list[str]:
    """Tests that need an extra, themselves or by a fixture, and have none of the MARKS."""
    body = ast.parse(source).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    others = ast.Module([node for node in body if node not in functions], [])
    if MARKS.search(ast.unparse(others)):  # pytestmark
        return []
    need = {each.name for each in functions if skips_without(each)}
    while more := {
        each.name
        for each in functions
        if each.name not in need and need & {argument.arg for argument in each.args.args}
    }:
        need |= more
    marked = {each.name for each in functions if MARKS.search(ast.unparse(each))}
    everything = [each.name for each in functions] if skips_without(others) else sorted(need)
    return [name for name in everything if name.startswith("test_") and name not in marked]


def test_what_needs_an_extra_is_marked():
    """Two files that compare with transformers were in no list of .ci/run: they never ran there."""
    source = """
@pytest.fixture
def package():
    return pytest.importorskip("peft.tuners")

@pytest.fixture
def user(package): ...
def test_a(user): ...
@pytest.mark.parity
def test_b(package): ...
def test_c(): pytest.importorskip("pty")
def test_d(): pytest.importorskip("transformers", minversion="5")"""
    assert unmarked(source) == ["test_a", "test_d"]
    assert unmarked('pytest.importorskip("peft")\ndef test_a(): ...') == ["test_a"]
    assert unmarked(f"pytestmark = pytest.mark.parity\n{source}") == []
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(paths) > 40
    found = {path.name: unmarked(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: tests for name, tests in found.items() if tests} == {}


def test_the_hooks_run_what_is_here():
    """A hook would name a script that has moved, or download something at each commit."""
    text = HOOKS.read_text(encoding="utf-8")
    entries = re.findall(r"entry: (.+)", text)
    assert len(entries) == text.count("language: system") == text.count("- id:") >= 3
    assert text.count("repo:") == text.count("repo: local")  # no network
    assert all((ROOT / name).exists() for name in named_files(HOOKS))


def test_the_package_says_that_it_is_typed():
    """Without the marker, and without its line in setup.py, type checkers ignore annotations."""
    assert (ROOT / "minillava" / "py.typed").read_bytes() == b""
    assert '"minillava": ["py.typed"]' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_the_import_check_knows_every_module():
    """A module in a new folder would never be imported by the check."""
    names = imports["modules"](ROOT / "minillava")
    assert {"minillava", "minillava.loop", "minillava.files", "minillava.chat.__main__"} <= set(
        names
    )
    assert len(names) == len(list((ROOT / "minillava").rglob("*.py")))


def test_the_import_check_names_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    """The check would pass although a module cannot be imported."""
    (tmp_path / "hungry_module.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert imports["failures"](["minillava.config", "hungry_module"]) == [
        "hungry_module: ModuleNotFoundError: No module named 'no_such_package'"
    ]


def test_the_import_check_lets_a_module_of_an_extra_lack_it_and_not_its_door(monkeypatch):
    """A door without its extra would end in a traceback and not in the name of what to install."""
    for name in [name for name in sys.modules if name.startswith("minillava.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("msgspec", "argparse"):
        monkeypatch.setitem(sys.modules, name, None)
    found = imports["failures"](["minillava.serve.protocol", "minillava.serve.run"])
    assert [line.partition(":")[0] for line in found] == ["minillava.serve.run"]


def test_the_import_check_follows_what_packages_require():
    """An extra's packages are not required: with them here, a module that needs one would pass."""
    lines = {
        "minillava": ["torch>=2.6", 'pytest>=7; extra == "test"', "Some_Name[x, y_z]>=1"],
        "torch": ['numpy; python_version >= "3"'],
        "some-name": [
            "a; extra == 'x'",
            'b (>1) ; (os_name == "nt") and extra == "y-z"',
            "c; extra == 'd'",
        ],
    }
    found = imports["needed"]("minillava", lines.get)
    assert found == {"minillava", "torch", "numpy", "some-name", "a", "b"}
