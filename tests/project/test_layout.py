"""The house: who may import whom, what importing costs, and that README's map of it is right."""

import ast
import functools
import importlib
import re
import shlex
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import python
from paths import ROOT

from minillava import options
from minillava.attention import ATTENTION
from minillava.cli import doors
from minillava.serve.run import EXTRA
from minillava.tracing.recorder import DEPTHS

PACKAGE = ROOT / "minillava"
README = ROOT / "README.md"


def module_name(path: Path) -> str:
    """minillava/files/disk.py is `files.disk`; the __init__.py of a folder is the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}

# What a student reads, in this order; each file may import those before it.
SPINE = ["config", "options", "image", "templates", "prompt", "tokenizer", "attention", "vision"]
SPINE += ["projector", "cache", "llama", "llava", "sampling", "streaming", "loop", "labels"]
SPINE += ["assistant"]
# Of these, the files that tell one greedy answer.
GREEDY = ["config", "image", "prompt", "tokenizer", "attention", "vision", "projector", "cache"]
GREEDY += ["llama", "llava", "loop"]
# Each shelf may import those before it: folders, the files of the spine, and the one file where
# parts meet.
SHELVES = ["files", "spine", "tiles", "fast", "generate", "checkpoint", "assistant", "cli"]
SHELVES += ["doors"]
# Side by side: none knows another. But weights are stored in 8 or 4 bits, or become so or packed while
# they are read or written, and which precision is best depends on what is fast here.
SIDE_BY_SIDE = {"fast", "generate", "checkpoint"}
# And each of several processes reads its part of the weights.
SIDEWAYS = {
    ("checkpoint", f"fast.{name}") for name in ("quantize", "packed", "processor", "parallel")
}
# folders of the last shelf; none knows another, but that probe measures what look shows, and serve
# sends it
DOORS = {
    "chat",
    "batch",
    "look",
    "probe",
    "tracing",
    "inspection",
    "serve",
    "convert",
    "pope",
    "finetune",
}
DOOR_TO_DOOR = {
    ("probe", "look"),
    ("serve", "look"),
    *zip(sorted(DOORS), sorted(DOORS), strict=True),
}
# generate/ holds strategies, and a door
OF_A_DOOR = {"generate.answer", "generate.flags", "generate.__main__", "cli.__main__", "__main__"}
# of the spine, those that read something from a disk, or have what callers give them checked
READ_FILES = {"options", "image", "tokenizer", "llava", "sampling", "assistant"}
LIMIT = 2600  # lines of the spine; the last thirty are for a sampler or a template
GREEDY_LIMIT = 1500
ALLOWED = {"torch", "safetensors", "sentencepiece", "PIL", "numpy"}
# of a door alone, which says what is missing
EXTRAS = {"serve": set(EXTRA), "finetune": {"wandb"}, "batch": {"ray"}}


def shelf(name: str) -> str:
    first = name.split(".")[0]
    if name in OF_A_DOOR or first in DOORS:
        return "doors"
    if name == "assistant":
        return "assistant"
    return "spine" if name in SPINE else first


class Import(NamedTuple):
    file: str  # the importing module, as FILES names it
    function: str | None  # the outermost function or class it happens in
    module: str  # as in `import module`, absolute


def imports_of(name: str, source: str) -> list[Import]:
    """Every import of a file, also those inside functions; `from minillava import x` as minillava.x
    if x is a file."""
    found = []

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name, function, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "minillava." * bool(node.level) + (node.module or "")
            for alias in node.names:
                inner = f"{module.rstrip('.')}.{alias.name}"
                found.append(
                    Import(name, function, inner if inner.partition(".")[2] in FILES else module)
                )
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            function = function or node.name
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), None)
    return found


@functools.cache
def imports_in(name: str) -> list[Import]:
    return imports_of(name, FILES[name].read_text(encoding="utf-8"))


def inner_imports(name: str) -> list[Import]:
    """Of our own files, by their stems; a file that imports itself (to run as a module) is not
    counted."""
    own = [i for i in imports_in(name) if i.module.split(".")[0] == "minillava"]
    stems = [i._replace(module=i.module.partition(".")[2] or "__init__") for i in own]
    return [i for i in stems if i.module != name]


def test_imports_are_found_wherever_they_are():
    """The tests below would pass on an empty list."""
    source = (
        "import torch\nfrom minillava.cli import doors\n"
        "def f():\n    from minillava.llama import x\n    import PIL.Image"
    )
    assert imports_of("a", source) == [
        ("a", None, "torch"),
        ("a", None, "minillava.cli.doors"),
        ("a", "f", "minillava.llama"),
        ("a", "f", "PIL.Image"),
    ]
    assert imports_of("a", "from minillava import loop\nfrom minillava import __version__") == [
        ("a", None, "minillava.loop"),
        ("a", None, "minillava"),
    ]
    assert ("llava", None, "vision") in inner_imports("llava")
    assert ("cli.doors", "enter", "cli.messages") in inner_imports("cli.doors")
    assert len(FILES) > 80 and len(SPINE) == 17


def test_every_file_stands_on_a_shelf():
    """The rules about imports would not apply to a new file that no shelf knows."""
    assert set(SPINE) <= set(FILES)
    assert {shelf(name) for name in FILES if name != "__init__"} == set(SHELVES)


def test_a_shelf_knows_only_those_before_it():
    """Also inside functions: what is imported late is a dependency all the same."""
    for name, found in ((file, found) for file in FILES for found in inner_imports(file)):
        if "__init__" in (name, found.module):
            continue
        ours, theirs, told = shelf(name), shelf(found.module), f"{name} imports {found.module}"
        assert not found.module.endswith("__main__"), told
        if theirs == "files":
            assert ours != "spine" or name in READ_FILES, told
        if ours == "spine" == theirs:
            assert SPINE.index(found.module) < SPINE.index(name), told
        elif ours == "doors" == theirs:
            assert (name.split(".")[0], found.module.split(".")[0]) in DOOR_TO_DOOR, told
        elif ours != theirs and {ours, theirs} <= SIDE_BY_SIDE:
            assert (ours, found.module) in SIDEWAYS, told
        elif ours != theirs:
            assert SHELVES.index(theirs) < SHELVES.index(ours), told


def test_nothing_imports_in_a_circle():
    """Importing one module would fail or work by which other was imported first."""
    graph = {name: {i.module for i in inner_imports(name) if i.function is None} for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_only_the_declared_packages_are_imported():
    """An installation of the declared packages would end in a ModuleNotFoundError."""
    for name, found in ((file, found) for file in FILES for found in imports_in(file)):
        package = found.module.split(".")[0]
        allowed = ALLOWED | EXTRAS.get(name.split(".")[0], set())
        assert package == "minillava" or package in allowed or package in sys.stdlib_module_names, (
            found
        )
        # importlib would hide transformers; three modules have names beside their own, which
        # files/modules.py finds
        late = name == "files.modules"
        assert package != "transformers" and (package != "importlib" or late), found


def lines_of(names: list[str]) -> int:
    """Printed, too: who reads the output sees where a file has grown."""
    lines = {name: len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in names}
    print(*(f"{count:5} {name}" for name, count in lines.items()), sep="\n")
    print(f"{sum(lines.values()):5} in all")
    return sum(lines.values())


def test_the_spine_does_not_grow(readme):
    """What a student reads in an afternoon. README told the eleven files of one greedy answer
    alone, though the loop runs five more."""
    assert lines_of(SPINE) < LIMIT
    assert f"the spine has fewer than {LIMIT:,}" in " ".join(readme.split())


def test_one_greedy_answer_is_told_in_as_few_lines_as_readme_says(readme):
    """README would promise a shorter read than the files are."""
    assert set(GREEDY) <= set(SPINE) and len(GREEDY) == 11
    assert lines_of(GREEDY) < GREEDY_LIMIT
    assert f"fewer than {GREEDY_LIMIT:,} lines" in readme


def functions_of(name: str) -> dict[tuple[str, int], int]:
    """How many lines each function of a file has, by its name and its first line: several classes
    have a `forward`."""
    return {
        (node.name, node.lineno): node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def test_functions_fit_a_screen():
    """One of 112 lines held everything that trace says; nobody could tell what came when."""
    long = {name: {k: n for k, n in functions_of(name).items() if n > 45} for name in FILES}
    assert {name: functions for name, functions in long.items() if functions} == {}


def names_taken() -> set[str]:
    """What `import NAME` means to the standard library and to the packages we need."""
    return {*sys.stdlib_module_names, *ALLOWED}


def test_no_file_or_folder_hides_a_module_of_the_standard_library():
    """With minillava/ first on the path (`python minillava/generate.py`, or `python -m` in that
    folder) a file inspect.py was what dataclasses got for `import inspect`: nothing of torch could
    be imported."""
    found = {path.stem for path in PACKAGE.rglob("*") if path.suffix == ".py" or path.is_dir()}
    assert found >= {path.stem for path in FILES.values()}
    assert found & names_taken() == set()
    assert "inspect" in names_taken() and "torch" in names_taken()


RENAMED = [
    ("minillava.inspect", "minillava.inspection", "inspect_folder", ".report"),
    ("minillava.trace", "minillava.tracing", "trace", ".page"),
    ("minillava.contrast", "minillava.generate.contrast", "VCD", ""),
]


def same_module(name: str, file: str, kept: str, inside: str) -> str:
    """A script that fails if the two names are two modules."""
    return f"""if 1:
        import importlib, pickle, sys
        import {name}
        from minillava import {name.split(".")[1]} as short
        other = importlib.import_module({file!r})
        assert short is other is sys.modules[{name!r}] is {name} is importlib.import_module({name!r})
        assert other.__name__ == other.__spec__.name == {file!r}
        kept = getattr(other, {kept!r})
        assert pickle.loads(pickle.dumps(kept)) is kept is getattr({name}, {kept!r})
        inside, its = importlib.import_module({name!r} + {inside!r}), importlib.import_module({file!r} + {inside!r})
        assert inside is its
        assert importlib.reload({name}) is other
        from {name} import {kept}
"""


def test_the_two_names_of_what_was_renamed_are_one_module():
    """Two copies would be two classes of one name: isinstance and pickle would fail between
    them."""
    script = "".join(same_module(*renamed) for renamed in RENAMED)
    done = python("-W", "error", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_our_own_files_import_a_renamed_file_by_its_own_name():
    """The map of imports above knows files by their stems."""
    used = {i.module for name in FILES for i in imports_in(name)}
    assert [
        name for name in used if name.startswith(("minillava.inspect.", "minillava.trace."))
    ] == []
    assert used & {"minillava.inspect", "minillava.trace"} == set()


@pytest.mark.parametrize("door", ["inspect", "trace", "look"])
def test_a_door_opens_from_inside_the_package_folder(door):
    """Who reads the source stands in that folder, where a name of ours that the standard library
    has as well would hide its module."""
    done = python("-W", "error", "-m", f"minillava.{door}", "--version", cwd=PACKAGE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("minillava ")


def test_a_door_runs_as_a_script():
    """The Run button of an editor, which runs the file and not the module, would end in an
    ImportError."""
    done = python("-W", "error", str(PACKAGE / "generate" / "__main__.py"), "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("minillava ")


def test_the_doors_are_those_that_the_folders_open():
    """One table: each door has flags, a folder with a __main__.py, the function it calls, and a
    line in README."""
    begun = {}
    for name, path in FILES.items():
        for door in re.findall(
            r'^    begin\("(\w+)"\)$', path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            begun[door] = name
    assert set(begun) == set(doors.DOORS)
    for name, (line, module, function) in doors.DOORS.items():
        assert {"make_parser", "read_flags"} <= set(vars(doors.flags_of(name)))
        assert function in vars(importlib.import_module(f"minillava.{module}"))
        folder = module.split(".")[0]
        assert begun[name] == f"{folder}.__main__" and folder in FILES  # or no wheel has it
        assert (
            importlib.import_module(f"minillava.{name}").__name__
            == f"minillava.{module.split('.')[0]}"
        )
        assert line[0].islower() and not line.endswith("."), line


def test_the_readme_names_every_door(readme):
    """A command would exist that no reader of README hears of."""
    assert set(doors.DOORS) <= {module for module, _ in commands(readme)}


def test_the_words_that_flags_offer_are_those_that_the_code_takes():
    """options.py has them so that --help need not import torch."""
    assert tuple(ATTENTION) == options.ATTENTION
    assert tuple(DEPTHS) == options.DEPTHS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in options.DTYPES)


@pytest.mark.parametrize("door", doors.DOORS)
def test_flags_are_read_before_torch_is_imported(door):
    """It took 1.7 s to say that a flag is wrong."""
    script = f"""if 1:
        import sys
        from minillava.cli import doors
        for flag, status in (("--help", 0), ("--version", 0), ("--no-such-flag", 2)):
            sys.argv[1:] = [flag]
            try:
                doors.enter({door!r})
            except SystemExit as left:
                assert left.code == status, (flag, left.code)
            else:
                raise AssertionError(flag)
            assert not {{"torch", "numpy", "PIL", "sentencepiece"}} & set(sys.modules), flag"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_setup_declares_the_same_packages():
    """pip would install fewer packages than the code imports, or more."""
    declared = re.search(
        r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL
    )[1]
    packages = set(re.findall(r'"([a-z]+)', declared))
    assert packages == {"pillow" if name == "PIL" else name for name in ALLOWED}


def test_importing_minillava_alone_imports_nothing_heavy():
    """Each command, its --help included, would wait seconds for torch."""
    done = python("-c", "import minillava, sys; print(*sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")
    imported = done.stdout.split()
    assert {name for name in imported if name.split(".")[0] in {"minillava", *ALLOWED}} == {
        "minillava",
        "minillava.files",
        "minillava.files.modules",
    }


def test_importing_everything_warns_about_nothing():
    """Every user would see a warning from an import before the first answer."""
    done = python(
        "-W", "error", "-c", "import minillava.generate, minillava.assistant, minillava.cli"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_running_a_module_does_not_find_it_imported_already():
    """runpy warns when `python -m minillava.generate` finds minillava.generate in sys.modules."""
    done = python("-W", "error", "-m", "minillava.generate", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("minillava ")


# --- README ---------------------------------------------------------------------------------------


def files_in_tables(text: str) -> list[str]:
    """The files that first cells of Markdown table rows name, as paths; a bare name is one of
    minillava/."""
    found = []
    for row in re.findall(r"^\|([^|]+)\|", text, re.MULTILINE):
        names = dict.fromkeys(re.findall(r"[\w/.-]*\w+\.py\b", row))
        found += dict.fromkeys(name if "/" in name else f"minillava/{name}" for name in names)
    return found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every `python -m minillava.module ...`, up to the end of that
    command."""
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
    return [
        word.split("=")[0].replace("_", "-") for word in words if re.match(r"--?[A-Za-z]", word)
    ]


def test_tables_and_commands_are_found_in_a_text():
    """The checks of README would find nothing in it, and pass."""
    text = (
        "| file | what |\n|---|---|\n| [`llava.py`](minillava/llava.py) | see `x.py` |\n| "
        "`tools/a.py` | no |\n"
    )
    assert files_in_tables(text) == ["minillava/llava.py", "tools/a.py"]
    text = (
        "$ cat x | python -m minillava.generate -m 'a b' \\\n  --top_k=3 | head -c 1\n`python -m "
        "minillava.chat -q`"
    )
    assert commands(text) == [("generate", ["-m", "a b", "--top_k=3"]), ("chat", ["-q"])]
    assert flags(commands(text)[0][1]) == ["-m", "--top-k"]


@pytest.fixture(scope="module")
def readme() -> str:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    return README.read_text(encoding="utf-8")


def test_the_readme_names_every_file_once_and_none_that_does_not_exist(readme):
    """README would lead to a file that was renamed, or leave a new one out."""
    named = files_in_tables(readme)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in named if name.startswith("minillava/")] == [
        f"minillava/{name}.py" for name in SPINE
    ]
    for folder in sorted(
        path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
    ):
        (row,) = re.findall(
            rf"^\| \[`{folder.name}/`\]\(minillava/{folder.name}\) \|(.*)\|$", readme, re.MULTILINE
        )
        told = [
            name
            for name in re.findall(r"`(\w+)`", row)
            if name in {path.stem for path in folder.glob("*.py")}
        ]
        assert sorted(told) == sorted(path.stem for path in folder.glob("[!_]*.py"))


def test_every_flag_that_a_page_uses_exists(readme, capsys):
    """A command copied from a page would be refused for an unknown flag."""
    used = commands(readme)
    assert used, "README shows no command"
    for page in sorted(PACKAGE.glob("*/README.md")):
        used += commands(page.read_text(encoding="utf-8"))
    for module, words in used:
        with pytest.raises(SystemExit):
            doors.enter(module, ["--help"])
        known = re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", capsys.readouterr().out)
        assert set(flags(words)) <= set(known), f"python -m minillava.{module} {shlex.join(words)}"
