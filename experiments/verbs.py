"""The verbs of the command `mtkd`."""

COMMAND = "mtkd"

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
