"""The classroom page: its links and names lead somewhere, and the bundled model answers every
exercise as it says."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from models import stored
from paths import ROOT

from minillava import loop
from minillava.cache import KVCache
from minillava.loop import steps
from minillava.sampling import last_logits

PACKAGE = ROOT / "minillava"
PAGE = (PACKAGE / "CLASSROOM.md").read_text(encoding="utf-8")
WEIGHTS = ROOT / "weights" / "shapes"
LINK = r"\[`?([\w./]+)`?\]\(([\w./]+)\)"


class Exercise(NamedTuple):
    title: str
    file: str  # of minillava/; "" where nothing is changed
    place: str
    old: str
    new: str
    runs: list[tuple[str, str]]  # a command line or Python code, and what it prints
    test: tuple[str, str]  # file and name


FOLDED = r"```(?:sh|python)\n([^`]*)\n```\n\n<details>\n<summary>[^\n]*</summary>\n\n```text\n([^`]*)\n```\n"


def runs_of(text: str) -> list[tuple[str, str]]:
    """Commands or Python code and what they print, shown as in a terminal or folded below the
    command."""
    found = [
        tuple(part.rstrip("\n").split("\n", 1))
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    ]
    return found + re.findall(FOLDED, text)


def exercises(page: str) -> list[Exercise]:
    """The exercises of the page; first, as one without a change, what the model says unchanged, and
    last, without one too, the experiments."""
    found = [
        Exercise(
            "unchanged",
            "",
            "",
            "",
            "",
            runs_of(page.partition("<!-- unchanged -->")[2].split("\n#")[0]),
            (),
        )
    ]
    page, experiments = page.split("\n## Experiments\n")
    for text in re.split(r"^### (?=\d)", page, flags=re.MULTILINE)[1:]:
        title, body = text.split("\n", 1)
        file, place = re.search(rf"^In {LINK}, `([\w.]+)`:$", body, re.MULTILINE).group(2, 3)
        old, new = re.search(r"```diff\n-(.*)\n\+(.*)\n```", body).groups()
        test, path = re.search(rf"`(test_\w+)` in {LINK} fails\.", body).group(1, 3)
        found.append(Exercise(title, file, place, old, new, runs_of(body), (path, test)))
    for text in re.split(r"^### ", experiments, flags=re.MULTILINE)[1:]:
        title, body = text.split("\n", 1)
        found.append(Exercise(title, "", "", "", "", runs_of(body), ()))
    return found


EXERCISES = exercises(PAGE)
CHANGES = [exercise for exercise in EXERCISES if exercise.file]
EXPERIMENTS = [exercise for exercise in EXERCISES[1:] if not exercise.file]
QUESTIONS = {
    file: re.findall(r"^- (.*\?) ([^?\n]*)$", text, re.MULTILINE)
    for file, text in re.findall(
        r"^### \[`[\w/]+\.py`\]\(([\w/]+\.py)\)\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL
    )
}


def core() -> list[str]:
    """The files in reading order, as the package's docstring lists them."""
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
    names = re.search(r"order of the data:([\w\s,]+)\.", text)[1]
    return ["__init__.py", *(f"{name}.py" for name in re.findall(r"\w+", names))]


def places(source: str) -> dict[str, str]:
    """Every class, function, field and constant of a file ("LlavaConfig.feature_layer") -> its
    text, with the comment or string behind it."""
    lines, found = source.splitlines(), {}

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node, after in zip(nodes, [*nodes[1:], None], strict=True):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            end = node.end_lineno
            if isinstance(after, ast.Expr) and isinstance(node, (ast.Assign, ast.AnnAssign)):
                end = after.end_lineno  # a constant's docstring
            first = node.lineno - 1
            while first and lines[first - 1].lstrip().startswith("#"):
                first -= 1  # comments above it
            found.update({prefix + name: "\n".join(lines[first:end]) for name in names})

    visit(ast.parse(source).body, "")
    return found


def readme_tables() -> tuple[list[str], list[str]]:
    """README's files in reading order, and its folders."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = readme.split("| file | what to learn there |")[1].partition("\n\n")[0]
    folders = readme.split("| folder | what is in it |")[1].partition("\n\n")[0]
    return re.findall(r"^\| \[`(\w+\.py)`\]", files, re.MULTILINE), re.findall(
        r"^\| \[`(\w+)/`\]", folders, re.MULTILINE
    )


def test_the_questions_follow_the_reading_order_and_leave_no_file_out():
    """A new file of the package would have no question, or stand where a student does not yet
    read."""
    around = list(QUESTIONS)[len(core()) :]
    assert list(QUESTIONS)[: len(core())] == core()
    folders = [name.partition("/")[0] for name in around]
    assert list(dict.fromkeys(folders)) == [name for name in readme_tables()[1] if name in folders]
    assert {"files", "checkpoint", "fast", "generate"} <= set(folders)
    assert all(QUESTIONS.values())


def test_readme_has_the_same_reading_order():
    """There were three: README's, the package's and this page's."""
    assert ["__init__.py", *readme_tables()[0]] == core()


@pytest.mark.parametrize("file", QUESTIONS)
def test_every_question_has_its_answer_in_the_file(file):
    """A student would look for an answer in a function that was renamed or says nothing about
    it."""
    source = (PACKAGE / file).read_text(encoding="utf-8")
    known = places(source)
    for question, where in QUESTIONS[file]:
        if where == "the top of the file":
            assert ast.get_docstring(ast.parse(source))
            continue
        names = re.findall(r"`([\w.]+)`", where)
        assert names and where == ", ".join(f"`{name}`" for name in names), question
        for name in names:
            assert name in known, f"{file} has no {name}: {question}"
            assert "#" in known[name] or '"""' in known[name], f"{name} says nothing: {question}"


def test_links_lead_somewhere():
    """A link to a file that has moved would leave a student with an empty page."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", PAGE) if "://" not in link]
    assert [link for link in links if not (PACKAGE / link).exists()] == []
    assert "minillava/CLASSROOM.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("exercise", CHANGES, ids=lambda e: e.title)
def test_an_exercise_changes_one_line_and_names_a_test(exercise):
    """A student could not find the line to change, or the test that should notice it."""
    source = (PACKAGE / exercise.file).read_text(encoding="utf-8")
    assert source.splitlines().count(exercise.old) == 1
    assert exercise.old in places(source)[exercise.place]
    ast.parse(source.replace(exercise.old, exercise.new))
    path, test = exercise.test
    assert f"\ndef {test}(" in (PACKAGE / path).read_text(encoding="utf-8")
    assert exercise.runs


@pytest.mark.parametrize("exercise", EXERCISES[1:], ids=lambda e: e.title)
def test_an_answer_is_folded_below_its_question(exercise):
    """It stood four lines below "guess what the model will say"."""
    body = PAGE.partition(f"### {exercise.title}\n")[2].partition("\n### ")[0]
    seen, folded, _ = re.split(r"</?details>", body)
    ((command, answer),) = exercise.runs
    assert command in seen and answer not in seen
    assert answer in folded
    assert not exercise.test or f"`{exercise.test[1]}`" in folded


@pytest.mark.parametrize("most", [1, 4, 12])
def test_the_plain_loop_answers_as_the_real_one(most, reference):
    """loop.py's docstring shows what is left of it; it is code, and runs, in a cache of the real
    one's size: it read its last token once more than there was room for."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / "loop.py").read_text(encoding="utf-8")))
    code = textwrap.dedent("\n".join(re.findall(r"^(?: {4}.*)?$", docstring, re.MULTILINE)))
    names = {**vars(loop), "last_logits": last_logits}
    exec(code, names)
    assert len(code.strip().splitlines()) <= 10
    toy = stored()
    spliced = toy.prepare(
        reference / "pictures" / "landscape.png", toy.prompt("What is it?", images=1)
    )
    room = spliced.embeds.shape[1] + most - 1
    cache = KVCache(toy.model.config.text, 1, room, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        plain = list(names["plain"](toy.model, spliced, cache, most))
    real = [step.ids[0] for step in steps(toy.model, spliced, toy.options(max_new_tokens=most))]
    assert plain == [token for token in real if token not in toy.model.config.eos_token_ids]
    assert len(plain) >= min(most, 4)


def test_there_are_exercises():
    """The tests above would pass on an empty list."""
    titles = re.findall(r"^### (\d+\. .*)$", PAGE, re.MULTILINE)
    assert [exercise.title for exercise in CHANGES] == titles
    assert len(CHANGES) >= 10
    assert len(EXPERIMENTS) >= 2
    assert all(len(exercise.runs) == 1 for exercise in EXPERIMENTS)
    assert "TODO" not in PAGE


# Runs in a Python of its own, where `minillava` is one changed copy after the other.
RUNNER = """
import contextlib, io, json, os, shlex, sys
sys.dont_write_bytecode = True
answers = []
for folder, runs in json.load(sys.stdin):
    for name in [name for name in sys.modules if name.split(".")[0] == "minillava"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    os.chdir(folder)
    answers.append([])
    for run in runs:
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if run.startswith("python -m minillava.generate "):
                from minillava.cli.doors import enter
                status = enter("generate", shlex.split(run)[3:])
            else:
                exec(run, {})
        said = err.getvalue().splitlines()[-1] if status else out.getvalue()
        answers[-1].append(said.rstrip("\\n"))
    sys.path.remove(folder)
print(json.dumps(answers))
"""


def answer(some: list[Exercise], weights: Path, folder: Path) -> list[list[str]]:
    """What each run of each exercise prints, its change made in a copy of the package."""
    jobs = []
    for i, exercise in enumerate(some):
        copy = folder / str(i)
        shutil.copytree(
            PACKAGE, copy / "minillava", ignore=shutil.ignore_patterns("__pycache__", "*.md")
        )
        (copy / "weights").mkdir()
        (copy / "weights" / "shapes").symlink_to(weights.resolve())
        if exercise.file:
            path = copy / "minillava" / exercise.file
            source = path.read_text(encoding="utf-8")
            path.write_text(source.replace(exercise.old, exercise.new), encoding="utf-8")
        jobs.append((str(copy), [run for run, _ in exercise.runs]))
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MINILLAVA_WEIGHTS", "PYTHONPATH")
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(jobs),
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def answers(tmp_path_factory) -> dict[str, list[str]]:
    if not (WEIGHTS / "config.json").exists():
        pytest.skip("weights/shapes, the bundled model, is not there")
    found = answer(EXERCISES, WEIGHTS, tmp_path_factory.mktemp("classroom"))
    return {exercise.title: printed for exercise, printed in zip(EXERCISES, found, strict=True)}


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.title)
@pytest.mark.slow
def test_the_bundled_model_answers_as_the_page_says(exercise, answers):
    """A student would see another answer than the one that the page explains."""
    assert answers[exercise.title] == [printed for _, printed in exercise.runs]
