"""What an SGD step costs under every classical weighting, relative to equal weights."""

import inspect
from collections.abc import Callable, Sequence
from math import lcm

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.floor import ABOUT_FLOOR, FLOOR, floor
from experiments.benchmarks.shared import check_shareable, make_env
from experiments.benchmarks.timing import Readings, stopwatch_for, take_turns, timed
from experiments.benchmarks.timing_report import REFERENCE, TimingReport
from experiments.config import CONFIGS, ExperimentConfig, algo_layers
from mtkd_env import Assembly
from mtkd_env.errors import ConfigError
from mtkd_env.weighting import WEIGHTINGS

# Rounds that are not counted: buffers fill, kernels are chosen, memory is taken.
WARMUP_ROUNDS = 2

# The argument by which a weighting says how often it does work that it does not do at every step.
PERIOD = "meta_every"


def classical_methods() -> list[str]:
    """Every weighting, and every shipped method that is one, at the scale that all share."""
    shipped = {path.stem for path in CONFIGS.glob("algo/*.yaml")}
    known = {name for name in shipped if _agent_of(name) in WEIGHTINGS} | set(WEIGHTINGS)
    others = {name for name in known if not name.endswith("_official")} - {REFERENCE}
    return [REFERENCE, *sorted(others)]


def _agent_of(algo: str) -> str:
    named = [layer.values.get("agent", {}).get("name") for layer in algo_layers(algo)]
    return next((str(name) for name in named if name), algo)


def measure(request: Request) -> Outcome:
    """Times a step of every weighting, all with one ensemble of teachers.

    A step is state, weights, update and `after_update`, and the reward that every step computes.
    Nothing is evaluated.

    Raises:
        ConfigError: A method that is no weighting, or rounds that cut a method's period.
    """
    methods = with_reference(request.methods or classical_methods())
    configs = request.configs(methods)
    for name, config in configs.items():
        if config.agent_name not in WEIGHTINGS:
            raise ConfigError(f"--methods: '{name}' is no classical weighting; see --what agents")
    check_period(configs, request.steps)
    check_shareable(configs)
    readings, assembly = _measure(request, configs)
    return TimingReport(
        title=f"Cost of an SGD step, as a ratio to {REFERENCE}",
        readings=readings,
        units=request.steps,
        unit="step",
        assembly=assembly,
        config=configs[REFERENCE],
        notes=(
            "step: state, weights, update, reward and after_update; nothing is evaluated",
            ABOUT_FLOOR,
        ),
    ).outcome()


def with_reference(methods: Sequence[str]) -> list[str]:
    """The methods, behind the one that they are compared with."""
    return list(dict.fromkeys([REFERENCE, *methods]))


def check_period(configs: dict[str, ExperimentConfig], steps: int) -> None:
    """Checks that a round holds whole periods, so that all rounds hold the same work.

    Raises:
        ConfigError: It does not.
    """
    periods = {name: _period(config) for name, config in configs.items()}
    period = lcm(*periods.values())
    if steps % period:
        periodic = ", ".join(name for name, every in periods.items() if every > 1)
        raise ConfigError(
            f"--steps: expected a multiple of {period}, because {periodic} does not do the same "
            f"at every step, got {steps}"
        )


def _period(config: ExperimentConfig) -> int:
    parameters = inspect.signature(WEIGHTINGS[config.agent_name]).parameters
    default = parameters[PERIOD].default if PERIOD in parameters else 1
    return int(config.agent.arguments.get(PERIOD, default))


def _measure(request: Request, configs: dict[str, ExperimentConfig]) -> tuple[Readings, Assembly]:
    assembly = request.build(configs[REFERENCE])
    works = {name: steps_of(assembly, config, request.steps) for name, config in configs.items()}
    works[FLOOR] = floor(assembly, configs[REFERENCE], request.steps)
    subjects = {name: timed(work) for name, work in works.items()}
    watch = stopwatch_for(assembly.env.device)
    take_turns(subjects, watch, request.count(range(WARMUP_ROUNDS), "warm-up rounds"))
    rounds = request.count(range(request.rounds), "rounds")
    return take_turns(subjects, watch, rounds), assembly


def steps_of(assembly: Assembly, config: ExperimentConfig, steps: int) -> Callable[[], None]:
    """So many SGD steps of a student of its own under a weighting."""
    env = make_env(assembly, config)
    arguments = config.agent.arguments
    weighting = WEIGHTINGS[config.agent_name](env.distiller, seed=config.seed, **arguments)

    def work() -> None:
        for _ in range(steps):
            state = env.state
            env.distill(weighting(state))
            weighting.after_update(state)

    return work
