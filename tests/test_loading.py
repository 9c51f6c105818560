"""Mini-batches of cells: every cell once, in the order that seed and pass decide, also resumed."""

import itertools
import math
import random
import re
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import AS_GOOD, files_of_at_most, mutated, mutations

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from anndata import AnnData  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402

from vmm_fast._errors import InputError  # noqa: E402
from vmm_fast._files import load_checked, save_atomically  # noqa: E402
from vmm_fast.cells import CellStore, integration, selection  # noqa: E402
from vmm_fast.cells.settings import Settings  # noqa: E402
from vmm_fast.scvi import VMMSCVI, CellDataModule, Checkpoints, MemoryCells, checkpoints, loading  # noqa: E402
from vmm_fast.scvi.columns import cell_columns  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Cells:
    """Cells of which cell i has the counts i + 1 and 1; they remember what was read."""

    n_vars = 2

    def __init__(self, n_obs, run):
        self.n_obs, self.run, self.nbytes, self.reads = n_obs, run, 16 * n_obs, []

    def read(self, starts, stops):
        rows = loading._rows(starts, stops)
        self.reads.append(len(rows))
        return csr_matrix(np.stack([rows + 1, np.ones_like(rows)], 1).astype(np.float32))


def batches_of(cells, window=50, **options):
    starts = np.arange(0, cells.n_obs, cells.run)
    stops = np.minimum(starts + cells.run, cells.n_obs)
    loading.WINDOW = window
    columns = cell_columns(np.arange(cells.n_obs) % 7)
    return loading.CellBatches(cells, columns, starts, stops, **options)


@pytest.fixture(autouse=True)
def window(monkeypatch):
    monkeypatch.setattr(loading, "WINDOW", loading.WINDOW)


def cells_in(batches):
    """Indices of the cells of each batch, after a check of all else that it holds."""
    found = []
    for tensors in batches:
        rows = tensors["X"][:, 0].long() - 1
        assert tensors["X"].dtype == torch.float32 and (tensors["X"][:, 1] == 1).all()
        assert torch.equal(tensors["batch"], rows[:, None] % 7)
        assert tensors["labels"].shape == (len(rows), 1)
        found.append(rows.tolist())
    return found


shapes = st.fixed_dictionaries(
    {
        "number": st.integers(1, 300),
        "run": st.integers(1, 40),
        "batch_size": st.integers(1, 70),
        "world_size": st.integers(1, 4),
    }
)


@settings(max_examples=60)
@given(shapes, st.integers(0, 5))
def test_every_cell_is_in_one_batch_of_one_process(shape, seed):
    number, run, batch_size, world = shape.values()
    if number < world:
        return
    parts = []
    for rank in range(world):
        options = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world}
        batches = batches_of(Cells(number, run), **options)
        found = cells_in(batches)
        assert len(found) == len(batches)
        assert all(len(rows) == batch_size for rows in found[:-1])
        parts.append(found)
    assert len({tuple(map(len, part)) for part in parts}) == 1  # all take the same steps
    rows = list(itertools.chain(*itertools.chain(*parts)))
    assert len(set(rows)) == len(rows)
    left_out = loading.LEAST_BATCH - 1 if batch_size >= loading.LEAST_BATCH else batch_size - 1
    assert number - len(rows) <= world * left_out + world - 1


@settings(max_examples=60)
@given(shapes, st.integers(0, 400), st.integers(0, 3))
def test_a_pass_goes_on_where_it_was_left(shape, at, number_of_pass):
    number, run, batch_size, _ = shape.values()

    def make():
        options = {"batch_size": batch_size, "seed": 3, "number_of_pass": lambda: number_of_pass}
        return batches_of(Cells(number, run), **options)

    whole, first = make(), make()
    expected = cells_in(whole)
    at = min(at, len(expected))
    begun = iter(first)
    assert cells_in(itertools.islice(begun, at)) == expected[:at]
    state = first.state_dict()
    begun.close()
    second = make()
    second.load_state_dict(state if at else {"pass": 9, "done": 1})  # that of another pass: none
    assert cells_in(second) == expected[at:]
    window = max(1, 50 // batch_size) * batch_size
    skipped = at * batch_size // window * window
    read = sum(second.cells.reads)
    assert read in (number - skipped, len(expected) * batch_size - skipped) or at == len(expected)


def test_orders(monkeypatch):
    cells, which = Cells(200, 5), [0]
    batches = batches_of(cells, batch_size=10, seed=1, number_of_pass=lambda: which[0])
    first, again = cells_in(batches), cells_in(batches)
    which[0] = 1
    assert first == again != cells_in(batches)
    assert first != cells_in(batches_of(cells, batch_size=10, seed=2))
    rows = np.ravel(first)
    assert abs(np.corrcoef(rows, np.arange(200))[0, 1]) < 0.3
    # A window has whole runs of five, but not side by side.
    assert len(set(rows[:50] // 5)) == 10
    assert (np.diff(rows) == 1).mean() < 0.2
    assert np.ravel(cells_in(batches_of(cells, batch_size=10))).tolist() == list(range(200))
    assert cells.reads[-4:] == [50] * 4
    # Each window of a single long run has an order of its own.
    rows = np.ravel(cells_in(batches_of(Cells(200, 200), batch_size=10, seed=1)))
    assert sorted(rows[:50]) == list(range(50))
    assert (rows[:50] != rows[50:100] - 50).any()


def test_windows_of_cells_with_many_counts_are_smaller(monkeypatch):
    assert loading.window_of(Cells(200, 5)) == loading.WINDOW
    monkeypatch.setattr(loading, "VALUES", 80)
    assert loading.window_of(Cells(200, 5)) == 40
    cells = Cells(200, 5)
    assert np.ravel(cells_in(batches_of(cells, 1000, batch_size=10))).tolist() == list(range(200))
    assert cells.reads == [40] * 5


def test_genes_and_what_is_refused():
    batches = batches_of(Cells(20, 3), batch_size=20, genes=np.array([1]))
    assert [tensors["X"].tolist() for tensors in batches] == [[[1.0]] * 20]
    with pytest.raises(ValueError, match=r"world_size must be at most 20, .* process 21 would"):
        batches_of(Cells(20, 3), rank=21, world_size=22)
    with pytest.raises(ValueError, match=r"held_out must be in \[0, 1\), but is 1"):
        CellDataModule(Cells(20, 3), np.zeros(20, int), held_out=1)
    with pytest.raises(ValueError, match="batch must be of all 20 cells, but there are 19"):
        CellDataModule(Cells(20, 3), np.zeros(19, int))


@pytest.mark.parametrize("held_out", [0, 0.25])
def test_cells_held_out(held_out, monkeypatch):
    monkeypatch.setattr(loading, "LEAST_RUNS", 5)
    monkeypatch.setattr(loading, "WINDOW", 50)
    module = CellDataModule(Cells(97, 10), np.arange(97) % 7, held_out=held_out, batch_size=8)
    module.trainer = SimpleNamespace(global_rank=0, world_size=1, current_epoch=0)
    trained, held = cells_in(module.train_dataloader()), module.val_dataloader()
    held = list(itertools.chain(*cells_in(held))) if held else []
    assert len(held) == module.n_val and (module.n_val > 0) == (held_out > 0)
    trained = list(itertools.chain(*trained))
    assert module.n_train + module.n_val == 97 and not set(trained) & set(held)
    assert held == sorted(held)
    if held:
        assert len({row // 10 for row in held}) == 3  # whole runs
    assert list(itertools.chain(*cells_in(module.all_cells()))) == list(range(97))
    shares = []
    for module.trainer.global_rank in range(2):
        module.trainer.world_size = 2
        shares += itertools.chain(*cells_in(module.train_dataloader()))
    assert len(shares) == len(set(shares)) and not set(shares) & set(held)
    # Runs are shortened where there are less than five.
    long = CellDataModule(Cells(97, 90), np.arange(97) % 7, held_out=held_out)
    assert long.n_val <= 2 * (97 // 5)


def test_cells_on_disk_that_fit_into_a_window_are_read_once(monkeypatch):
    def passes(cells, proteins):
        module = CellDataModule(cells, np.arange(97) % 7, proteins=proteins, batch_size=8)
        module.trainer = SimpleNamespace(global_rank=0, world_size=1, current_epoch=0)
        return [
            [{key: x.tolist() for key, x in tensors.items()} for tensors in batches]
            for batches in (module.train_dataloader(), module.val_dataloader(), module.all_cells())
        ]

    counts = Cells(97, 10).read(np.array([0]), np.array([97]))
    stored, proteins = Cells(97, 10), Rows(np.arange(194).reshape(97, 2))
    found = passes(stored, proteins)
    assert found == passes(MemoryCells(counts), proteins.values)
    assert stored.reads == [97] and proteins.reads == 1
    monkeypatch.setattr(loading, "WINDOW", 96)
    passes(stored, proteins)
    assert len(stored.reads) > 2 and proteins.reads > 2


class Rows:
    """Proteins on disk; they count how often they are read."""

    reads = 0

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        self.reads += 1
        return self.values[rows]


# --- training ---


def make_cells(number=150, genes=12):
    random = np.random.default_rng(0)
    rates = random.gamma(1.0, 4.0, (2, genes)) + 0.1
    counts = random.poisson(rates[random.integers(2, size=number)]).astype(np.float32)
    adata = AnnData(csr_matrix(counts))
    adata.obs["batch"] = np.array(["b", "a", "c"])[np.arange(number) * 3 // number]
    return adata


def prepared(on_disk, tmp_path):
    """Return cells as the command takes them, in memory or on disk."""
    adata = make_cells()
    options = {"batch_key": "batch", "epochs": 3, "batch_size": 16, "components": 5, "seed": 2}
    chosen = Settings.for_cells(adata, **options, on_disk=on_disk)
    if not on_disk:
        return selection.training_cells(adata, chosen)[0], None, chosen
    adata.write_h5ad(tmp_path / "cells.h5ad")
    cells, where, _ = selection.training_cells_on_disk(CellStore(tmp_path / "cells.h5ad"), chosen)
    return cells, where, chosen


every_step = pytest.mark.slow("it trains 32 times")


@pytest.mark.parametrize(
    ("on_disk", "stops"),
    [
        (False, [5]),
        (True, [22]),
        pytest.param(False, range(2, 25, 3), marks=every_step),
        pytest.param(True, range(3, 25, 3), marks=every_step),
    ],
)
def test_stopped_at_any_step_and_resumed_equals_a_run_left_alone(
    tmp_path, monkeypatch, on_disk, stops
):
    monkeypatch.setattr(CellStore, "run", 8)
    monkeypatch.setattr(loading, "LEAST_RUNS", 10)
    monkeypatch.setattr(loading, "WINDOW", 64)
    cells, where, chosen = prepared(on_disk, tmp_path)

    def run(**options):
        return integration.integrate(
            cells.copy(), chosen, on_disk=where, accelerator="cpu", **options
        )

    whole = run()
    real = integration.Progress.on_train_batch_end
    for stop in stops:

        def stopped(self, trainer, *args, stop=stop):
            real(self, trainer, *args)
            if trainer.global_step == stop:
                raise KeyboardInterrupt

        kept = {"checkpoint": tmp_path / f"{stop}.ckpt", "checkpoint_steps": 2}
        monkeypatch.setattr(integration.Progress, "on_train_batch_end", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(**kept)
        monkeypatch.setattr(integration.Progress, "on_train_batch_end", real)
        resumed = run(**kept, resume=kept["checkpoint"].exists())
        torch.testing.assert_close(
            resumed.model.module.state_dict(), whole.model.module.state_dict(), rtol=0, atol=0
        )
        np.testing.assert_array_equal(resumed.z, whole.z)
        assert resumed.history == whole.history


def test_what_the_model_is_made_with_need_not_be_all(tmp_path):
    adata = make_cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with CellStore(tmp_path / "cells.h5ad") as store:
        some = store.sample(20, keys=["batch"], seed=1)
        assert some.n_obs == 64 and list(some.obs["batch"].cat.categories) == ["a", "b", "c"]
        np.testing.assert_array_equal(some.X.toarray(), adata.X[some.uns["rows"]].toarray())
        assert list(some.obs["batch"]) == list(adata.obs["batch"].iloc[some.uns["rows"]])
        assert list(some.obs_names) == list(adata.obs_names[some.uns["rows"]])
        VMMSCVI.setup_anndata(some, batch_key="batch")
        model = VMMSCVI(some, n_components=6)
        assert model.summary_stats.n_batch == 3
        other = CellDataModule(store, np.zeros(150, int))
        with pytest.raises(
            ValueError, match=r"datamodule must have .* categories of, 3, but has 1"
        ):
            model.train(1, datamodule=other)
        module = CellDataModule(store, store.column("batch").codes, batch_size=32)
        model.train(2, datamodule=module, accelerator="cpu", enable_progress_bar=False)
        z = integration.latent_means(model, module.all_cells())
    model = model.save(tmp_path / "model") or VMMSCVI.load(tmp_path / "model", adata)
    np.testing.assert_allclose(model.get_latent_representation(), z, atol=1e-5)


def test_the_bar_tells_where_training_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vmm_fast.cells.training.BAR_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    cells, _, chosen = prepared(False, tmp_path)
    integration.integrate(cells, chosen, accelerator="cpu", progress=True)
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    shown = [line for line in lines if line.startswith("epoch")]
    pattern = r"epoch {}, {}{}, \d\.\d GiB \|.*\| ETA \d\d:\d\d"
    assert re.match(pattern.format("1/3", "", "warm-up"), shown[0])
    active = r"[1-5] active components?"
    assert re.match(pattern.format("3/3", r"ELBO -\d+\.\d, ", active), shown[-1])
    assert lines[-2:] == ["embedding the cells", ""]


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path):
    cells, _, chosen = prepared(False, tmp_path)
    with (
        files_of_at_most(10_000),
        pytest.raises(InputError, match=r"c\.ckpt: cannot be written: File too large$"),
    ):
        integration.integrate(
            cells, chosen, checkpoint=tmp_path / "c.ckpt", checkpoint_steps=1, accelerator="cpu"
        )
    assert not list(tmp_path.glob("*c.ckpt*"))


# --- checkpoints ---


class Kept(Checkpoints):
    """Remembers after which steps and batches it has written, and keeps a copy of each file."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.wrote = []

    def _write(self, trainer):
        super()._write(trainer)
        self.wrote.append(trainer.global_step)
        copy = self.path.with_suffix(f".{trainer.global_step}")
        copy.write_bytes(self.path.read_bytes())


def train(keep=None, epochs=3, *, number=150, n_hidden=8, batch_size=16, seed=0, **more):
    """Train a small model: nine steps an epoch, the last of seven cells."""
    adata = make_cells(number)
    counts = adata.X
    VMMSCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = VMMSCVI(adata, n_components=5, n_hidden=n_hidden)
    batches = adata.obs["batch"].astype("category").cat.codes.to_numpy()
    model.train(
        epochs,
        datamodule=CellDataModule(MemoryCells(counts), batches, batch_size=batch_size, seed=seed),
        accelerator="cpu",
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        logger=False,
        plan_kwargs={"prior_warmup": 0},  # it is a share of all steps, of which some are added
        callbacks=[keep] if keep else [],
        **more,
    )
    return model


@cache
def whole():
    """Return a model that was trained without a stop."""
    return train()


def same_model(one, other):
    torch.testing.assert_close(
        one.module.state_dict(), other.module.state_dict(), rtol=0, atol=0, equal_nan=True
    )


EARLY = {
    "early_stopping": True,
    "early_stopping_monitor": "elbo_validation",
    "early_stopping_patience": 1,
    "early_stopping_min_delta": 1e9,
}


@pytest.mark.parametrize(
    ("how", "steps", "seconds"),
    [
        ({}, 27, math.inf),
        (EARLY, 18, 0),
        ({"max_steps": 13}, 13, 0),
        ({"max_steps": 18}, 18, math.inf),
    ],
)
def test_the_end_is_written_however_training_ends(tmp_path, how, steps, seconds):
    keep = Kept(tmp_path / "kept.ckpt", seconds=seconds)
    ended = train(keep, **how)
    assert ended.trainer.global_step == steps == keep.wrote[-1]
    if seconds:
        assert keep.wrote == [steps]
    again = train(keep, **how, ckpt_path=keep.path)
    assert again.trainer.global_step == steps
    same_model(again, ended)
    if (steps, seconds) == (13, 0):  # amid an epoch: it can be made longer
        same_model(train(keep, max_steps=20, ckpt_path=keep.path), train(max_steps=20))


def test_more_time_lets_training_go_on(tmp_path, monkeypatch):
    keep = Kept(tmp_path / "kept.ckpt", seconds=math.inf)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoints.Timer,
            "time_elapsed",
            lambda self, stage="train": 9e9 if keep._step >= 12 else 0.0,
        )
        train(keep, max_time={"hours": 1})
    assert keep.wrote[-1] < 27
    same_model(train(keep, max_time={"days": 200_000}, ckpt_path=keep.path), whole())


def test_what_was_loaded_is_not_kept_for_the_next_run(tmp_path):
    keep = Checkpoints(tmp_path / "kept.ckpt", seconds=math.inf)
    same_model(train(keep), whole())
    train(keep, ckpt_path=keep.path)  # has ended: there is no first batch
    assert keep._loaded is None
    same_model(train(keep), whole())


@pytest.mark.parametrize(
    ("options", "step"), [({"seconds": 0}, 2), ({"seconds": math.inf, "steps": 2}, 8)]
)
def test_with_accumulated_gradients_it_is_written_after_steps(tmp_path, options, step):
    keep, accumulate = Kept(tmp_path / "kept.ckpt", **options), {"accumulate_grad_batches": 2}
    ended = train(keep, 2, **accumulate)
    every = options.get("steps", 1)
    assert keep.wrote == [step for step in range(1, 11) if step % every == 0 or step == 10]
    path = keep.path.with_suffix(f".{step}")
    other = Kept(tmp_path / "other.ckpt", **options)
    same_model(train(other, 2, ckpt_path=path, **accumulate), ended)
    assert other.wrote == [each for each in keep.wrote if each > step]


def test_what_training_cannot_go_on_from(tmp_path):
    path = tmp_path / "kept.ckpt"
    train(Checkpoints(path), 1)

    def refused(message, **options):
        with pytest.raises(InputError, match=rf"kept\.ckpt: {message}"):
            train(Checkpoints(tmp_path / "other.ckpt"), 2, ckpt_path=path, **options)

    for message, options in (
        ("batch_size was 16, but is given 32", {"batch_size": 32}),
        ("number of cells was 150, but is given 160", {"number": 160}),
        ("seed of the cells was 0, but is given 3", {"seed": 3}),
        (r"shape of module\..+ was \(8.*\), but is given \(9.*\)", {"n_hidden": 9}),
    ):
        refused(f"must go on with the run that wrote it: {message}", **options)
    content = load_checked(path)
    states = content.pop(checkpoints.STATES)
    save_atomically(path, content)
    refused("must be a checkpoint with the state of random numbers, but has none")
    save_atomically(path, {**content, checkpoints.STATES: 2 * states})
    refused("must go on in as many processes as wrote it, 2, but is given 1")
    path.write_bytes(path.read_bytes()[:1000])
    refused("is damaged")
    save_atomically(path, {"state_dict": {}})
    refused("is no checkpoint of training")
    torch.save([1, 2], path)
    refused("is damaged")
    path.unlink()
    refused("must be a checkpoint to go on from, but is no file")


@mutations(100)
def test_checkpoints_of_other_content_are_refused(tmp_path, monkeypatch, number):
    """Their digest would be right; Lightning would restore them part by part."""
    path, rng, taken = tmp_path / "kept.ckpt", random.Random(0), []
    train(Checkpoints(path, seconds=math.inf, steps=3), 1)
    check = checkpoints._check_all

    def check_often(trainer, plan, path, checkpoint):
        for _ in range(number):
            changed, where = mutated(checkpoint, rng)
            try:
                check(trainer, plan, path, changed)
            except InputError as error:
                assert re.search(r"kept\.ckpt( is damaged)?: ", str(error))
            else:
                taken.append(where)
        check(trainer, plan, path, checkpoint)

    monkeypatch.setattr(checkpoints, "_check_all", check_often)
    train(Checkpoints(path), 2, ckpt_path=path)
    assert 0 < len(taken) < number / 4
    for where in taken:  # what is not restored, or as good
        unused = where[0] in ("lr_schedulers", "callbacks") or where[:2] in (
            ["loops", "validate_loop"],
            ["loops", "test_loop"],
            ["loops", "predict_loop"],
        )
        as_good = where[-1] in (*AS_GOOD, "options", "data_size", "step", "stopped")
        assert unused or as_good, where


def test_curves_of_other_content_are_refused():
    curves = {"elbo_train": [3.0, 2.0], "elbo_validation": [4.0, math.nan], "other": [1.0]}
    state = {"seconds": 3.0, "epoch": 2, "history": curves}
    integration.check_progress("run", state)
    integration.check_progress("run", {"seconds": 0.1, "epoch": 0, "history": {}})
    rng = random.Random(0)
    for _ in range(100):
        changed, where = mutated(state, rng)
        try:
            integration.check_progress("run", changed)
        except ValueError as error:
            assert str(error).startswith("run")
        else:
            assert where[0] in ("seconds", "epoch", "history"), where
            assert changed["epoch"] == 2 and len(changed["history"]["elbo_train"]) == 2
    for name in ("elbo_train", "elbo_validation"):
        with pytest.raises(ValueError, match=f"run.history must have '{name}', but has not"):
            integration.check_progress(
                "run", {**state, "history": {k: v for k, v in curves.items() if k != name}}
            )


def test_each_of_several_processes_goes_on_with_its_own_part(tmp_path):
    keep, plan = Checkpoints(tmp_path / "kept.ckpt"), torch.nn.Linear(2, 2)
    trainer = SimpleNamespace(world_size=3, datamodule=None, ckpt_path="kept.ckpt")
    checkpoint = {checkpoints.STATES: list("abc"), checkpoints.RUN: {}, "state_dict": {}}
    checkpoint |= {"state_dict": plan.state_dict(), checkpoints.STOPPED: False}
    for trainer.global_rank, expected in enumerate("abc"):
        trainer.should_stop = False
        keep.on_load_checkpoint(trainer, plan, checkpoint)
        assert keep._loaded == expected and not trainer.should_stop
    keep.on_load_checkpoint(trainer, plan, {**checkpoint, checkpoints.STOPPED: True})
    assert trainer.should_stop


def test_several_processes_write_once_it_is_time_by_the_clock_of_any(tmp_path):
    asked, written = [], []

    def is_time_anywhere(decision, all):
        assert not decision and not all
        asked.append(trainer.global_step)
        return trainer.global_step > 20

    trainer = SimpleNamespace(world_size=2, num_training_batches=100, max_steps=-1)
    trainer.should_stop, trainer.strategy = False, SimpleNamespace()
    trainer.strategy.reduce_boolean_decision = is_time_anywhere
    trainer.save_checkpoint = lambda path: written.append(trainer.global_step)
    keep = Checkpoints(tmp_path / "kept.ckpt", seconds=math.inf)
    for trainer.global_step in range(1, 50):
        keep.on_train_batch_end(trainer, None, None, None, trainer.global_step - 1)
    assert asked == [16, 32, 48] and written == [32, 48]


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": -3}, {"steps": 2.5}, {"seconds": math.nan}, {"seconds": -1}]
)
def test_when_to_write_is_checked(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, but is {value}"):
        Checkpoints("kept.ckpt", **options)
