"""An agent's training over many tasks: a student each, and a look at held-out tasks every pass."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import gymnasium
import stable_baselines3
import torch

from agents import AGENTS, Agent, SB3Agent, build_agent, check_agent
from agents.base import warm_up_weights
from agents.policy_gradient import LearningAgent
from experiments.config import PLACE, RunConfig
from experiments.running.finite import HINT, FiniteWatch
from experiments.running.kept import KeptRun
from experiments.running.log import ROWS
from experiments.running.result import RunResult, versions
from mtkd_env import TaskList, TasksVectorEnv
from mtkd_env.computing import Computing
from mtkd_env.data import DataSpec
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_at_least_1
from mtkd_env.files import name_in_path, whole_path
from mtkd_env.keeping import AtRest, check_module
from mtkd_env.options import build
from mtkd_env.seeding import derive_seed
from mtkd_env.teachers import preparation
from mtkd_env.types import TeacherWeights

METRIC = "gain over equal weights on held-out tasks"

# What a row's names of held-out tasks begin with.
GAIN, ALL = "gain/", "gain"


@dataclass(frozen=True)
class AgentRunConfig(RunConfig, Computing):
    """An agent that learns over many tasks.

    Attributes:
        tasks: YAML file of the tasks.
        algo: Name of the agent or algorithm; selects configs/agent/<algo>.yaml.
        arguments: Its keyword arguments.
        passes: How often it goes through the list of tasks, a new student each time.
        threads: CPU threads; one by default, since networks for many tasks are small.
        checkpoint: When the run keeps what it can go on from; its epochs are students.

    Raises:
        ConfigError: A value that cannot be used.
    """

    tasks: str = ""
    algo: str = "pg"
    arguments: dict[str, Any] = field(default_factory=dict)
    passes: int = 2
    threads: int = 1
    output: str = "runs/agents"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ConfigError("tasks: expected a YAML file of tasks")
        check_at_least_1(passes=self.passes)
        object.__setattr__(self, "tasks", whole_path(self.tasks))

    def check_agent(self) -> None:
        """Checks the agent before anything is loaded.

        Raises:
            ConfigError: An unknown agent, or an argument that it does not take.
        """
        check_agent(self.algo, self.arguments)

    @property
    def computing(self) -> dict[str, Any]:
        """Where and in what all is computed."""
        return {name: getattr(self, name) for name in Computing.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True)
class AgentResult(RunResult):
    """What an agent's training came to; its metric is the mean gain over the held-out tasks.

    Attributes:
        algo: Name of the agent or algorithm.
        tasks: The file of the tasks.
        steps: SGD steps of all students.
        updates: Updates of the policy.
        equal: Accuracy of a student under equal weights, by held-out task.
        gains: By how much that of a student under the frozen agent is higher.
    """

    algo: str
    tasks: str
    steps: int
    updates: int
    equal: dict[str, float]
    gains: dict[str, float]


class Progress(preparation.Progress, Protocol):
    """What the training of an agent tells while it goes on."""

    def student(self, rows: Sequence[Mapping[str, Any]], students: int) -> None:
        """A student is finished; the last of the rows is its."""


class HeldOut:
    """Students of the held-out tasks, the same at every look, under weights that do not learn.

    Args:
        tasks: The tasks.
        seed: Seed of what is drawn of them.
        progress: What is told of their teachers.
    """

    def __init__(self, tasks: TaskList, seed: int, progress: Progress) -> None:
        self._count = len(tasks.held_out)
        self._seed = derive_seed(seed, "held out") % 2**31
        self._source = TasksVectorEnv(tasks, held_out=True, progress=progress)

    def accuracies(self, act: Callable[[TasksVectorEnv], TeacherWeights]) -> dict[str, float]:
        """Test accuracy of a student of every task under weights that are chosen for each batch."""
        found: dict[str, float] = {}
        source = self._source
        source.reset(seed=self._seed)
        for number in range(self._count):
            if number:
                source.reinit()
            for _ in range(source.env.steps_in_training):
                source.env.distill(act(source))
            found[source.task.name] = source.env.evaluate().accuracy
        return found


def equal_weights(source: TasksVectorEnv) -> TeacherWeights:
    """1/M for every teacher."""
    return warm_up_weights(source.env, "uniform")


def weights_of(agent: Agent, source: TasksVectorEnv) -> TeacherWeights:
    """What an agent does without exploration, learning nothing."""
    env = source.env
    if isinstance(agent, SB3Agent):
        return env.to_weights(source.narrowed(agent.act(source.observation)))
    return env.to_weights(agent.act(env.observation))


class AgentRun(KeptRun[AgentRunConfig, AgentResult]):
    """The training of an agent over many tasks.

    Args:
        config: The run.
        progress: What it tells while it goes on.
    """

    program = "mtkd train-agent"
    result_type = AgentResult
    lines = (ROWS,)
    clock = "student"
    written = ("agent.safetensors", "agent.json", "agent.zip")
    place = PLACE

    def __init__(self, config: AgentRunConfig, progress: Progress) -> None:
        super().__init__(config)
        self._progress = progress

    def prepare(self) -> dict[str, Any]:
        """Reads the tasks and makes the first one and the agent."""
        config = self.config
        torch.set_num_threads(config.threads)
        self._tasks = TaskList(config.tasks, computing=config.computing)
        self._source = TasksVectorEnv(self._tasks, progress=self._progress)
        self._held_out = HeldOut(self._tasks, config.seed, self._progress)
        torch.manual_seed(derive_seed(config.seed, "modules"))
        self._source.reset(seed=config.seed)
        inside = config.algo in AGENTS
        # An algorithm asks nothing of an environment that many tasks do not have.
        env = self._source.env if inside else cast(MTKDVectorEnv, self._source)
        self._agent = build_agent(config.algo, env, seed=config.seed, arguments=config.arguments)
        return {"device": self._source.device.type, "tasks": self._tasks.digest}

    def begin(self) -> None:
        """The agent's training, at its beginning."""
        self._before = 0
        self._started = time.perf_counter()
        # Accuracies of the held-out tasks under equal weights.
        self._equal: dict[str, float] = {}
        self._watch = FiniteWatch()
        self._source.subscribe(self._watch)

    @property
    def steps(self) -> int:
        """SGD steps of all students so far."""
        return self._before + self._source.steps

    @property
    def epochs(self) -> int:
        """Students that are finished."""
        return len(self.log.rows)

    def train(self, at_rest: AtRest) -> None:
        """Trains to the end.

        Raises:
            FloatingPointError: Something became NaN or infinite.
        """
        self._agent.log_to(self.log.folder / "tensorboard" / "agent")
        while self.epochs < self._students:
            if self._source.finished:
                self._next()
            env = self._source.env
            done = env.steps // env.steps_per_epoch
            self._agent.learn(env.distiller.recipe.epochs - done, self.check_finite, at_rest)
            self._end_student()

    @property
    def _students(self) -> int:
        """Students in all."""
        return self.config.passes * len(self._tasks.training)

    def _next(self) -> None:
        self._before = self.steps
        self._source.reinit()
        if isinstance(self._agent, LearningAgent):
            self._agent.enter(self._source.env)

    def _end_student(self) -> None:
        row: dict[str, Any] = {
            "student": self.epochs + 1,
            "task": self._source.task.name,
            "teachers": len(self._source.env.teacher_names),
            "test/accuracy": self._source.env.evaluate().accuracy,
            "steps": self.steps,
            "agent/updates": self._agent.updates,
        }
        if row["student"] % len(self._tasks.training) == 0:
            row |= self._look()
        row["seconds"] = time.perf_counter() - self._started
        self._started = time.perf_counter()
        self.log.write(row)
        self._progress.student(self.log.rows, self._students)

    def _look(self) -> dict[str, float]:
        """Gains of the held-out tasks, and their mean."""
        self._equal = self._equal or self._held_out.accuracies(equal_weights)
        found = self._held_out.accuracies(partial(weights_of, self._agent))
        gains = {f"{GAIN}{name}": found[name] - self._equal[name] for name in found}
        return gains | {ALL: sum(gains.values()) / len(gains)}

    def check_finite(self) -> None:
        """Checks all steps since the last check, and the student as it is.

        Raises:
            FloatingPointError: Something is NaN or infinite.
        """
        self._watch.check()
        check_module(self._source.env.distiller.module, self.steps, HINT)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""
        return {
            "source": self._source.state_dict(),
            "agent": self._agent.state_dict(),
            "before": self._before,
            "seconds": time.perf_counter() - self._started,
            "equal": self._equal,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the log has been cut to it before."""
        self._source.load_state_dict(state["source"])
        if isinstance(self._agent, LearningAgent):
            self._agent.enter(self._source.env)
        self._agent.load_state_dict(state["agent"])
        self._before = state["before"]
        self._started = time.perf_counter() - state["seconds"]
        self._equal = dict(state["equal"])

    def write(self, folder: Path) -> None:
        """Writes the agent, with what it was trained on and what it came to."""
        config, tasks = self.config, self._tasks
        name = Path(config.tasks).name
        notes = {
            "command": f"mtkd train-agent --tasks {name} --algo {config.algo} "
            f"--passes {config.passes} --seed {config.seed}",
            "arguments": config.arguments,
            "tasks": [family.name for family in tasks.training],
            "data": sorted(
                {build(DataSpec, one.arguments["data"]).dataset for one in tasks.training}
            ),
            "students": self.epochs,
            "updates": self._agent.updates,
            "gain over equal weights on held-out tasks": self._gains,
        }
        self._agent.save(folder, notes)

    @property
    def _gains(self) -> dict[str, float]:
        """By how much the held-out tasks are ahead under the agent, at the last look."""
        last = next(row for row in reversed(self.log.rows) if ALL in row)
        return {n.removeprefix(GAIN): v for n, v in last.items() if n.startswith(GAIN)}

    def result(self) -> AgentResult:
        """What the run came to."""
        looked = [row for row in self.log.rows if ALL in row]
        last, best = looked[-1], max(looked, key=lambda row: float(row[ALL]))
        return AgentResult(
            method=self.config.algo,
            setting=Path(self.config.tasks).stem,
            seed=self.config.seed,
            metric=METRIC,
            last=last[ALL],
            best=best[ALL],
            best_epoch=best["student"],
            epochs=len(self.log.rows),
            seconds=round(self.log.seconds, 2),
            folder=str(self.log.folder),
            versions=versions(gymnasium, stable_baselines3),
            algo=self.config.algo,
            tasks=self.config.tasks,
            steps=self.steps,
            updates=self._agent.updates,
            equal=self._equal,
            gains=self._gains,
        )


def run_folder(config: AgentRunConfig) -> Path:
    """The folder of a run: `output/tasks_algo_seedS`, so that comparisons find its agent."""
    names = name_in_path(Path(config.tasks).stem), name_in_path(config.algo)
    return Path(config.output) / f"{'_'.join(names)}_seed{config.seed}"
