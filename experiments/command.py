"""The command `mtkd`, whose verbs are the main programs of this package.

`mtkd run --algo ppo` is `python experiments/run.py --algo ppo`. A program is imported when its verb
is called.
"""

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

COMMAND = "mtkd"
HELP = ("-h", "--help")

# Of every verb the module, whose `main` takes the rest of the command line, and what it does.
VERBS = {
    "run": ("experiments.run", "train a student under a method, or under several side by side"),
    "compare": ("experiments.compare", "compare methods over settings, seeds and pools"),
    "report": ("experiments.report", "write an HTML page about the runs of a folder"),
    "benchmark": ("experiments.benchmark", "measure what methods cost and rewards are worth"),
    "train-teachers": ("experiments.train_teachers", "train the teachers of a pool and keep them"),
    "train-agent": ("experiments.train_agent", "let an agent learn over many tasks"),
    "predict": ("experiments.predict", "let a run's student classify images"),
    "export": ("experiments.export", "export a run's student, whole or its backbone"),
    "gpu-check": ("experiments.gpu_check", "check and measure everything on one GPU"),
    "transfer detection": (
        "experiments.transfer.detection",
        "train a detector that begins with a backbone",
    ),
    "transfer segmentation": (
        "experiments.transfer.segmentation",
        "train a segmenter that begins with a backbone",
    ),
}

# First words of verbs of two words.
GROUPS = {verb.partition(" ")[0] for verb in VERBS if " " in verb}

# The verbs by the files that are the same programs, and how texts name those files.
FILES = {f"{module.rpartition('.')[2]}.py": verb for verb, (module, _) in VERBS.items()}
NAMED = re.compile(
    rf"(?:python experiments/(?:transfer/)?|(?<![\w/.]))({'|'.join(map(re.escape, FILES))})\b"
)


def as_called(text: str) -> str:
    """A text that names programs by their files, as somebody who called the command knows them.

    `run.py --resume F` and `python experiments/run.py --resume F` become `mtkd run --resume F`.
    """
    if Path(sys.argv[0]).stem != COMMAND:
        return text
    return NAMED.sub(lambda named: f"{COMMAND} {FILES[named[1]]}", text)


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
        code: int = import_module(VERBS[verb][0]).main(others)
        return code
    if not verb or verb in GROUPS or argv[words - 1] in HELP:
        sys.stdout.write(usage(argv[0] if words == 2 else ""))
        return 0
    # Only after a mistake is there a wait for what the programs share.
    from experiments.running.failures import run_program

    return run_program(_refuse, [verb])


def _refuse(verbs: Sequence[str]) -> NoReturn:
    from mtkd_env.errors import ConfigError, did_you_mean

    nearest = did_you_mean(verbs[0], VERBS)
    raise ConfigError(f"unknown verb '{verbs[0]}'{nearest} ({COMMAND} --help lists all)")


if __name__ == "__main__":
    sys.exit(main())
