"""The three published readings of an answer, and the figures that they make."""

from collections.abc import Sequence

from minillava.pope.files import Question


def llava(text: str, truth: bool) -> list[bool]:
    """By the words of the first sentence (LLaVA's llava/eval/eval_pope.py)."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return [not {"No", "not", "no"} & set(words)]


def vcd(text: str, truth: bool) -> list[bool]:
    """By letters, and by the label (VCD's experiments/eval/eval_pope.py)."""
    text = text.lower()
    return ["yes" in text if truth else "no" not in text]


def ritual(text: str, truth: bool) -> list[bool]:
    """A verdict for each line (RITUAL's eval_bench/pope_eval_llava.py)."""
    lines = [line.replace(".", "").replace(",", "").split(" ") for line in text.strip().split("\n")]
    return [
        not any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words)
        for words in lines
    ]


# From an answer and the truth, True for yes, to verdicts, True for yes.
SCORERS = {"llava": llava, "vcd": vcd, "ritual": ritual}

FIGURES = ("accuracy", "precision", "recall", "F1", "yes-ratio")


def count(scorer: str, pairs: Sequence[tuple[str, bool]]) -> dict[str, int]:
    """pairs: the answers of one category with the truth. TP, FP, TN, FN, and all verdicts and those
    that are yes."""
    verdicts = [verdict for text, truth in pairs for verdict in SCORERS[scorer](text, truth)]
    counts = dict.fromkeys(("TP", "FP", "TN", "FN"), 0)
    # ritual may say more than there are questions
    for said, (_, truth) in zip(verdicts, pairs, strict=False):
        counts[("T" if said == truth else "F") + ("P" if said else "N")] += 1
    return {**counts, "verdicts": len(verdicts), "yes": sum(verdicts)}


def figures(counts: dict[str, int]) -> dict[str, float | None]:
    """The five of POPE, FIGURES, None where there is nothing to divide by."""

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    right, said, true = (
        counts[a] + counts[b] for a, b in (("TP", "TN"), ("TP", "FP"), ("TP", "FN"))
    )
    return {
        "accuracy": ratio(right, sum(counts[name] for name in ("TP", "FP", "TN", "FN"))),
        "precision": ratio(counts["TP"], said),
        "recall": ratio(counts["TP"], true),
        # 2 P R / (P + R), P and R written out
        "F1": ratio(2 * counts["TP"], said + true) if counts["TP"] else None,
        "yes-ratio": ratio(counts["yes"], counts["verdicts"]),
    }


def score(
    scorer: str, questions: dict[int | str, Question], texts: dict[int | str, str]
) -> dict[str, dict]:
    """Per category and "overall": how many answers, counts and figures."""
    by_category = {question.category or "all": [] for question in questions.values()}
    for name, question in questions.items():
        if name in texts:
            by_category[question.category or "all"].append((texts[name], question.truth))
    asked = {category: len(pairs) for category, pairs in by_category.items()}
    counted = {category: count(scorer, pairs) for category, pairs in by_category.items()}
    if len(counted) > 1 or "all" not in counted:
        overall = {
            key: sum(counts[key] for counts in counted.values())
            for key in next(iter(counted.values()))
        }
    else:
        overall, counted = counted["all"], {}  # a file without categories
    counted["overall"], asked["overall"] = overall, len(texts)
    return {
        name: {"answers": asked[name], **counts, **figures(counts)}
        for name, counts in counted.items()
    }


def disagreements(questions: dict[int | str, Question], texts: dict[int | str, str]) -> list[dict]:
    """The answers that the three read differently, each answer by itself; several lines are several
    verdicts."""
    found = []
    for name, question in questions.items():
        if name not in texts:
            continue
        read = {
            scorer: verdicts(texts[name], question.truth) for scorer, verdicts in SCORERS.items()
        }
        if len({tuple(verdicts) for verdicts in read.values()}) > 1:
            said = {
                scorer: " ".join("yes" if v else "no" for v in verdicts)
                for scorer, verdicts in read.items()
            }
            found.append(
                {
                    "question_id": name,
                    "label": "yes" if question.truth else "no",
                    **said,
                    "text": texts[name],
                }
            )
    return found
