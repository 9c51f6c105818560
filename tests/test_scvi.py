"""scVI with a mixture prior: likelihoods, pseudo-cells, and training with Lightning."""

import copy
import math
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from support import COVARIATES, TRAIN, batch_of, prior_steps, scvi_model, separated_cells

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

import anndata  # noqa: E402
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402
from scvi.train import SaveCheckpoint  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from vmm_fast.counts import SoftmaxMean  # noqa: E402
from vmm_fast.scvi import VMMSCVI, latent_prior, module  # noqa: E402
from vmm_fast.scvi.pseudo_cells import PseudoCells  # noqa: E402
from vmm_fast.scvi.training import EmpiricalBayes, EmpiricalBayesTrainingPlan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
AT_ONCE = {"plan_kwargs": {"prior_warmup": 0.0}}


@pytest.fixture(autouse=True, scope="module")
def logs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scvi.settings, "logging_dir", tmp_path_factory.mktemp("logs"))
        yield


def model(adata=None, setup=None, seed=0, **options):
    return scvi_model(VMMSCVI, adata, setup, seed, **{"n_components": 12, **options})


def train(model, epochs=1, **options):
    model.train(epochs, **{**TRAIN, **options})
    return model


@cache
def learnt():
    """Return a trained model, which no test may change."""
    return train(model(), 3)


# --- likelihood ---


def loss_of(model):
    """Return the loss of the first cells, with the same random numbers for all models."""
    scvi.settings.seed = 1
    return model.module(batch_of(model), loss_kwargs={"kl_weight": 0.7})[2].loss


@pytest.mark.parametrize(
    ("likelihood", "dispersion", "library", "for_loss"),
    [  # all pairs
        ("zinb", "gene", "observed", True),
        ("zinb", "gene-batch", "latent", False),
        ("zinb", "gene-cell", "size factor", True),
        ("nb", "gene", "size factor", False),
        ("nb", "gene-batch", "observed", True),
        ("nb", "gene-cell", "latent", True),
        ("zinb", "gene-batch", "size factor", True),
        ("nb", "gene-cell", "observed", False),
        ("poisson", "gene", "observed", False),
        ("poisson", "gene", "latent", True),
        ("poisson", "gene", "size factor", True),
        ("normal", "gene", "observed", True),
        ("normal", "gene", "latent", False),
        ("normal", "gene", "size factor", True),
    ],
)
def test_the_fused_likelihood_is_scvi_s(likelihood, dispersion, library, for_loss, monkeypatch):
    calls = []

    def counted(name):
        function = getattr(module, f"{name}_log_prob")

        def call(x, mean, *rest):
            calls.append((name, isinstance(mean, SoftmaxMean)))
            return function(x, mean, *rest)

        monkeypatch.setattr(module, f"{name}_log_prob", call)

    for name in ("zinb", "nb", "poisson"):
        counted(name)
    adata = separated_cells()
    adata.obs["size"] = 1.0 + np.arange(adata.n_obs)
    setup = {"size_factor_key": "size"} if library == "size factor" else {}
    options = {"gene_likelihood": likelihood, "dispersion": dispersion, "prior": "normal"}
    options["use_observed_lib_size"] = library != "latent"
    losses, slopes = [], []
    for fused in (False, True):
        found = model(adata, setup, fused_likelihood=fused, **options)
        with found.module.decoding_for_loss() if for_loss else nullcontext():
            loss = loss_of(found)
        loss.backward()
        losses.append(loss.detach())
        slopes.append([p.grad for p in found.module.parameters() if p.grad is not None])
    # In a training step the likelihood takes the softmax of the mean, too, where there is one.
    softmax = for_loss and library != "size factor"
    assert calls == ([] if likelihood == "normal" else [(likelihood, softmax)])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for a, b in zip(*slopes, strict=True):
        # A bias before batch normalisation has a gradient of nothing but rounding errors.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-5)


def test_what_is_decoded_outside_of_a_step_is_scvi_s():
    """Also in training mode, after a step, of several samples, and for another loss than ours."""
    found = model(prior="normal")
    tensors = batch_of(found)
    with found.module.decoding_for_loss():
        found.module(tensors)
    decoded = []
    for found.module.fused_likelihood in (False, True):
        scvi.settings.seed = 1
        decoded.append(found.module(tensors)[1]["px"])
    for name in ("mu", "scale", "theta", "zi_logits"):
        assert torch.equal(*(getattr(each, name) for each in decoded))
    with found.module.decoding_for_loss():
        samples = found.module(tensors, inference_kwargs={"n_samples": 2})[1]["px"]
    assert samples.scale.shape == (2, *tensors["X"].shape)
    torch.testing.assert_close(samples.scale.sum(-1), torch.ones(2, len(tensors["X"])))

    class WithAnotherLoss(module.VMMVAE):
        def loss(self, tensors, inference_outputs, generative_outputs, kl_weight=1.0):
            scale = generative_outputs["px"].scale
            assert scale.shape == tensors["X"].shape
            torch.testing.assert_close(scale.sum(-1), torch.ones(len(scale)))
            return super().loss(tensors, inference_outputs, generative_outputs, kl_weight)

    found.module.__class__ = WithAnotherLoss
    train(found)


@pytest.mark.parametrize(("prior", "use_observed_lib_size"), [("vmm", False), ("normal", True)])
def test_the_marginal_likelihood_is_a_mean_of_importance_weights(prior, use_observed_lib_size):
    found = model(prior=prior, use_observed_lib_size=use_observed_lib_size).module.eval()
    tensors, draws = batch_of(learnt()), 3
    scvi.settings.seed = 1
    values = found.marginal_ll(tensors, draws)
    scvi.settings.seed = 1
    assert found.marginal_ll(tensors, draws, return_mean=True) == pytest.approx(values.mean())
    scvi.settings.seed = 1
    prior_log_prob = Normal(0, 1).log_prob if prior == "normal" else found.components().log_prob
    terms = []
    for _ in range(draws):
        with torch.no_grad():
            outputs, generated, _ = found(
                tensors, get_inference_input_kwargs={"full_forward_pass": True}
            )
        q, z = outputs["qz"], outputs["z"]
        term = prior_log_prob(z).reshape(50, -1).sum(-1)
        term -= Normal(q.loc, q.scale).log_prob(z).sum(-1)
        term += generated["px"].log_prob(tensors["X"]).sum(-1)
        if not use_observed_lib_size:
            library = outputs["library"]
            term += generated["pl"].log_prob(library).sum(-1)
            term -= outputs["ql"].log_prob(library).sum(-1)
        terms.append(term)
    expected = torch.stack(terms).double().logsumexp(0) - math.log(draws)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-3)


def test_the_marginal_likelihood_of_several_samples_a_pass():
    found = train(model(prior="normal"))
    values = []
    for found.module.fused_likelihood in (False, True):
        scvi.settings.seed = 1
        values.append(found.get_marginal_ll(n_mc_samples=6, n_mc_samples_per_pass=3))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("truncation", [False, True])
def test_importance_weights_are_under_the_prior(truncation, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, 4, generator=generator)
    normal = torch.rand(30, generator=generator, dtype=torch.float64).numpy()
    with monkeypatch.context() as patch:
        patch.setattr(scvi.model.SCVI, "get_importance_weights", lambda self, **options: normal)
        weights = learnt().get_importance_weights(zs=z, truncation=truncation)
        plain = model(prior="normal").get_importance_weights(zs=z)
    assert plain is normal
    z = z.reshape(-1, 4)
    log_ratio = learnt().module.components().log_prob(z) - Normal(0, 1).log_prob(z).sum(-1)
    expected = normal * log_ratio.double().exp().numpy()
    if truncation:  # from below, as scvi-tools does: at the mean
        expected = np.maximum(expected, expected.sum() / 30)
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-4)
    options = {"n_samples_overall": 30, "weights": "importance", "return_numpy": True}
    options |= {"n_mc_samples": 2, "n_mc_samples_per_pass": 1}
    means = learnt().get_normalized_expression(indices=np.arange(20), **options)
    assert np.isfinite(means).all()


# --- options ---


@pytest.mark.parametrize(
    "options",
    [
        {"dispersion": "gene-batch", "gene_likelihood": "nb", "latent_distribution": "ln"},
        {"gene_likelihood": "poisson", "use_observed_lib_size": False},
        {"batch_representation": "embedding"},
        {"encode_covariates": False, "n_layers": 2},
        {"prior_kwargs": {"inference": "closed-form"}},
        {"prior_kwargs": {"pseudo_inputs_per_component": 2, "weights": "stick-breaking"}},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_a_step_with_options_of_scvi(options):
    found = model(setup=COVARIATES, **options)
    found._start_pseudo_cells()
    number = 12 * options.get("prior_kwargs", {}).get("pseudo_inputs_per_component", 1)
    assert len(found.module.components().centers) == number
    loss = found.module(batch_of(found))[2]
    loss.loss.backward()
    assert loss.loss.isfinite() and loss.kl_local["kl_divergence_z"].shape == (50,)
    prior = found.module.prior
    assert all(p.grad is not None for p in found.module.z_encoder.parameters())
    assert all(p.grad is None for p in prior.parameters())
    # Pseudo-cells move by their own step alone.
    cells = prior.pseudo_inputs
    before = [p.clone() for p in (cells.raw_counts, *cells.category_logits)]
    found.module.update_prior()
    after = (cells.raw_counts, *cells.category_logits)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert found.module.prior_learnt
    assert found.module._latest is None  # the batch's graph is not kept
    found.is_trained = True
    found.module.eval()
    assert np.isfinite(float(found.get_elbo()))
    # Components are of q's mean, of which the latent of "ln" is the softmax.
    means, _ = found.get_latent_representation(return_dist=True)
    labels = found.module.components().assign(torch.from_numpy(means)).labels
    np.testing.assert_array_equal(found.get_components(), labels)
    for library_size in (1, "latent"):
        expression = found.get_component_expression(n_samples=2, library_size=library_size)
        assert expression.shape == (12, 40) and np.isfinite(expression).all(axis=None)
    if found.module.use_observed_lib_size:
        assert expression.sum(axis=1).mean() > 10  # counts
    if options.get("latent_distribution") == "ln":
        assert not np.allclose(means, found.get_latent_representation())
        with pytest.raises(NotImplementedError, match="latent_distribution='normal' alone"):
            found.get_marginal_ll(n_mc_samples=3)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"prior must be one of .*, but is 'none'"):
        model(prior="none")
    with pytest.raises(ValueError, match="n_components must be an integer of at least 1"):
        model(n_components=0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"prior_warmup must be in \[0, 1\), but is"):
            train(model(), plan_kwargs={"prior_warmup": share})
    with pytest.raises(ValueError, match="prior_warmup must be 0 where training has no last step"):
        train(model(), -1, max_time={"seconds": 1})
    found = model(separated_cells(20), n_components=30)
    with pytest.raises(ValueError, match=r"at most the number of cells, 20, .* but is 30"):
        train(found)


# --- pseudo-cells and new batches ---


def test_pseudo_counts_of_large_cells_are_finite():
    pseudo_cells = PseudoCells(2, 3, [2])
    counts = torch.tensor([[0.0, 1.0, 1e6], [3.0, 1e-3, 200.0]])
    pseudo_cells.start_from(counts, [torch.tensor([0, 1])])
    found = pseudo_cells().log_counts
    torch.testing.assert_close(found, counts.log1p(), rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert pseudo_cells.raw_counts.grad.isfinite().all()


def test_cells_must_have_the_model_s_genes_in_its_order(tmp_path):
    found = learnt()
    cells = found.adata[:20].copy()
    clusters, z = found.get_clusters(cells), found.get_latent_representation(cells)
    other = cells[:, ::-1].copy()
    for give in (found.get_clusters, found.get_latent_representation, found.get_cluster_entropy):
        with pytest.raises(ValueError, match=r"genes in its order, but has another order; give"):
            give(other)
    again = other[:, found.get_var_names()].copy()
    np.testing.assert_array_equal(found.get_clusters(again), clusters)
    np.testing.assert_array_equal(found.get_latent_representation(again), z)
    found.save(tmp_path / "model")
    without_cells = VMMSCVI.load(tmp_path / "model", adata=False, accelerator="cpu")
    with pytest.raises(ValueError, match="model's genes in its order"):
        without_cells.get_clusters(other)
    np.testing.assert_array_equal(without_cells.get_clusters(cells), clusters)
    with pytest.raises(ValueError, match=r"model's \d+ genes, but lacks 2: .*, .*"):
        found.get_normalized_expression(cells[:, 2:].copy())
    more = anndata.concat([cells, anndata.AnnData(cells.X[:, :1], cells.obs)], axis=1, merge="same")
    with pytest.raises(ValueError, match="in its order, but has others besides; give"):
        found.get_clusters(more)


def test_minified_data():
    found = train(model())
    latents = found.get_latent_representation()
    qzm, qzv = found.get_latent_representation(give_mean=False, return_dist=True)
    found.adata.obsm["X_latent_qzm"], found.adata.obsm["X_latent_qzv"] = qzm, qzv
    labels = found.get_clusters()
    found.minify_adata(use_latent_qzm_key="X_latent_qzm", use_latent_qzv_key="X_latent_qzv")
    np.testing.assert_allclose(found.get_latent_representation(), latents)
    np.testing.assert_array_equal(found.get_clusters(), labels)
    for of_counts in (found.get_novelty, found.get_marker_genes):
        with pytest.raises(ValueError, match="does not support minified data"):
            of_counts()


# --- optimizers ---


def test_the_network_s_optimizer_does_not_see_the_prior():
    found = model()
    groups = found._training_plan_cls(found.module).configure_optimizers()["optimizer"].param_groups
    seen = {id(p) for group in groups for p in group["params"]}
    prior = list(found.module.prior.parameters())
    assert not seen.intersection(id(p) for p in prior)
    assert all(p.requires_grad for p in prior)
    assert len(seen) + len(prior) == len(list(found.module.parameters()))
    # At the network's rate components that nobody needs would not go empty.
    assert found.module.prior.options.learning_rate == 5 * groups[0]["lr"]


def test_adam_takes_its_step_in_one_pass():
    foreach = {"optimizer_creator": lambda p: torch.optim.Adam(p, foreach=True)}
    for options, fused in (
        ({}, True),
        ({"optimizer": "AdamW"}, True),
        ({"optimizer": "Custom", "optimizer_creator": torch.optim.SGD}, None),
        ({"optimizer": "Custom", **foreach}, None),
    ):
        plan = EmpiricalBayesTrainingPlan(learnt().module, **options)
        optimizer = plan.configure_optimizers()["optimizer"]
        assert optimizer.param_groups[0].get("fused") is fused


def test_processes_share_the_network_s_running_statistics_before_the_prior_moves(monkeypatch):
    """The prior's own come from sums over the processes."""
    found, calls = model(prior_kwargs={"inference": "closed-form"}), []
    monkeypatch.setattr(latent_prior, "average_over_processes", lambda x: calls.append(list(x)))
    train(found, batch_size=54, train_size=0.9, **AT_ONCE)
    buffers = dict(found.module.named_buffers())
    running = [x for name, x in buffers.items() if "running_" in name and "prior" not in name]
    assert len(running) >= 4 and "prior.running_N" in buffers
    assert len(calls) == 4
    for averaged in calls:
        assert {id(x) for x in averaged} == {id(x) for x in running}


# --- Lightning ---


def test_metrics_are_logged_once_an_epoch_and_as_if_in_every_step(monkeypatch):
    plan = EmpiricalBayesTrainingPlan(model().module)
    with pytest.warns(UserWarning, match="trainer"):
        plan.log("elbo_train", plan.elbo_train, on_step=False)
    options = {"check_val_every_n_epoch": 1, "logger": None, **AT_ONCE}
    history = train(model(), 3, **options).history
    monkeypatch.delattr(EmpiricalBayes, "log")
    expected = train(model(), 3, **options).history
    assert history.keys() == expected.keys() >= {"elbo_train", "elbo_validation", "kl_local_train"}
    assert len(history["elbo_train"]) == len(history["elbo_validation"]) == 3
    for name, values in expected.items():
        np.testing.assert_array_equal(history[name], values, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 1.0, "early_stopping": True, "check_val_every_n_epoch": 1},
        {"plan_kwargs": {"n_epochs_kl_warmup": 2, "reduce_lr_on_plateau": True}, "logger": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_lightning(options):
    found = train(model(), 2, **options)
    assert np.isfinite(found.get_latent_representation()).all()
    assert all(p.isfinite().all() for p in found.module.parameters())


def test_training_leaves_no_graph_behind(monkeypatch):
    def fail(*args):
        raise RuntimeError("between the steps")

    monkeypatch.setattr(EmpiricalBayes, "_update_prior", fail)
    found = model()
    with pytest.raises(RuntimeError, match="between the steps"):
        train(found, **AT_ONCE)
    copy.deepcopy(found.module)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_prior_s_optimizer_goes_on_from_a_checkpoint(tmp_path, accumulate):
    options = {"batch_size": 54, "accumulate_grad_batches": accumulate, "train_size": 0.9}
    keep = ModelCheckpoint(tmp_path, filename="last")
    first = train(model(), 2, callbacks=[keep], enable_checkpointing=True, **options, **AT_ONCE)
    per_epoch = 4 // accumulate  # 216 cells are 4 batches
    assert prior_steps(first) == 2 * per_epoch
    second = train(model(seed=1), 3, ckpt_path=tmp_path / "last.ckpt", **options, **AT_ONCE)
    assert second.trainer.current_epoch == 3
    assert prior_steps(second) == 3 * per_epoch


# --- warm-up ---


def test_in_the_warmup_the_loss_is_that_of_the_standard_normal():
    found, plain = model(), model(prior="normal")
    network = plain.module.state_dict().keys()
    state = found.module.state_dict()
    plain.module.load_state_dict({name: state[name] for name in network})
    found.module.warming_up = True
    assert torch.equal(loss_of(found), loss_of(plain))


@pytest.mark.parametrize(("epochs", "share"), [(5, 0.1), (1, 0.9)])
def test_the_prior_warms_up_as_the_standard_normal(epochs, share):
    found = model()
    found._start_pseudo_cells()
    start, warm = {}, []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
            assert plan.kl_weight == 1.0  # from the start
            warm.append(plan.module.warming_up)
            if plan.module.warming_up:
                for name, value in plan.module.prior.named_parameters():
                    assert torch.equal(start.setdefault(name, value.detach().clone()), value)

    train(found, epochs, callbacks=[Watch()], plan_kwargs={"prior_warmup": share})
    expected = int(share * len(warm))
    assert warm == [True] * expected + [False] * (len(warm) - expected)
    assert prior_steps(found) == len(warm) - expected
    assert not found.module.warming_up


def test_an_interrupted_warmup_leaves_the_prior_in_place():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, plan, *rest):
            assert plan.module.warming_up
            raise RuntimeError("stopped")

    found = model()
    with pytest.raises(RuntimeError, match="stopped"):
        train(found, 4, callbacks=[Stop()])
    assert not found.module.warming_up


def test_a_prior_that_has_been_learnt_does_not_warm_up_again(tmp_path):
    found = train(model(), 2)
    steps, per_epoch = prior_steps(found), found.trainer.num_training_batches
    assert steps < 2 * per_epoch
    found.save(tmp_path / "model")
    loaded = VMMSCVI.load(tmp_path / "model", found.adata, accelerator="cpu")
    for again in (found, loaded):
        train(again, 2)
    assert prior_steps(found) == steps + 2 * per_epoch
    assert prior_steps(loaded) == 2 * per_epoch  # of a new optimizer


def test_early_stopping_waits_for_the_end_of_the_warmup():
    stop = {"early_stopping": True, "early_stopping_patience": 1, "check_val_every_n_epoch": 1}
    # No loss is ever so much better than the last one: it would stop in the second epoch.
    stop["early_stopping_min_delta"] = 1e6
    found = train(model(), 8, **stop)
    assert found.trainer.current_epoch == 4 + 2
    assert prior_steps(found) == 2 * found.trainer.num_training_batches


def test_the_warmup_does_not_count_for_what_follows_the_loss(tmp_path):
    class Better(Callback):
        """Make every loss of the warm-up better than those after it."""

        def on_validation_epoch_end(self, trainer, plan):
            loss = trainer.current_epoch - 1000.0 * plan.module.warming_up
            plan.log("steered_validation", loss)
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates, found = [], model()
    keep = SaveCheckpoint(str(tmp_path), monitor="steered_validation")
    plateau = {"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_factor": 0.1}
    train(
        found,
        8,
        callbacks=[Better(), keep],
        enable_checkpointing=True,
        check_val_every_n_epoch=1,
        plan_kwargs={**plateau, "lr_scheduler_metric": "steered_validation"},
        logger=True,
    )
    assert keep.best_model_score == 4
    assert VMMSCVI.load(keep.best_model_path, found.adata, accelerator="cpu").module.prior_learnt
    # Losses rise by 1 an epoch: in the warm-up that costs nothing, after it every rise but the
    # first, which has nothing to be compared with.
    assert rates[:6] == [1e-3] * 6
    assert rates[6] == pytest.approx(1e-4)


def test_the_best_checkpoint_is_there_where_none_follows_the_warmup(tmp_path):
    keep = SaveCheckpoint(str(tmp_path), monitor="elbo_validation", load_best_on_end=True)
    options = {"callbacks": [keep], "enable_checkpointing": True, "check_val_every_n_epoch": 4}
    with pytest.warns(UserWarning, match="the prior has not been trained"):
        train(model(), 5, plan_kwargs={"prior_warmup": 0.9}, **options)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_at_the_end_of_the_warmup_brings_no_loss_with_it(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.best = []

        def on_train_batch_end(self, trainer, plan, *rest):
            (stopping,) = (c for c in trainer.callbacks if isinstance(c, EarlyStopping))
            self.best.append(float(stopping.best_score))

    seen = []
    for resumed in (None, tmp_path / "epoch=1.ckpt"):
        watch = Watch()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        options = {"callbacks": [watch, keep], "enable_checkpointing": True}
        options |= {"early_stopping": True, "check_val_every_n_epoch": 1}
        found = train(model(), 4, ckpt_path=resumed, **options)
        seen.append(watch.best[-found.trainer.num_training_batches * 2 :])
    assert seen[1][0] == math.inf
    assert math.isfinite(seen[1][-1])
    assert [math.isfinite(x) for x in seen[1]] == [math.isfinite(x) for x in seen[0]]
