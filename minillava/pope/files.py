"""POPE's files of questions and of answers: what is in them, and which answer belongs to which
question."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from minillava.files.text import decode

CATEGORIES = ("random", "popular", "adversarial")
"""How POPE draws what is not there. Its files have this word in their names, and no field for
it."""


@dataclass
class Question:
    """image: its name without folders, None where the file has none. category: None where nothing
    says it."""

    question_id: int | str
    text: str
    truth: bool
    image: str | None
    category: str | None


@dataclass
class Answers:
    """What an answers file holds. The lists are ids, in the order of the file (missing: of the
    questions)."""

    texts: dict = field(default_factory=dict)  # by question id
    # ids, or {"label_id": n} of a question that was not asked
    missing: list = field(default_factory=list)
    duplicate: list = field(default_factory=list)
    unknown: list = field(default_factory=list)
    # ids, or {"line": n} where minillava.batch could not read one
    errors: list = field(default_factory=list)
    # the answer says that it was asked something else
    another_prompt: list = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Each question has one answer, and each answer is to one of the questions."""
        return not (self.missing or self.duplicate or self.unknown or self.another_prompt)


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """(where, object) for each line that is not blank, or for each entry of a JSON array. Raises
    ValueError for what is not a JSON object, and FileNotFoundError with what to do."""
    try:
        content = decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        unfinished = path.with_name(f"{path.name}.partial").exists()
        step = (
            "minillava.batch has not finished it: give its command again"
            if unfinished
            else "check the name"
        )
        raise FileNotFoundError(f"{path}: no such file; {step}") from None
    try:
        array = json.loads(content) if content.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        array = None  # lines that begin with a bracket, or damaged: the lines will tell
    if isinstance(array, list):
        named = [
            (f"{path}, entry {number}", record) for number, record in enumerate(array, start=1)
        ]
    else:
        named = []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.removeprefix("\ufeff"))  # files put behind one another
                named.append((f"{path}, line {number}", record))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error}); expected one object per line"
                ) from None
    for where, record in named:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: found {type(record).__name__}, expected an object")
    return named


def read_questions(
    path: Path, needed: Sequence[str] = ("question_id", "text", "label")
) -> list[Question]:
    """In the order of the file. A file without labels (`needed` leaves them out) has no truth:
    False throughout. Raises ValueError for a line without what is needed."""
    questions = []
    for where, record in read_lines(path):
        for key in needed:
            if key not in record:
                raise ValueError(f"{where}: has no {key}; give the POPE file that has it")
        name, label = record["question_id"], str(record.get("label", "no")).strip().lower()
        if type(name) not in (int, str):  # a bool is an int, and True is 1
            raise ValueError(f"{where}: question_id is {name!r}, expected a number or a text")
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: label is {record['label']!r}, expected yes or no")
        if not isinstance(record["text"], str):
            raise ValueError(f"{where}: text is {record['text']!r}, expected the question")
        questions.append(
            Question(name, record["text"], label == "yes", _picture(record), _category(record))
        )
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def _picture(record: dict) -> str | None:
    image = record.get("image")
    return PureWindowsPath(image).name if isinstance(image, str) else None  # both kinds of slashes


def _category(record: dict) -> str | None:
    return None if record.get("category") is None else str(record["category"])


def same_question(a: str, b: str) -> bool:
    """Whether two texts are one question, of which one may end in an instruction ("Answer with yes
    or no.")."""
    a, b = (text.replace("\r\n", "\n").replace("<image>", "").strip() for text in (a, b))
    short, long = sorted((a, b), key=len)
    rest = long.removeprefix(short)
    if short == long:
        return True
    ended = rest[0] == "\n" or (rest[0].isspace() and short.endswith(("?", ".", "!")))
    return bool(short) and long.startswith(short) and ended


def label_questions(paths: Sequence[Path], asked: Collection[str] = ()) -> list[Question]:
    """The questions of all label files. asked: the categories that were asked. Where a question has
    no category of its own, it is the one word of `asked` or of CATEGORIES in the file's name.
    Raises ValueError if there is none."""
    found = []
    for path in paths:
        words = re.split(r"[^0-9a-z]+", path.stem.lower())
        named = [category for category in {*asked, *CATEGORIES} if category.lower() in words]
        if len(named) != 1:
            named = (
                list(asked)
                if len(asked) == 1
                else [path.stem]
                if len(paths) > 1 and not asked
                else [None]
            )
        for question in read_questions(path):
            if question.category is None:
                (question.category,) = named
            if question.category is None and asked:
                known = ", ".join(sorted(asked))
                step = "put the word into its name"
                raise ValueError(f"{path}: of which category are its labels ({known})? {step}")
            found.append(question)
    return found


def by_id(questions: Sequence[Question]) -> dict[int | str, Question]:
    """Raises ValueError for an id twice."""
    found = {}
    for question in questions:
        name = question.question_id
        if name in found:
            step = "give the file that was asked, with unique ids, as --asked"
            raise ValueError(
                f"question_id {name!r} for the second time among the questions; {step}"
            )
        found[name] = question
    return found


def renumber(
    labels: Sequence[Question], asked: Sequence[Question]
) -> tuple[dict[int | str, Question], list, list]:
    """The questions with labels by the ids under which they were asked, in the order of the labels;
    the ids of labels that nobody asked about; and the ids asked that have no label although their
    category has some. Two are one question if category, picture and text agree; of equal ones the
    first goes with the first."""
    free: dict[tuple, list[Question]] = {}
    categories = {question.category for question in asked}
    for question in by_id(asked).values():
        free.setdefault((question.category, question.image), []).append(question)
    found, left, used = {}, [], set()
    for label in labels:
        key = (None if categories == {None} else label.category, label.image)
        alike = [
            question for question in free.get(key, []) if same_question(question.text, label.text)
        ]
        used.add(key[0])
        if not alike:
            left.append({"label_id": label.question_id})
            continue
        if len(alike) > 1 and key[0] is None:
            ids = ", ".join(repr(question.question_id) for question in alike[:2])
            raise ValueError(
                f"question_id {ids} ask the same, and no category says which has the label"
            )
        free[key].remove(alike[0])
        found[alike[0].question_id] = label
    extra = [
        q.question_id for (category, _), group in free.items() if category in used for q in group
    ]
    return found, left, extra


def read_answers(
    path: Path, questions: dict[int | str, Question], elsewhere: Collection[int | str] = ()
) -> Answers:
    """elsewhere: ids of questions that are known, but have no label here. Raises ValueError for a
    line that is neither an answer nor an error, and for answers whose ids may be another numbering
    than the questions', or several numberings at once."""
    answers, strangers, again, contradicts = Answers(), [], set(), False
    for where, record in read_lines(path):
        name = record.get("question_id")
        if "error" in record:
            answers.errors.append({"line": record.get("line")} if name is None else name)
        elif type(name) not in (int, str) or not isinstance(record.get("text"), str):
            raise ValueError(f"{where}: expected question_id and text, or an error")
        elif name in elsewhere:
            continue
        elif name not in questions:
            answers.unknown.append(name)
            if isinstance(record.get("prompt"), str):
                strangers.append(record["prompt"])
        elif not _answers(record, questions[name]):
            answers.another_prompt.append(name)
        elif name in answers.texts:
            answers.duplicate.append(name)
            if _category(record) is None:
                again.add(name)
                contradicts |= record["text"] != answers.texts[name]
        else:
            answers.texts[name] = record["text"]
    texts = {question.text for question in questions.values()}
    fits = {prompt: any(same_question(prompt, text) for text in texts) for prompt in {*strangers}}
    if alike := sum(fits[prompt] for prompt in strangers):
        raise ValueError(
            f"{path}: {alike} answers have ids that the questions have not, and prompts that they "
            "have "
            f"(question_id {answers.unknown[0]!r}, ...): ids and labels may not belong together; "
            "give the file that was asked as --asked"
        )
    if contradicts and len(again) > max(1, len(questions) / 2):
        raise ValueError(
            f"{path}: {len(again)} of {len(questions)} questions have several answers, which "
            "differ and name no category: they may be those of several files of labels, each "
            "numbered from 1; give the answers to one of them, or put the category into each answer"
        )
    answers.missing = [name for name in questions if name not in answers.texts]
    return answers


def _answers(record: dict, question: Question) -> bool:
    """Whether an answer is to this question, by all that it says about it: prompt, picture and
    category, if any."""
    prompt, image, category = (
        record.get("prompt", question.text),
        _picture(record),
        _category(record),
    )
    return (
        isinstance(prompt, str)
        and same_question(prompt, question.text)
        and (None in (image, question.image) or image == question.image)
        and (None in (category, question.category) or category == question.category)
    )
