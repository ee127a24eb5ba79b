"""The conditions that every test runs under: one thread, no display, a teacher cache of its own."""

import dataclasses
import gc
import signal
import tempfile
from collections.abc import Generator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import settings
from torch import nn
from xdist import is_xdist_controller

from shape_checks import jaxtyped

# A shell without job control starts programs in the background with SIGINT ignored, and so would be
# whatever they start; tests are about what Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' tensors are tiny; with several threads on shared cores they are many times slower.
torch.set_num_threads(1)

# The first call of a compiled or lazily initialised function is no measure of its speed.
settings.register_profile("mtkd_env", deadline=None)
settings.load_profile("mtkd_env")


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before any package of the project is imported.

    A hook rather than a fixture, so that doctests outside this folder have it too.
    """
    cache = tempfile.TemporaryDirectory(prefix="mtkd_cache_")
    config.add_cleanup(cache.cleanup)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.setenv("MTKD_CACHE", cache.name)
    patch.setenv("MPLBACKEND", "Agg")
    # Otherwise every agent of Stable-Baselines3 leaves a folder behind.
    patch.setenv("SB3_LOGDIR", cache.name)
    patch.setattr(jaxtyping, "jaxtyped", jaxtyped)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Takes the shape checks out of the way of `torch.fx`, and leaves pictures undrawn.

    The former folds teachers' batch norms: it traces a network with stand-ins for its tensors; the
    folded network is checked again.
    """
    if is_xdist_controller(session):
        return  # It runs no test, and all its workers wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from mtkd_env.teachers import ensemble
    from sketches import sketched

    fold = ensemble._folded

    def folded(network: nn.Module) -> nn.Module:
        with pytest.MonkeyPatch.context() as during:
            during.setattr(jaxtyping.config, "jaxtyping_disable", True)
            return fold(network)

    patch = pytest.MonkeyPatch()
    session.config.add_cleanup(patch.undo)
    patch.setattr(ensemble, "_folded", folded)
    patch.setattr(FigureCanvasAgg, "print_png", sketched(FigureCanvasAgg.print_png))


def pytest_collection_finish() -> None:
    """Takes what is imported by now out of every later garbage collection.

    Runs collect garbage, automatically too; the modules alone have millions of objects.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Gives everything back to the collector: libraries look for leaks when Python ends."""
    gc.unfreeze()


def _pretends(item: pytest.Item) -> bool | None:
    """Whether a test finds a pretended GPU; None if it needs none or there is a real one."""
    marker = item.get_closest_marker("gpu")
    if marker is None or torch.cuda.is_available():
        return None
    return bool(marker.kwargs.get("pretended", True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what only a real GPU can show where there is none."""
    if _pretends(item) is False:
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Gives a test that needs a GPU a pretended one where there is none."""
    if not _pretends(pyfuncitem):
        return (yield)
    from pretended_gpu import pretended_gpu

    with pretended_gpu():
        return (yield)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration file for a run of a second."""
    from tiny import SMALL_RUN

    path = tmp_path_factory.mktemp("small") / "small.yaml"
    path.write_text(SMALL_RUN, encoding="utf-8")
    return str(path)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures whose pictures would be drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found: list[Any] = []
    monkeypatch.setattr(
        FigureCanvasAgg, "print_png", lambda canvas, *_, **__: found.append(canvas.figure)
    )
    return found


@pytest.fixture
def _pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws pictures: for tests that look at them."""
    from sketches import draw_pictures

    draw_pictures(monkeypatch)


@pytest.fixture
def _unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the shape checks out of the way of `torch.compile`, which cannot trace them.

    jaxtyping's own switch silences a check but leaves its wrapper around the constructors.
    """
    from mtkd_env import types

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for value in vars(types).values():
        if dataclasses.is_dataclass(value) and hasattr(value.__init__, "__wrapped__"):
            monkeypatch.setattr(value, "__init__", value.__init__.__wrapped__)
