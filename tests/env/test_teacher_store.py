"""Facts of teacher outputs that are kept: they are what the teachers say, and asked for once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fake_datasets import write_images
from mtkd_env.data import BatchStream, Mixing
from mtkd_env.data.views import FRESH, MemoryViews, ViewSet
from mtkd_env.errors import ConfigError
from mtkd_env.networks import build_network
from mtkd_env.teachers import StoreSpec, TeacherEnsemble
from mtkd_env.teachers.store import (
    RowLayout,
    StoredTeachers,
    check_store,
    store_folder,
)
from mtkd_env.types import Batch, TeacherOutputs
from tiny import (
    CLASSES,
    NUM_ENVS,
    TEACHERS,
    load_dataset,
    make_tiny_distiller,
    make_tiny_env,
    teachers,
    training_set,
)

IMAGES = 19
STEPS = IMAGES // NUM_ENVS
EXACT = StoreSpec(place="host", dtype="float32")
TWO = ViewSet(2)

places = pytest.mark.parametrize("place", ["host", "device", "disk"])
view_sets = pytest.mark.parametrize("view_set", [FRESH, TWO])


def make_stream(view_set: ViewSet = FRESH, seed: int = 0) -> BatchStream:
    device = torch.device("cpu")
    return training_set(IMAGES).stream(NUM_ENVS, device, seed, view_set=view_set)


def make_store(
    folder: Path,
    view_set: ViewSet = FRESH,
    ensemble: TeacherEnsemble | None = None,
    **changes: Any,
) -> StoredTeachers:
    spec = replace(EXACT, **changes)
    views = make_stream(view_set).views
    on_disk = folder if spec.place == "disk" else None
    return StoredTeachers(ensemble or teachers(), views, spec, batch_size=NUM_ENVS, folder=on_disk)


def stored_stream(store: StoredTeachers, view_set: ViewSet = FRESH, seed: int = 0) -> BatchStream:
    stream = make_stream(view_set, seed)
    stream.teaching = store
    return stream


def tensors(outputs: TeacherOutputs) -> Iterator[Tensor]:
    yield outputs.logits
    yield from outputs.features
    yield from outputs.feature_maps


def assert_close(found: TeacherOutputs, expected: TeacherOutputs, **tolerance: float) -> None:
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def assert_equal(found: TeacherOutputs, expected: TeacherOutputs) -> None:
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert one.equal(other)


def outputs_of(batch: Batch) -> TeacherOutputs:
    assert batch.teachers is not None
    return batch.teachers


def epoch(stream: BatchStream) -> list[Batch]:
    return [next(stream) for _ in range(stream.steps_per_epoch)]


def test_a_row_holds_all_that_the_teachers_say() -> None:
    outputs = teachers()(next(make_stream()).inputs)
    layout = RowLayout(outputs)
    rows = layout.pack(outputs)
    assert rows.shape == (NUM_ENVS, sum(tensor[0].numel() for tensor in features_and_maps(outputs)))
    assert_equal(layout.unpack(rows), outputs)


def features_and_maps(outputs: TeacherOutputs) -> list[Tensor]:
    return [outputs.logits.transpose(0, 1), *outputs.features, *outputs.feature_maps]


@places
@view_sets
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_and_features_of_earlier_batches_are_recalled_by_their_keys(
    dtype: str, place: str, view_set: ViewSet, tmp_path: Path
) -> None:
    store = make_store(tmp_path, view_set, place=place, dtype=dtype)
    stream = stored_stream(store, view_set)
    stored = stream.teaching
    assert isinstance(stored, StoredTeachers)
    batches = [next(stream) for _ in range(2 * STEPS + 1)]
    computed = store.computed
    for batch in batches:
        assert batch.keys is not None
        assert (batch.keys % IMAGES).equal(batch.index)
        found, expected = stored.recall(batch.keys), outputs_of(batch)
        assert found.feature_maps == ()
        assert_equal(found, replace(expected, feature_maps=()))
    assert store.computed == computed


def test_what_another_store_had_is_computed_when_it_is_recalled(tmp_path: Path) -> None:
    batch = next(stored_stream(make_store(tmp_path, TWO), TWO))
    empty = make_store(tmp_path, TWO)
    assert batch.keys is not None
    found = empty.recall(batch.keys)
    assert_equal(found, replace(outputs_of(batch), feature_maps=()))
    assert empty.computed >= NUM_ENVS


@places
@view_sets
def test_batches_bring_what_the_teachers_say_of_them(
    place: str, view_set: ViewSet, tmp_path: Path
) -> None:
    stream = stored_stream(make_store(tmp_path, view_set, place=place), view_set)
    for _ in range(3 * STEPS):
        batch = next(stream)
        assert_close(outputs_of(batch), teachers()(batch.inputs))


@view_sets
def test_half_the_bytes_cost_three_digits(view_set: ViewSet, tmp_path: Path) -> None:
    stream = stored_stream(make_store(tmp_path, view_set, dtype="float16"), view_set)
    for _ in range(STEPS):
        batch = next(stream)
        assert_close(outputs_of(batch), teachers()(batch.inputs), rtol=1e-3, atol=1e-5)


@places
def test_what_is_known_is_rounded_like_what_is_new(place: str, tmp_path: Path) -> None:
    stream = stored_stream(make_store(tmp_path, TWO, place=place, dtype="float16"), TWO)
    seen: dict[tuple[int, int], Tensor] = {}
    for number in range(4):
        for batch in epoch(stream):
            for index, row in zip(batch.index.tolist(), outputs_of(batch).features[0], strict=True):
                key = index, number % 2
                assert seen.setdefault(key, row.clone()).equal(row)


def test_a_store_does_not_change_which_images_and_views_come(tmp_path: Path) -> None:
    stored, plain = stored_stream(make_store(tmp_path)), make_stream()
    for _ in range(2 * STEPS + 1):
        one, other = next(stored), next(plain)
        assert one.inputs.equal(other.inputs)
        assert one.index.equal(other.index)
    assert str(stored.state_dict()) == str(plain.state_dict())


class Counting(TeacherEnsemble):
    """Counts the images that it is asked about."""

    asked = 0

    def forward(self, inputs: Tensor) -> TeacherOutputs:
        self.asked += len(inputs)
        return super().forward(inputs)


def counting() -> Counting:
    ensemble = teachers()
    copy = Counting.__new__(Counting)
    copy.__dict__ = dict(ensemble.__dict__)
    return copy


@places
def test_teachers_are_asked_once_for_every_view(place: str, tmp_path: Path) -> None:
    ensemble = counting()
    store = make_store(tmp_path, TWO, ensemble, place=place)
    stream = stored_stream(store, TWO)
    for _ in range(2):
        epoch(stream)
    before = ensemble.asked
    for _ in range(3):
        epoch(stream)
    assert ensemble.asked == before > 0
    assert store.computed == 2 * IMAGES


def test_views_that_happen_to_come_again_are_not_computed_again(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    stream = stored_stream(store)
    assert isinstance(stream.views, MemoryViews)
    for _ in range(60):
        epoch(stream)
    assert store.computed <= IMAGES * stream.views.count
    assert store.computed > IMAGES * (stream.views.count - 1)


def test_of_few_views_a_row_does_not_depend_on_what_else_is_missing(tmp_path: Path) -> None:
    together, alone = make_store(tmp_path, TWO), make_store(tmp_path, TWO)
    views = make_stream(TWO).views
    keys = together.keys(
        torch.arange(IMAGES), views.draw(torch.arange(IMAGES), torch.Generator(), 0)
    )
    together.fill(keys)
    for key in reversed(keys.split(1)):
        alone.fill(key)
    assert_equal(together.take(keys), alone.take(keys))


def test_runs_share_what_is_on_disk(tmp_path: Path) -> None:
    first, second = (make_store(tmp_path, TWO, place="disk") for _ in range(2))
    stream = stored_stream(first, TWO)
    epoch(stream)
    epoch(stream)
    other = stored_stream(second, TWO, seed=1)
    for _ in range(2 * STEPS):
        batch = next(other)
        assert_close(outputs_of(batch), teachers()(batch.inputs))
    assert second.computed == 0


@pytest.mark.parametrize(("first", "then", "missing"), [(1, 3, 2), (3, 1, 0)])
def test_stores_of_more_and_of_fewer_views_share_those_that_both_have(
    first: int, then: int, missing: int, tmp_path: Path
) -> None:
    stores = []
    for count in (first, then):
        stores.append(make_store(tmp_path, ViewSet(count), place="disk"))
        stream = stored_stream(stores[-1], ViewSet(count))
        for _ in range(count * STEPS):
            batch = next(stream)
            assert_close(outputs_of(batch), teachers()(batch.inputs))
    assert [store.computed for store in stores] == [first * IMAGES, missing * IMAGES]


def test_two_at_once_do_no_harm(tmp_path: Path) -> None:
    both = [stored_stream(make_store(tmp_path, TWO, place="disk"), TWO, seed) for seed in (0, 1)]
    for _ in range(4 * STEPS):
        for stream in both:
            batch = next(stream)
            assert_close(outputs_of(batch), teachers()(batch.inputs))
    third = make_store(tmp_path, TWO, place="disk")
    epoch(stored_stream(third, TWO))
    assert third.computed == 0


def test_nothing_but_whole_files_is_left(tmp_path: Path) -> None:
    stream = stored_stream(make_store(tmp_path, TWO, place="disk"), TWO)
    epoch(stream)
    assert len(list(tmp_path.iterdir())) == 1
    epoch(stream)
    epoch(stream)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 2
    assert all(name.startswith("rows-") and name.endswith(".pt") for name in names)


@pytest.mark.parametrize("cut", ["byte", "half"])
def test_a_damaged_file_is_told_and_computed_again(cut: str, tmp_path: Path) -> None:
    epoch(stored_stream(make_store(tmp_path, TWO, place="disk"), TWO))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if cut == "byte" else content[: len(content) // 2])
    again = make_store(tmp_path, TWO, place="disk")
    stream = stored_stream(again, TWO)
    with pytest.warns(UserWarning, match="rows-.*is damaged"):
        batch = next(stream)
    assert_close(outputs_of(batch), teachers()(batch.inputs))
    for _ in range(STEPS - 1):
        next(stream)
    assert again.computed == IMAGES


def test_long_epochs_are_published_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtkd_env.teachers.store.MOST_PENDING", 1)
    store = make_store(tmp_path, place="disk")
    stream = stored_stream(store)
    for _ in range(3 * STEPS):
        batch = next(stream)
        assert_close(outputs_of(batch), teachers()(batch.inputs))
    assert len(list(tmp_path.iterdir())) > 3


def test_a_store_that_could_outgrow_its_limit_is_refused(tmp_path: Path) -> None:
    size = make_store(tmp_path, TWO).nbytes
    assert make_store(tmp_path, TWO, max_bytes=size).nbytes == size
    with pytest.raises(ConfigError, match=f"max_bytes: .*{size:,}.* {size - 1:,} .*views 1 would"):
        make_store(tmp_path, TWO, max_bytes=size - 1)
    with pytest.raises(ConfigError, match=r"may take$"):
        make_store(tmp_path, max_bytes=1)


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("mtkd_env.teachers.store.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="has room for 10"):
        make_store(tmp_path, TWO, place="disk")


def test_outputs_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    class Loud(Counting):
        def forward(self, inputs: Tensor) -> TeacherOutputs:
            outputs = super().forward(inputs)
            return replace(outputs, logits=outputs.logits + 1e6)

    ensemble = counting()
    ensemble.__class__ = Loud
    store = make_store(tmp_path, TWO, ensemble, dtype="float16")
    with pytest.raises(ConfigError, match=r"store.dtype: .*float32"):
        store.fill(torch.arange(2))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"place": "dusk"}, "did you mean 'disk'"),
        ({"dtype": "bfloat16"}, "float16"),
        ({"max_bytes": 0}, "max_bytes: expected at least 1"),
    ],
)
def test_values_that_cannot_be_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        StoreSpec(**values)


def test_mixed_images_are_refused() -> None:
    stream = training_set(IMAGES).stream(NUM_ENVS, torch.device("cpu"), 0, mixing=Mixing(mixup=0.5))
    with pytest.raises(ConfigError, match="mixed images never come twice"):
        check_store(EXACT, stream)
    check_store(StoreSpec(), stream)


def test_stores_of_other_things_have_other_folders(tmp_path: Path) -> None:
    folders = {store_folder(tmp_path, {"teachers": names}) for names in (["a"], ["b"], ["a", "b"])}
    assert len(folders) == 3
    assert store_folder(tmp_path, {"teachers": ["a"]}) in folders
    assert all("teachers" in (folder / "about.json").read_text() for folder in folders)


def student_after(stream: BatchStream, steps: int) -> Tensor:
    distiller = make_tiny_distiller()
    env = make_tiny_env(batches=stream, distiller=distiller, output="torch")
    env.reset()
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        env.step(torch.randn(*env.action_space.shape, generator=draw))
    return torch.cat([parameter.flatten() for parameter in distiller.module.parameters()])


@places
def test_the_student_is_the_same_as_without_a_store(place: str, tmp_path: Path) -> None:
    stored = student_after(stored_stream(make_store(tmp_path, place=place)), 3 * STEPS)
    torch.testing.assert_close(stored, student_after(make_stream(), 3 * STEPS))


# The views of a stream.


@given(count=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_image_is_seen_in_so_many_views_in_turn(count: int, seed: int) -> None:
    stream = make_stream(ViewSet(count), seed)
    views = stream.views
    assert isinstance(views, MemoryViews)
    order = torch.arange(IMAGES)
    draw = torch.Generator()
    numbers = torch.stack([views.draw(order, draw, epoch) for epoch in range(2 * count)])
    assert numbers[:count].equal(numbers[count:])
    assert all(len(column.unique()) == count for column in numbers[:count].unbind(1))
    assert 0 <= int(numbers.min()) <= int(numbers.max()) < views.count


def test_runs_of_all_seeds_see_the_same_few_views() -> None:
    seen = [
        {i: row for batch in epoch(make_stream(ViewSet(1), seed)) for i, row in rows_of(batch)}
        for seed in (0, 1)
    ]
    common = seen[0].keys() & seen[1].keys()
    assert common
    assert all(seen[0][index].equal(seen[1][index]) for index in common)


def rows_of(batch: Batch) -> Iterator[tuple[int, Tensor]]:
    return zip(batch.index.tolist(), batch.inputs, strict=True)


def test_another_seed_of_the_views_chooses_others() -> None:
    order, draw = torch.arange(IMAGES), torch.Generator()
    chosen = [make_stream(ViewSet(1, seed)).views.draw(order, draw, epoch=0) for seed in (0, 1)]
    assert not chosen[0].equal(chosen[1])


def test_all_views_of_an_image_are_different_pictures() -> None:
    views = make_stream().views
    assert isinstance(views, MemoryViews)
    numbers = torch.arange(views.count)
    pictures = next(views.inputs(torch.zeros_like(numbers), numbers, [slice(views.count)]))
    assert len(pictures.flatten(1).unique(dim=0)) == views.count


@pytest.mark.parametrize("count", [0, 10])
def test_views_that_there_are_not_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"views: expected .*, (got|found) {count}"):
        make_stream(ViewSet(count))


def test_images_in_files_bring_what_the_teachers_say_of_their_views(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = load_dataset("folder", root=tmp_path, image_size=16, resize=16, workers=0)
    network = build_network("resnet8", num_classes=data.num_classes, width=0.125)
    ensemble = TeacherEnsemble([network], ["one"])
    stream = data.stream(data.train, batch_size=4, device="cpu", seed=0, view_set=TWO)
    check_store(EXACT, stream)
    store = StoredTeachers(ensemble, stream.views, EXACT, batch_size=4)
    stream.teaching = store
    for _ in range(3 * stream.steps_per_epoch):
        batch = next(stream)
        assert batch.teachers is not None
        expected = ensemble(batch.inputs)
        torch.testing.assert_close(batch.teachers.logits, expected.logits)
        torch.testing.assert_close(batch.teachers.feature_maps, expected.feature_maps)
    assert store.computed <= 2 * len(data.train)
    fresh = data.stream(data.train, batch_size=4, device="cpu", seed=0)
    with pytest.raises(ConfigError, match=r"where data\.views says how many"):
        check_store(EXACT, fresh)


# Without whole maps.


@places
def test_means_of_maps_are_enough_for_what_is_observed(place: str, tmp_path: Path) -> None:
    whole, means = (make_store(tmp_path, TWO, place=place, maps=maps) for maps in (True, False))
    assert means.nbytes < whole.nbytes
    env = make_tiny_env(batches=make_stream(TWO), beta=0.0)
    env.reset(seed=0)
    batch = env.state.batch
    keys = whole.keys(batch.index, torch.zeros_like(batch.index))
    found = []
    for store in (whole, means):
        store.fill(keys)
        state = env.distiller.imagine(batch, store.take(keys), {})
        found.append(state.similarity)
    torch.testing.assert_close(*found)
    with pytest.raises(ConfigError, match=r"teachers\.store\.maps: expected true"):
        _ = state.distance


@pytest.mark.parametrize("maps", [True, False])
def test_sizes_by_kind_are_those_of_the_whole(maps: bool, tmp_path: Path) -> None:
    store = make_store(tmp_path, TWO, maps=maps)
    assert sum(store.sizes.values()) == store.nbytes
    assert store.sizes["logits"] == 2 * IMAGES * len(TEACHERS) * CLASSES * 4


def test_maps_are_kept_whole_where_they_are_compared() -> None:
    assert [StoreSpec().resolved(compared=compared).maps for compared in (True, False)] == [
        True,
        False,
    ]
    assert StoreSpec(maps=True).resolved(compared=False).maps
