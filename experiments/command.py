"""The command `mtkd`, whose verbs are the main programs of this package.

`mtkd run --algo ppo` is `python experiments/run.py --algo ppo`. A program is imported when its verb
is called.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from experiments.verbs import COMMAND, GROUPS, VERBS

HELP = ("-h", "--help")


def usage(group: str = "") -> str:
    """The verbs with a line each; those that begin with the word `group`, if one is given."""
    shown = {verb: about for verb, (_, about) in VERBS.items() if verb.startswith(group)}
    width = max(map(len, shown))
    verbs = "".join(f"  {verb:{width}}  {about}\n" for verb, about in shown.items())
    form = f"{group} ..." if group else "VERB ..."
    return f"usage: {COMMAND} {form}\n\n{verbs}\n{COMMAND} VERB --help lists a verb's flags.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program of a verb; gives its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    words = 2 if argv and argv[0] in GROUPS else 1
    verb, others = " ".join(argv[:words]), argv[words:]
    if verb in VERBS:
        with _quiet_end():
            program = import_module(VERBS[verb][0])
        code: int = program.main(others)
        return code
    if not verb or verb in GROUPS or argv[words - 1] in HELP:
        sys.stdout.write(usage(argv[0] if words == 2 else ""))
        return 0
    # Only after a mistake is there a wait for what the programs share.
    from experiments.running.failures import run_program

    return run_program(_refuse, [verb])


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Lets Ctrl-C end the process without a word, as long as there is nothing to say.

    Importing takes seconds, and what is interrupted there may fail in its own ways.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # Somebody else decides what Ctrl-C does.
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _refuse(verbs: Sequence[str]) -> NoReturn:
    from mtkd_env.errors import ConfigError, did_you_mean

    nearest = did_you_mean(verbs[0], VERBS)
    raise ConfigError(f"unknown verb '{verbs[0]}'{nearest} ({COMMAND} --help lists all)")


if __name__ == "__main__":
    sys.exit(main())
