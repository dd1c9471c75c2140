"""The house: who may import whom, what importing costs, and that README's map of it is right."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from minillava import doors, options, parsers
from minillava.attention import ATTENTION
from minillava.recorder import DEPTHS

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "minillava").glob("*.py"))}
README = ROOT / "README.md"

# Each row may import from the rows above it. Files that stand in one row do not know each other, but for SIDEWAYS.
ORDER = [
    ["disk"],
    ["config", "options"],
    ["linear", "files", "hub", "metadata"],
    ["attention", "foreign"],
    ["image", "prompt", "vision", "projector", "cache", "llama", "adapter", "quantize"],
    ["tokenizer_files"],
    ["tokenizer"],
    ["llava"],
    ["checkpoint", "sampling", "capture"],
    ["loop"],
    ["beam"],
    ["generate", "contrast", "transforms"],
    ["assistant"],
    ["cli"],
]
RANK = {name: i for i, row in enumerate(ORDER) for name in row}
SIDEWAYS = {("llama", "cache"), ("contrast", "transforms")}
# Upwards, inside a function, for the sake of who runs or imports them.
EXCEPTIONS = {
    ("generate", "main", "doors"),  # `python -m minillava.generate` is a door of this name
    ("generate", None, "doors"),
    ("cli", None, "doors"),  # who looks for the command line finds the doors
    ("__init__", "__getattr__", "assistant"),  # `minillava.load`
}
ALLOWED = {"torch", "safetensors", "sentencepiece", "PIL", "numpy"}


class Import(NamedTuple):
    file: str  # the importing file's stem
    function: str | None  # the outermost function or class it happens in
    module: str  # as in `import module`, absolute


def imports_of(name: str, source: str) -> list[Import]:
    """Every import of a file, also those inside functions; `from minillava import x` as minillava.x if x is a file."""
    found = []

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name, function, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "minillava." * bool(node.level) + (node.module or "")
            for alias in node.names:
                inner = f"{module.rstrip('.')}.{alias.name}"
                found.append(Import(name, function, inner if inner.removeprefix("minillava.") in FILES else module))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            function = function or node.name
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), None)
    return found


def inner_imports(name: str) -> list[Import]:
    """Of our own files, by their stems; a file that imports itself (to run as a module) is not counted."""
    own = [
        i for i in imports_of(name, FILES[name].read_text(encoding="utf-8")) if i.module.split(".")[0] == "minillava"
    ]
    stems = [i._replace(module=i.module.partition(".")[2] or "__init__") for i in own]
    return [i for i in stems if i.module != name]


def test_imports_are_found_wherever_they_are():
    """The tests below would pass on an empty list."""
    source = (
        "import torch\nfrom minillava import cli\ndef f():\n    from minillava.llama import x\n    import PIL.Image"
    )
    assert imports_of("a", source) == [
        ("a", None, "torch"),
        ("a", None, "minillava.cli"),
        ("a", "f", "minillava.llama"),
        ("a", "f", "PIL.Image"),
    ]
    assert imports_of("a", "from . import cli\nfrom .llama import x\nfrom minillava import __version__") == [
        ("a", None, "minillava.cli"),
        ("a", None, "minillava.llama"),
        ("a", None, "minillava"),
    ]
    assert ("llava", None, "vision") in inner_imports("llava")
    assert {i for name in FILES for i in inner_imports(name)} >= EXCEPTIONS


def test_the_order_is_about_files_that_exist():
    assert set(RANK) <= set(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if name in RANK])
def test_the_core_imports_only_what_comes_before_it(name):
    """Files that ORDER does not know stand around the core, which does not know them either."""
    for found in inner_imports(name):
        if found in EXCEPTIONS or found.module == "__init__":
            continue
        assert found.module in RANK, f"{name} imports {found.module}, which ORDER does not know"
        before = RANK[found.module] < RANK[name] or (name, found.module) in SIDEWAYS
        assert before, f"{name} imports {found.module}, which does not come before it"


def test_nothing_imports_in_a_circle():
    graph = {name: {i.module for i in inner_imports(name) if i not in EXCEPTIONS} for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_only_the_declared_packages_are_imported(name):
    for found in imports_of(name, FILES[name].read_text(encoding="utf-8")):
        package = found.module.split(".")[0]
        assert package == "minillava" or package in ALLOWED or package in sys.stdlib_module_names, found
        # importlib would hide transformers; two files have names beside their own, which __init__ finds
        assert package != "transformers" and (package != "importlib" or name == "__init__"), found


def in_a_fresh_python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def names_taken() -> set[str]:
    """What `import NAME` means to the standard library and to the packages we need."""
    return {*sys.stdlib_module_names, *ALLOWED}


def test_no_file_or_folder_hides_a_module_of_the_standard_library():
    """With minillava/ first on the path (`python minillava/generate.py`, or `python -m` in that folder) a file
    inspect.py was what dataclasses got for `import inspect`: nothing of torch could be imported."""
    found = {path.stem for path in (ROOT / "minillava").rglob("*") if path.suffix == ".py" or path.is_dir()}
    assert found >= set(FILES)
    assert found & names_taken() == set()
    assert "inspect" in names_taken() and "torch" in names_taken()


@pytest.mark.parametrize(
    ("name", "file"), [("minillava.inspect", "minillava.inspection"), ("minillava.trace", "minillava.tracing")]
)
def test_the_two_names_of_a_renamed_file_are_one_module(name, file):
    """Two copies would be two classes of one name: isinstance and pickle would fail between them."""
    script = f"""if 1:
        import importlib, pickle, sys
        import {name}
        from minillava import {name.split(".")[1]} as short
        other = importlib.import_module({file!r})
        assert short is other is sys.modules[{name!r}] is {name} is importlib.import_module({name!r})
        assert other.__name__ == other.__spec__.name == {file!r}
        function = pickle.loads(pickle.dumps(other.main))
        assert function is other.main is {name}.main
        assert importlib.reload({name}) is other
        from {name} import main"""
    done = in_a_fresh_python("-W", "error", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_our_own_files_import_a_renamed_file_by_its_own_name():
    """The map of imports above knows files by their stems."""
    used = {i.module for name in FILES for i in imports_of(name, FILES[name].read_text(encoding="utf-8"))}
    assert used & {"minillava.inspect", "minillava.trace"} == set()


@pytest.mark.parametrize("door", ["inspect", "trace", "look"])
def test_a_door_opens_from_inside_the_package_folder(door):
    """Who reads the source stands there."""
    done = in_a_fresh_python("-W", "error", "-m", f"minillava.{door}", "--version", folder=ROOT / "minillava")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("minillava ")


def test_a_door_runs_as_a_script():
    """What an editor's Run button does."""
    done = in_a_fresh_python("-W", "error", str(ROOT / "minillava" / "generate.py"), "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("minillava ")


def test_the_doors_are_those_that_the_files_open():
    """One table: each door has flags, a file with a guard of its name, and a line in README."""
    guarded = {}
    for stem, path in FILES.items():
        for name in re.findall(r'^    doors\.begin\("(\w+)"\)$', path.read_text(encoding="utf-8"), re.MULTILINE):
            guarded[name] = stem
    assert set(guarded) == set(doors.DOORS)
    for name, (line, stem, function) in doors.DOORS.items():
        assert f"{name}_parser" in vars(parsers) and f"read_{name}" in vars(parsers)
        assert function in vars(importlib.import_module(f"minillava.{stem}"))
        assert importlib.import_module(f"minillava.{name}").main.__module__ == f"minillava.{guarded[name]}"
        assert line[0].islower() and not line.endswith("."), line


def test_the_readme_names_every_door(readme):
    assert set(doors.DOORS) <= {module for module, _ in commands(readme)}


def test_the_words_that_flags_offer_are_those_that_the_code_takes():
    """options.py has them so that --help need not import torch."""
    assert tuple(ATTENTION) == options.ATTENTION
    assert tuple(DEPTHS) == options.DEPTHS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in options.DTYPES)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--no-such-flag"]])
@pytest.mark.parametrize("door", doors.DOORS)
def test_flags_are_read_before_torch_is_imported(door, arguments):
    """It took 1.7 s to say that a flag is wrong."""
    script = (
        f"import sys\nsys.argv[1:] = {arguments}\nfrom minillava import doors\n"
        f"try:\n    doors.enter({door!r})\n"
        "finally:\n    assert not {'torch', 'numpy', 'PIL', 'sentencepiece'} & set(sys.modules)"
    )
    done = in_a_fresh_python("-c", script)
    assert done.returncode == (2 if arguments == ["--no-such-flag"] else 0), done.stderr
    assert "Traceback" not in done.stderr


def test_setup_declares_the_same_packages():
    declared = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL)[1]
    packages = set(re.findall(r'"([a-z]+)', declared))
    assert packages == {"pillow" if name == "PIL" else name for name in ALLOWED}


def test_importing_minillava_alone_imports_nothing_heavy():
    done = in_a_fresh_python("-c", "import minillava, sys; print(*sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")
    imported = done.stdout.split()
    assert [name for name in imported if name.split(".")[0] in {"minillava", *ALLOWED}] == ["minillava"]


def test_importing_everything_warns_about_nothing():
    done = in_a_fresh_python("-W", "error", "-c", "import minillava.generate, minillava.assistant, minillava.cli")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_running_a_module_does_not_find_it_imported_already():
    """runpy warns when `python -m minillava.generate` finds minillava.generate in sys.modules."""
    done = in_a_fresh_python("-W", "error", "-m", "minillava.generate", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("minillava ")


# --- README ---------------------------------------------------------------------------------------------------


def files_in_tables(text: str) -> list[str]:
    """The files that first cells of Markdown table rows name, as paths; a bare name is one of minillava/."""
    found = []
    for row in re.findall(r"^\|([^|]+)\|", text, re.MULTILINE):
        names = dict.fromkeys(re.findall(r"[\w/.-]*\w+\.py\b", row))
        found += dict.fromkeys(name if "/" in name else f"minillava/{name}" for name in names)
    return found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every `python -m minillava.module ...`, up to the end of that command."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for module, rest in re.findall(r"python3? -m minillava\.(\w+)([^`]*)", line):
            words, lexer = [], shlex.shlex(rest, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            for word in lexer:
                if set(word) <= set("();<>|&"):
                    break
                words.append(word)
            found.append((module, words))
    return found


def flags(words: list[str]) -> list[str]:
    return [word.split("=")[0].replace("_", "-") for word in words if re.match(r"--?[A-Za-z]", word)]


def test_tables_and_commands_are_found_in_a_text():
    text = "| file | what |\n|---|---|\n| [`llava.py`](minillava/llava.py) | see `x.py` |\n| `tools/a.py` | no |\n"
    assert files_in_tables(text) == ["minillava/llava.py", "tools/a.py"]
    text = "$ cat x | python -m minillava.generate -m 'a b' \\\n  --top_k=3 | head -c 1\n`python -m minillava.chat -q`"
    assert commands(text) == [("generate", ["-m", "a b", "--top_k=3"]), ("chat", ["-q"])]
    assert flags(commands(text)[0][1]) == ["-m", "--top-k"]


@pytest.fixture(scope="module")
def readme() -> str:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    return README.read_text(encoding="utf-8")


def test_the_readme_names_every_file_once_and_none_that_does_not_exist(readme):
    named = files_in_tables(readme)
    assert [name for name in named if not (ROOT / name).exists()] == []
    ours = [name for name in named if name.startswith("minillava/")]
    assert sorted(ours) == sorted(f"minillava/{path.name}" for path in FILES.values())


def test_every_flag_that_the_readme_uses_exists(readme, capsys):
    used = commands(readme)
    assert used, "README shows no command"
    for module, words in used:
        with pytest.raises(SystemExit):
            importlib.import_module(f"minillava.{module}").main(["--help"])
        known = re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", capsys.readouterr().out)
        assert set(flags(words)) <= set(known), f"python -m minillava.{module} {shlex.join(words)}"
