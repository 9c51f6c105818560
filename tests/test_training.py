"""The training loop: exact resume, early stopping, random state, errors, and that it learns."""

import contextlib
import copy
import io
import itertools
import math
import random
import re
import sys

import pytest
import torch
from support import AS_GOOD, mutated, mutations
from torch.distributions import MultivariateNormal

from vmm_fast._files import load_checked, save_atomically
from vmm_fast.models import VAE, History, RandomShifts, fit, training
from vmm_fast.priors import StandardNormalPrior, VMMPrior
from vmm_fast.schedules import learning_rate_share

N, M, INPUTS = 70, 30, 6


def make_data(n=N, seed=0):
    """Return two clusters in INPUTS dimensions, within [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.randint(2, (n, 1), generator=generator)
    return 0.25 + 0.5 * side + 0.2 * torch.rand(n, INPUTS, generator=generator)


def make_model(seed=0, prior_joint=False, **arguments):
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    prior = VMMPrior(make_data(5), latent_dim=2, joint=prior_joint)
    model = VAE(INPUTS, 2, prior=prior, hidden=(16, 8), **arguments)
    torch.random.set_rng_state(generator)
    return model


def run(model, **arguments):
    settings = {"x_train": make_data(), "x_val": make_data(M, 1), "epochs": 4, "batch_size": 16}
    return fit(model, **{**settings, **arguments})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a model after 4 epochs, its history, and the folder of its checkpoints."""
    model, folder = make_model(), tmp_path_factory.mktemp("trained")

    def keep(record):
        (folder / f"{record['epoch']}.pt").write_bytes((folder / "run.pt").read_bytes())

    return model, run(model, checkpoint=folder / "run.pt", on_epoch_end=keep), folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    """Return a copy of a checkpoint of the trained model after this many epochs."""

    def copied(epochs):
        path = tmp_path / "run.pt"
        path.write_bytes((trained[2] / f"{epochs}.pt").read_bytes())
        return path

    return copied


def assert_same_state(a, b):
    """Compare to the last bit, including the state of the prior's optimizer."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


def without_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def test_history_has_every_quantity():
    model = make_model()
    start = model.prior.pseudo_inputs.detach().clone()
    seen = []
    history = run(model, on_epoch_end=seen.append)
    assert isinstance(history, History)
    assert seen == history
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    for record in history:
        for part in ("train", "validation"):
            assert record[f"{part}_elbo"] == pytest.approx(
                record[f"{part}_log_likelihood"] - record[f"{part}_kl"], abs=1e-4
            )
        assert 0 < record["scale"] < 1
        assert record["seconds"] > 0
        assert record["concentration"] > 0
        assert 1 <= record["components_active"] <= 5
    assert not torch.equal(model.prior.pseudo_inputs, start)  # the empirical-Bayes step was taken


def test_without_validation_and_mixture():
    model = VAE(INPUTS, 2, StandardNormalPrior(2), hidden=(8,), likelihood="bernoulli")
    history = fit(model, make_data(), epochs=2, batch_size=16, learning_rate=0.02)
    for name in ("validation_elbo", "scale", "concentration"):
        assert [record[name] for record in history] == [None, None]
    assert history.best_epoch is None
    assert history[1]["train_elbo"] > history[0]["train_elbo"]


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(70, 16, 4), (64, 16, 4), (10, 16, 1)])
def test_batches(n, batch_size, steps, monkeypatch):
    """Each batch is encoded once: the empirical-Bayes step uses the z of the variational step."""
    model = make_model()
    batches, drawn, updated = [], [], []
    elbo = model.elbo

    def recorded(x, prior):
        assert prior is None
        terms = elbo(x)
        batches.append(x)
        drawn.append(terms.z)
        return terms

    monkeypatch.setattr(model, "elbo", recorded)
    monkeypatch.setattr(model.prior, "update", lambda z, encoder: updated.append(z))
    fit(model, make_data(n), epochs=2, batch_size=batch_size)
    assert [len(x) for x in batches] == [min(n, batch_size)] * (2 * steps)
    assert all(torch.equal(z, other) for z, other in zip(drawn, updated, strict=True))
    first = torch.cat(batches[:steps])
    assert len(first.unique(dim=0)) == len(first)  # no row twice in an epoch
    assert not torch.equal(first, torch.cat(batches[steps:]))


def test_same_seed_same_bits_other_seed_other_batches(trained):
    model, history, _ = trained
    again, other = make_model(), make_model()
    assert without_seconds(run(again)) == without_seconds(history)
    assert_same_state(again.state_dict(), model.state_dict())
    assert run(other, epochs=1, seed=4)[0]["train_elbo"] != history[0]["train_elbo"]


def assert_same_file(a, b):
    """Compare all but the clock."""
    files = [load_checked(path) for path in (a, b)]
    for file in files:
        file["history"] = without_seconds(file["history"])
    assert_same_state(*files)


def test_resume_after_a_kill_is_exact(trained, tmp_path):
    model, expected, folder = trained
    path = tmp_path / "run.pt"

    def on_epoch_end(record):
        torch.randn(3)  # a callback's own noise must not reach the training
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_model(), checkpoint=path, on_epoch_end=on_epoch_end)
    torch.manual_seed(99)  # whatever the caller does in between
    resumed = make_model(seed=1)
    history = run(resumed, checkpoint=path, resume=True)
    assert without_seconds(history) == without_seconds(expected)
    assert history.best_epoch == expected.best_epoch
    assert_same_state(resumed.state_dict(), model.state_dict())
    assert_same_file(path, folder / "4.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]  # no temporary file stays


def test_a_falling_learning_rate_goes_on_where_it_was(tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def counted(self, *rest):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    cosine = {"schedule": "cosine", "learning_rate": 0.01, "epochs": 3}
    whole, path = make_model(prior_joint=True), tmp_path / "run.pt"
    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    run(whole, **cosine)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(prior_joint=True), **cosine, checkpoint=path, on_epoch_end=stop)
    resumed = make_model(seed=1, prior_joint=True)
    run(resumed, **cosine, checkpoint=path, resume=True)
    assert_same_state(resumed.state_dict(), whole.state_dict())
    assert rates[:12] == rates[12:]
    passed = [(step + 0.5) / 12 for step in range(12)]
    expected = [
        0.01 * (0.02 + 0.98 * (1 + math.cos(math.pi * (t - 0.04) / 0.96)) / 2) for t in passed[1:]
    ]
    assert rates[1:12] == pytest.approx(expected)
    assert rates[0] == pytest.approx(0.01 * (0.02 + 0.98 * 1), rel=0.01)
    with pytest.raises(ValueError, match="schedule: cosine, 3 epochs in the checkpoint, cosine, 4"):
        run(resumed, **{**cosine, "epochs": 4}, checkpoint=path, resume=True)


def test_the_prior_stands_still_in_the_warmup_and_learns_after_it(tmp_path):
    steps, states, path = [], [], tmp_path / "run.pt"
    model = make_model()
    elbo = model.elbo

    def recorded(x, prior):
        terms = elbo(x, prior)
        if model.training:
            steps.append(prior)
            if prior is not None:
                normal = MultivariateNormal(torch.zeros(2), torch.eye(2))
                expected = -terms.q.entropy() - normal.log_prob(terms.z)
                torch.testing.assert_close(terms.kl, expected, rtol=1e-4, atol=1e-4)
        return terms

    def end(record):
        states.append(copy.deepcopy(model.prior.state_dict()))

    model.elbo = recorded
    settings = {"prior_warmup": 0.6, "epochs": 5, "patience": 1}  # 12 of 20 steps
    history = run(model, **settings, checkpoint=path, on_epoch_end=end)
    assert [prior is not None for prior in steps[:16]] == [True] * 12 + [False] * 4
    begun = make_model().prior.state_dict()
    for state in states[:3]:
        assert_same_state(state, begun)
    assert not torch.equal(states[3]["raw_precision"], begun["raw_precision"])
    assert history.best_epoch >= 4  # and patience did not end the warm-up

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_model(), **settings, checkpoint=path, on_epoch_end=stop)
    resumed = make_model(seed=1)
    assert without_seconds(run(resumed, **settings, checkpoint=path, resume=True)) == (
        without_seconds(history)
    )
    assert_same_state(resumed.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"prior_warmup: 0.6 of 5 epochs in the .* 0.6 of 6"):
        run(resumed, **{**settings, "epochs": 6}, checkpoint=path, resume=True)


def test_training_batches_alone_are_augmented_and_resumed(tmp_path):
    seen = []

    def shifted(x):
        seen.append(len(x))
        return (x + 0.05 * torch.randn(len(x), 1)).clamp(0, 1)

    whole, stopped, resumed = (make_model(seed, scale="learnt") for seed in (0, 0, 1))
    path = tmp_path / "run.pt"
    history = run(whole, epochs=2, augment=shifted)
    assert seen == [16] * 8
    run(stopped, epochs=1, augment=shifted, checkpoint=path)
    run(resumed, epochs=2, augment=shifted, checkpoint=path, resume=True)
    assert_same_state(resumed.state_dict(), whole.state_dict())
    plain = run(make_model(scale="learnt"), epochs=1)
    assert history[0]["train_elbo"] != plain[0]["train_elbo"]


def test_schedules():
    assert [learning_rate_share("constant", step, 9) for step in range(9)] == [1.0] * 9
    shares = [learning_rate_share("cosine", step, 1000) for step in range(1000)]
    assert shares[:40] == pytest.approx([(step + 0.5) / 40 for step in range(40)])
    assert shares[519] == pytest.approx(0.51, abs=2e-3)  # half of the way down from the 40th on
    assert shares[-1] == pytest.approx(0.02, abs=1e-5)
    assert all(a > b for a, b in itertools.pairwise(shares[40:]))
    assert learning_rate_share("cosine", 0, 1) < 1


def fix_validation(monkeypatch, values):
    """Let the validation ELBO take given values; return the weights after each epoch."""
    weights = []

    def validate(self, x_val):
        weights.append(copy.deepcopy(self.model.state_dict()))
        return [values[self.epoch], values[self.epoch], 0.0], None

    monkeypatch.setattr(training._Run, "validate", validate)
    return weights


def test_early_stopping_restores_the_best_weights_and_counts_on_after_resume(tmp_path, monkeypatch):
    weights = fix_validation(monkeypatch, [-9.0, -5.0, -6.0, -5.5, -1.0])
    path = tmp_path / "run.pt"
    run(make_model(), epochs=3, checkpoint=path)
    model, resumed = make_model(), make_model(seed=1)
    histories = [run(model, epochs=5, patience=2)]
    for _ in range(2):  # a run that stopped early is finished
        histories.append(run(resumed, epochs=5, patience=2, checkpoint=path, resume=True))
    assert [(len(history), history.best_epoch) for history in histories] == [(4, 2)] * 3
    for state in (model.state_dict(), resumed.state_dict()):
        assert_same_state(state, weights[1])


def test_min_delta_asks_for_more(monkeypatch):
    fix_validation(monkeypatch, [-9.0, -8.9, -8.8, -1.0])
    assert len(run(make_model(), patience=2, min_delta=0.5)) == 3
    assert len(run(make_model(), patience=3, min_delta=0.5)) == 4


def test_validation_repeats_its_noise(monkeypatch):
    model = make_model()
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    monkeypatch.setattr(type(model.prior), "update", lambda *arguments: None)
    model.scale_mode = "learnt"
    model.raw_scale = torch.nn.Parameter(torch.zeros(()))
    history = run(model, epochs=2)
    assert history[0]["validation_elbo"] == history[1]["validation_elbo"]
    assert history[0]["train_elbo"] != history[1]["train_elbo"]


def test_validation_does_not_disturb_training(trained):
    history = run(make_model(), x_val=None)
    for name in ("train_elbo", "scale"):
        assert [record[name] for record in history] == [record[name] for record in trained[1]]


def test_learning_rate_is_the_networks_alone():
    """Adam's first step moves a parameter by its learning rate, where the gradient is not tiny."""
    model = make_model()
    before = copy.deepcopy(model)
    run(model, x_train=make_data(16), x_val=None, epochs=1, learning_rate=0.02)
    for name, tensor in model.named_parameters():
        step = (tensor - before.get_parameter(name)).abs().max().item()
        options = model.prior.options
        seldom = name == "prior.pseudo_inputs"
        of_prior = options.learning_rate * (options.update_every**0.5 if seldom else 1)
        rate = of_prior if name.startswith("prior.") else 0.02
        assert step == pytest.approx(rate, rel=0.01), name


@pytest.mark.parametrize(("fail", "mode"), [(False, True), (True, False)])
def test_caller_state_is_untouched(fail, mode):
    def on_epoch_end(record):
        torch.manual_seed(1)
        model.eval()
        if fail:
            raise RuntimeError("stop")

    model, before = make_model().train(mode), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop") if fail else contextlib.nullcontext():
        run(model, epochs=2, on_epoch_end=on_epoch_end)
    assert torch.equal(torch.get_rng_state(), before)
    assert {module.training for module in model.modules()} == {mode}


def test_transform_of_bytes_and_float64_model():
    bytes_ = (255 * make_data()).to(torch.uint8)
    a, b = make_model().double(), make_model().double()
    fit(a, bytes_, epochs=2, batch_size=16, transform=lambda x: x / 255)
    fit(b, bytes_ / 255, epochs=2, batch_size=16)
    assert_same_state(a.state_dict(), b.state_dict())
    assert a.encoder[0].weight.dtype == torch.float64


def test_non_finite_loss_stops_with_the_best_weights_kept(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    model = make_model()
    kl, calls = model.prior.kl, []

    def broken_kl(q, encoder=None, z=None):
        calls.append(0)
        value = kl(q, encoder, z=z)
        return value * math.nan if len(calls) == 10 else value  # 4 + 2 calls an epoch

    monkeypatch.setattr(model.prior, "kl", broken_kl)
    with pytest.raises(FloatingPointError, match=r"epoch 2, training step 4: KL nan\. Lower learn"):
        run(model, checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == state["best_epoch"] == 1
    assert all(
        torch.isfinite(v).all() for v in state["best_weights"].values() if torch.is_tensor(v)
    )


@pytest.mark.parametrize(("value", "before"), [(1e20, 0), (1e38, 1)])
def test_an_error_leaves_the_running_variance_alone(value, before):
    """A square that overflows raises; nothing that has been learnt is lost with it."""
    model = make_model()
    if before:
        fit(model, make_data(), epochs=before)
    kept = {name: x.clone() for name, x in model.state_dict().items() if torch.is_tensor(x)}
    x = make_data(16)
    x[3, 2] = value
    with pytest.raises(FloatingPointError, match="epoch 1, training step 1"):
        fit(model, x, epochs=1)
    for name, old in kept.items():
        torch.testing.assert_close(model.state_dict()[name], old, rtol=0, atol=0)


def test_what_does_not_fit_together_is_no_divergence():
    with pytest.raises(ValueError, match="prior must have latent_dim = 2 dimensions, but has 3"):
        VAE(INPUTS, 2, VMMPrior(make_data(5), latent_dim=3))
    model = VAE(INPUTS, 2, VMMPrior(torch.zeros(5, INPUTS + 1), latent_dim=2))
    with pytest.raises(ValueError, match="x must have shape"):
        fit(model, make_data(), epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 8}, "batch_size: 16 in the checkpoint, 8 now"),
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"schedule": "cosine"}, "schedule: constant in the checkpoint, cosine, 2 epochs now"),
        ({"learning_rate": 0.1}, r"learning_rate: 0\.001 in the checkpoint, 0\.1 now"),
        ({"x_train": make_data(71)}, "length of x_train: 70 in the checkpoint, 71 now"),
        ({"x_val": None}, "length of x_val: 30 in the checkpoint, None now"),
        # The same rows in another order are other data.
        ({"x_train": make_data().flip(0)}, "checksum of x_train"),
        ({"x_val": make_data(M, 1).flip(0)}, "checksum of x_val"),
        ({"augment": RandomShifts((3, 2))}, "augment: none in the .*, RandomShifts now"),
        ({"model": {"posterior": "diagonal"}}, "posterior='full'.*posterior='diagonal'"),
        ({"model": {"hidden": (16, 9)}}, r"encoder\.2\.weight: .*\[8, 16\].*\[9, 16\]"),
        ({"model": {"prior": None}}, r"prior: VMMPrior\(.* in the checkpoint, StandardNormalPrior"),
        (
            {"model": {"prior": VMMPrior(torch.zeros(5, INPUTS), 2, data_size=99)}},
            "prior: .*data_size=None.* in the checkpoint, .*data_size=99",
        ),
    ],
)
def test_checkpoint_of_another_run(checkpoint, arguments, message):
    settings = {"hidden": (16, 8), "prior": VMMPrior(make_data(5), latent_dim=2)}
    model = VAE(INPUTS, 2, **{**settings, **arguments.get("model", {})})
    before = copy.deepcopy(model.state_dict())
    others = {name: value for name, value in arguments.items() if name != "model"}
    with pytest.raises(ValueError, match=f"of another run: .*{message}"):
        run(model, epochs=2, checkpoint=checkpoint(1), resume=True, **others)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("place", "resume", "error", "message"),
    [
        ("run.pt", True, FileNotFoundError, r"resume=True, but checkpoint .*run\.pt"),
        (None, True, ValueError, "resume=True needs checkpoint"),
        ("absent/run.pt", False, FileNotFoundError, "checkpoint's folder"),
        (".", False, ValueError, "checkpoint must be a file"),
    ],
)
def test_errors_of_the_checkpoint_s_place(tmp_path, place, resume, error, message):
    path = place and tmp_path / place
    with pytest.raises(error, match=message):
        run(make_model(), checkpoint=path, resume=resume)


@mutations(30)
def test_every_flipped_bit_of_a_checkpoint_is_found(checkpoint, number):
    path, rng = checkpoint(2), random.Random(0)
    whole, sound = path.read_bytes(), load_checked(path)
    for _ in range(number):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checked(path)
        except ValueError as error:
            assert "is damaged" in str(error)
        else:  # padding
            assert_same_state(found, sound)


@mutations(50)
def test_every_changed_entry_of_a_checkpoint_is_found(checkpoint, number):
    path, rng = checkpoint(2), random.Random(0)
    sound = torch.load(path, weights_only=True)
    changed = 0
    for _ in range(number):
        state, where = mutated(sound, rng)
        torch.save(state, path)
        try:
            found = load_checked(path)
        except ValueError as error:
            assert "is damaged" in str(error)
            changed += 1
        else:
            assert str(found | {"sha256": sound["sha256"]}) == str(sound), where
    assert changed > 0.92 * number
    half, other = path.read_bytes()[:1000], io.BytesIO()
    torch.save({"something": 1}, other)
    model = make_model()
    before = str(model.state_dict())
    for damaged in (path.read_bytes(), half, b"", b"not a checkpoint", other.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run\.pt' cannot be read \(damaged, or not written"):
            run(model, epochs=2, checkpoint=path, resume=True)
    assert str(model.state_dict()) == before


@mutations(40)
def test_checkpoints_of_other_content_are_refused(checkpoint, number):
    """An entry that is gone, of another type or shape, or no number: nothing has changed."""
    path, rng = checkpoint(2), random.Random(0)
    sound = load_checked(path)
    model = make_model()
    before = str(model.state_dict())
    refused = 0
    for _ in range(number):
        state, where = mutated(sound, rng)
        try:
            save_atomically(path, state)
            run(model, epochs=2, checkpoint=path, resume=True)
        except ValueError as error:
            refused += 1
            assert re.search(r"run\.pt' is (damaged: |of another run)", str(error))
            assert str(model.state_dict()) == before
        else:
            as_good = where[-1] in (*AS_GOOD, "lr", "data_size", "step") or "params" in where
            assert where[0] in ("versions", "history") or as_good, where
            model = make_model()
    assert refused > 0.7 * number


@pytest.mark.parametrize("part", ["model", "best_weights"])
def test_a_checkpoint_with_other_options_of_the_prior_is_refused(checkpoint, part):
    """They might be another run's; only n may have followed a schedule."""
    path = checkpoint(2)
    sound = load_checked(path)
    for group, name, other, message in (
        ("options", "learning_rate", 0.5, r"learning_rate must be 0.001, but is 0.5"),
        ("options", "responsibility_gradient", False, "responsibility_gradient must be True"),
        ("param_groups", "lr", 0.5, r"optimizer lr must be 0.00282\d+, but is 0.5"),
        ("param_groups", "betas", (0.5, 0.999), r"optimizer betas must be \(0.9, 0.999\)"),
    ):
        state = copy.deepcopy(sound)
        private = state[part]["prior._extra_state"]
        for table in private[group] if group == "param_groups" else [private[group]]:
            table[name] = other
        save_atomically(path, state)
        with pytest.raises(ValueError, match=message):
            run(make_model(), epochs=2, checkpoint=path, resume=True)
    sound["best_weights"]["prior._extra_state"]["options"]["data_size"] = 77
    save_atomically(path, sound)
    model = make_model()
    run(model, epochs=2, checkpoint=path, resume=True)
    assert model.prior.data_size == 77


def with_nan(x):
    x[-1, 0] = math.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be an integer of at least 1, but is 0"),
        ({"epochs": 1.5}, ValueError, "epochs must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, but is 0"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"patience": 0}, ValueError, "patience must be"),
        ({"patience": 2, "x_val": None}, ValueError, "patience .* needs x_val"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must be positive"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of 'constant', 'cosine', but"),
        ({"prior_warmup": 1.0}, ValueError, r"prior_warmup must be in \[0, 1\), but is 1.0"),
        ({"prior_warmup": -0.1}, ValueError, "prior_warmup must be in"),
        ({"min_delta": -1.0}, ValueError, "min_delta must be"),
        ({"augment": 3}, TypeError, "augment must be callable, but is 3"),
        (
            {"augment": lambda x: x[:, :2]},
            ValueError,
            r"augment must give torch.float32 \[16, 6\] .* but gave",
        ),
        ({"augment": lambda x: None}, ValueError, "but gave None"),
        ({"x_train": make_data().numpy()}, TypeError, "x_train must be a tensor.*ndarray"),
        ({"x_train": make_data()[:0]}, ValueError, "x_train must have at least one row"),
        ({"x_train": make_data()[:, 1:]}, ValueError, r"x_train.*\[B, 6\], but has \[70, 5\]"),
        ({"x_train": make_data().long()}, TypeError, "x_train.*int64.*pass x.float.*`transform`"),
        ({"transform": lambda x: x.long()}, TypeError, "x_train.* after `transform`.*int64"),
        ({"x_train": with_nan(make_data(9000))}, ValueError, "x_train, rows from 8192: .*finite"),
        ({"x_val": with_nan(make_data())}, ValueError, "x_val.*finite"),
        ({"x_train": 2 * make_data()}, ValueError, r"x_train.*in \[0, 1\].*Bernoulli"),
    ],
)
def test_argument_errors(arguments, error, message):
    model = make_model(likelihood="bernoulli" if "Bernoulli" in message else "gaussian")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        run(model, **arguments)
    assert_same_state(model.state_dict(), before)


def test_progress_fits_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(make_model(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().split("\r")[-1].strip()
    assert len(last) <= 80
    for text in ("epoch 4/4", "ELBO", "KL", "active component", "ETA"):
        assert text in last
    run(make_model(), epochs=1)
    assert capsys.readouterr().err == ""


def test_progress_of_a_log_is_a_line_for_each_tenth(capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    run(make_model(), epochs=25, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"epoch {done}/25" for done in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)
    ]
    told = r"ELBO -?\d.*, KL \d.* active components?, \d:\d\d min left"
    assert all(re.search(f", {told}$", line) for line in lines)


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install vmm-fast\[cli\]"):
        run(make_model(), progress=True)


def test_training_on_digits_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = torch.as_tensor(datasets.load_digits().data, dtype=torch.float32) / 8 - 1
    torch.manual_seed(0)
    digits = digits[torch.randperm(len(digits))]
    x, x_val = digits[:1500], digits[1500:]
    model = VAE(64, 4, prior=VMMPrior(x[:10], latent_dim=4), hidden=(64, 32))
    history = fit(model, x, x_val, epochs=15, batch_size=64, learning_rate=3e-3)
    # The best that a model without latent variables can do: one mean per pixel, one sigma.
    variance = (x - x.mean(0)).square().mean()
    floor = (
        -32 * (x_val - x.mean(0)).square().mean() / variance - 32 * (2 * math.pi * variance).log()
    )
    assert history[-1]["validation_elbo"] > float(floor) + 5
    assert history[-1]["validation_elbo"] > history[0]["validation_elbo"] + 10
    assert history[-1]["validation_kl"] > 1
    # Training and validation speak of the same quantity: the averaged scale is the right one.
    assert abs(history[-1]["validation_elbo"] - history[-1]["train_elbo"]) < 3
