"""The doors, which are minillava's commands, and how a door begins; `python -m minillava` lists
them.

Flags are read before torch is imported, which takes a second or more. So --help and a wrong flag
answer at once, and Ctrl-C prints no traceback from the import of another package. For this reason
this file imports next to nothing.
"""

import _signal as signal  # `signal` wraps it in enumerations, which take time to import
import os
import sys
from types import ModuleType

# In the order in which people need them: what the door is for, and the function that it calls, with
# its file.
DOORS = {
    "generate": ("answer a question about a picture", "generate.answer", "answer"),
    "chat": ("talk about pictures, question after question", "chat.session", "run"),
    "batch": (
        "answer a file of questions, and go on after an interruption",
        "batch.run",
        "ask_file",
    ),
    "look": ("show what each word of an answer looked at", "look.run", "run"),
    "probe": ("measure why it answered, by changing something", "probe.run", "run"),
    "trace": (
        "print every tensor on the way to an answer, or compare two runs",
        "tracing.run",
        "run",
    ),
    "inspect": (
        "say what a folder of weights holds, and whether it is well",
        "inspection.run",
        "run",
    ),
    "serve": ("answer OpenAI's clients over HTTP", "serve.run", "run"),
    "convert": ("write weights in another layout, or in 8 or 4 bits", "convert.run", "run"),
    "finetune": (
        "learn from rows of pictures and conversations: LoRA, projector or all",
        "finetune.run",
        "run",
    ),
    "pope": ("score answers to POPE in the three ways that papers do", "pope.run", "run"),
}

# the doors whose answer goes to stdout, which must be open
PRINTING = {"generate", "chat", "look", "probe", "trace", "inspect", "serve", "pope"}


def flags_of(name: str) -> ModuleType:
    """The file in a door's folder with `make_parser(prog)` and `read_flags(parser, argv)`, which
    returns the arguments of the door's function. Wrong usage ends the process with status 2."""
    folder = DOORS[name][1].partition(".")[0]
    return __import__(f"minillava.{folder}.flags", fromlist=["flags"])


def enter(name: str, argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run a door with these flags (by default the process's own); returns the exit status."""
    from minillava.cli.messages import run

    given = sys.argv[1:] if argv is None else list(argv)
    _, file, function = DOORS[name]
    try:
        flags = flags_of(name)
        parser = flags.make_parser(*[prog] if prog else [])
        asked = flags.read_flags(parser, given)
    except Exception as error:  # what the system says about a file that a flag names
        failed = error  # Python forgets `error` at the end of this block

        def fail() -> int:
            raise failed

        return run(fail, not {"-v", "--verbose"}.isdisjoint(given))

    def body() -> int:
        if "TORCHELASTIC_RUN_ID" in os.environ and name != "finetune":
            from minillava.cli.parts import one_of_several

            status = one_of_several(name, asked[0])
            if status is not None:
                return status
        module = __import__(f"minillava.{file}", fromlist=[function])
        came = []

        def interrupt(*_):
            came.append(True)
            raise KeyboardInterrupt

        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, interrupt)
        try:
            return vars(module)[function](*asked)
        except Exception:
            # torch has turned the interrupt into an error of its own, as it does with one that
            # comes while it reads a shape
            if came:
                raise KeyboardInterrupt from None
            raise

    return run(body, asked[0].verbose, prints=name in PRINTING)


def begin(name: str, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run a door as the whole process; this function ends the process and does not return."""
    leave_on_ctrl_c()
    if name != "finetune" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
        # of several processes, one talks (cli/parts.py)
        sys.stdin = sys.stdout = sys.stderr = open(  # noqa: SIM115
            os.devnull, "r+", encoding="utf-8"
        )
    ours = signal.getsignal(signal.SIGINT) is _leave
    try:
        status = enter(name, argv, prog)
        if ours:
            # the work is done, and Python takes a moment to end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # the interrupt came between the lines above
        status = 130
    if status == 130:
        # If the interrupt came inside exec() (torch and dataclasses generate code), Python
        # remembers it, though it was caught, and would end the process by the signal instead of
        # with our status.
        from contextlib import suppress

        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        _leave()
    sys.exit(status)


def leave_on_ctrl_c() -> None:
    """From now on Ctrl-C ends the process, which has not begun anything, with status 130; unless
    the process was started with Ctrl-C ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_) -> None:
    """Handle Ctrl-C before anything has begun: end at once, since an exception in an import can end
    up anywhere."""
    os._exit(130)


def listing(prog: str) -> str:
    width = max(map(len, DOORS))
    lines = [f"  {name.ljust(width)}  {line}" for name, (line, *_) in DOORS.items()]
    return "\n".join(
        [
            f"usage: {prog} DOOR ...",
            "",
            "LLaVA-1.5 in pure PyTorch: a model that answers questions about pictures. The doors:",
            "",
            *lines,
            "",
            f"{prog} DOOR --help lists what a door takes; {prog} --version says which minillava "
            "this is.",
            f"To begin with: {prog} generate --image x.jpg",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """`python -m minillava` and the command `minillava`: run a door by its name, or print the list
    of doors."""
    given = sys.argv[1:] if argv is None else list(argv)
    prog = (
        "minillava"
        if os.path.basename(sys.argv[0]).startswith("minillava")
        else "python -m minillava"
    )
    first = given[0] if given else "--help"
    if first in DOORS:
        begin(first, given[1:], f"{prog} {first}")
    from minillava import __version__
    from minillava.cli.messages import run, show

    if first in ("-h", "--help", "help"):
        sys.exit(show(f"{listing(prog)}\n"))
    elif first == "--version":
        sys.exit(show(f"minillava {__version__}\n"))
    else:
        from difflib import get_close_matches

        near = get_close_matches(first, DOORS, 1)
        found = (
            f"{first} stands where the name of a door should"
            if first.startswith("-")
            else f"no door {first!r}"
        )
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(DOORS)}"

        def refuse() -> int:
            print(f"error: {found}; {hint} (see {prog} --help)", file=sys.stderr)
            return 2

        sys.exit(run(refuse, verbose=False))


if __name__ == "__main__":
    main()
