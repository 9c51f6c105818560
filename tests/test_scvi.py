"""scVI with a mixture prior, next to stock scVI."""

import copy
import math
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from anndata import AnnData  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402

from vmm_fast.counts import SoftmaxMean  # noqa: E402
from vmm_fast.scvi import VMMSCVI, module  # noqa: E402
from vmm_fast.scvi.pseudo_cells import PseudoCells  # noqa: E402
from vmm_fast.scvi.training import (  # noqa: E402
    EmpiricalBayes,
    EmpiricalBayesTrainingPlan,
)

pytestmark = pytest.mark.filterwarnings("ignore")

TRAIN = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


@pytest.fixture(autouse=True)
def logs(tmp_path):
    scvi.settings.logging_dir = tmp_path


def cells(number=240, genes=40, clusters=4, batches=2, seed=0):
    """Counts of well-separated clusters, in batches that scale every gene by its own factor."""
    random = np.random.default_rng(seed)
    cluster, batch = random.integers(clusters, size=number), random.integers(batches, size=number)
    rates = random.gamma(0.5, 4.0, (clusters, genes)) + 0.1
    factors = random.lognormal(0, 0.3, (batches, genes))
    depth = random.lognormal(0, 0.3, (number, 1))
    counts = random.poisson(rates[cluster] * factors[batch] * depth).astype(np.float32)
    adata = AnnData(csr_matrix(counts))
    adata.obs["batch"] = [f"batch {b}" for b in batch]
    adata.obs["cluster"] = cluster.astype(str)
    adata.obs["donor"] = [f"donor {d}" for d in random.integers(3, size=number)]
    adata.obs["age"] = random.normal(size=number)
    return adata


def model(adata=None, setup=None, seed=0, **options):
    adata = cells() if adata is None else adata
    VMMSCVI.setup_anndata(adata, **{"batch_key": "batch", **(setup or {})})
    scvi.settings.seed = seed
    options = {"n_components": 12, "n_hidden": 32, "n_latent": 4, **options}
    return VMMSCVI(adata, **options)


def trained(epochs=3, train=None, **options):
    found = model(**options)
    found.train(epochs, batch_size=64, **{**TRAIN, **(train or {})})
    return found


def batch_of(found):
    loader = found._make_data_loader(found.adata, batch_size=50)
    return next(iter(loader))


@pytest.mark.parametrize("encode_covariates", [False, True])
def test_the_normal_prior_is_stock_scvi(encode_covariates):
    adata = cells()
    options = {"encode_covariates": encode_covariates, "fused_likelihood": False}
    ours = model(adata, prior="normal", **options)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    stock = scvi.model.SCVI(adata, n_hidden=32, n_latent=4, encode_covariates=encode_covariates)
    losses = []
    for found in (ours, stock):
        scvi.settings.seed = 1
        _, _, loss = found.module(batch_of(found), loss_kwargs={"kl_weight": 0.7})
        losses.append(loss.loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "normal"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize("for_loss", [False, True])
@pytest.mark.parametrize("use_observed_lib_size", [False, True])
def test_the_fused_likelihood_is_scvi_s(
    likelihood, dispersion, for_loss, use_observed_lib_size, monkeypatch
):
    calls = []

    def counted(name):
        function = getattr(module, f"{name}_log_prob")

        def call(x, mean, *rest):
            calls.append((name, isinstance(mean, SoftmaxMean)))
            return function(x, mean, *rest)

        monkeypatch.setattr(module, f"{name}_log_prob", call)

    for name in ("zinb", "nb", "poisson"):
        counted(name)
    losses, slopes = [], []
    for fused in (False, True):
        options = {
            "gene_likelihood": likelihood,
            "dispersion": dispersion,
            "use_observed_lib_size": use_observed_lib_size,
        }
        found = model(prior="normal", fused_likelihood=fused, **options)
        scvi.settings.seed = 1
        with found.module.decoding_for_loss() if for_loss else nullcontext():
            loss = found.module(batch_of(found), loss_kwargs={"kl_weight": 0.7})[2].loss
        loss.backward()
        losses.append(loss.detach())
        slopes.append([p.grad for p in found.module.parameters() if p.grad is not None])
    # In a training step the likelihood takes the softmax of the mean, too.
    assert calls == ([] if likelihood == "normal" else [(likelihood, for_loss)])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for a, b in zip(*slopes, strict=True):
        # A bias before batch normalisation has a gradient of nothing but rounding errors.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-5)


def test_the_marginal_likelihood_of_several_samples_a_pass():
    found = trained(prior="normal")
    values = []
    for found.module.fused_likelihood in (False, True):
        scvi.settings.seed = 1
        values.append(found.get_marginal_ll(n_mc_samples=6, n_mc_samples_per_pass=3))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_what_is_decoded_outside_of_a_step_is_scvi_s():
    """Also in training mode, after a step, of several samples, and for another loss than ours."""
    found = model(prior="normal")
    tensors = batch_of(found)
    with found.module.decoding_for_loss():
        found.module(tensors)
    scvi.settings.seed = 1
    _, decoded, _ = found.module(tensors)
    scvi.settings.seed = 1
    found.module.fused_likelihood = False
    _, expected, _ = found.module(tensors)
    for name in ("mu", "scale", "theta", "zi_logits"):
        assert torch.equal(getattr(decoded["px"], name), getattr(expected["px"], name))
    found.module.fused_likelihood = True
    with found.module.decoding_for_loss():
        samples = found.module(tensors, inference_kwargs={"n_samples": 2})[1]["px"]
    torch.testing.assert_close(samples.scale.sum(-1), torch.ones(samples.scale.shape[:-1]))

    class WithAnotherLoss(module.VMMVAE):
        def loss(self, tensors, inference_outputs, generative_outputs, kl_weight=1.0):
            scale = generative_outputs["px"].scale.sum(-1)
            torch.testing.assert_close(scale, torch.ones(len(scale)))
            return super().loss(tensors, inference_outputs, generative_outputs, kl_weight)

    found.module.__class__ = WithAnotherLoss
    found.train(1, batch_size=64, **TRAIN)


def test_size_factors_have_no_softmax():
    adata = cells()
    adata.obs["size"] = 1.0 + np.arange(adata.n_obs)
    VMMSCVI.setup_anndata(adata, batch_key="batch", size_factor_key="size")
    losses = []
    for fused in (False, True):
        sized = VMMSCVI(adata, prior="normal", n_latent=4, fused_likelihood=fused)
        sized.module.load_state_dict(losses[0][1] if losses else sized.module.state_dict())
        scvi.settings.seed = 1
        with sized.module.decoding_for_loss():
            loss = sized.module(batch_of(sized))[2].loss
        losses.append((loss, sized.module.state_dict()))
    torch.testing.assert_close(losses[0][0], losses[1][0])


def test_training_leaves_no_graph_behind(monkeypatch):
    found = model()

    def fail(*args):
        raise RuntimeError("between the steps")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="between the steps"):
        patch.setattr(EmpiricalBayes, "_update_prior", fail)
        found.train(1, batch_size=64, **TRAIN, plan_kwargs={"prior_warmup": 0})
    copy.deepcopy(found.module)


def test_metrics_are_logged_without_a_trainer():
    plan = EmpiricalBayesTrainingPlan(model().module)
    with pytest.warns(UserWarning, match="trainer"):
        plan.log("elbo_train", plan.elbo_train, on_step=False)


def test_the_history_is_that_of_metrics_logged_in_every_step(monkeypatch):
    train = {"check_val_every_n_epoch": 1, "plan_kwargs": {"prior_warmup": 0}, "logger": None}
    history = trained(train=train).history
    monkeypatch.delattr(EmpiricalBayes, "log")
    expected = trained(train=train).history
    assert history.keys() == expected.keys() >= {"elbo_train", "elbo_validation", "kl_local_train"}
    assert len(history["elbo_train"]) == len(history["elbo_validation"]) == 3
    for name, values in expected.items():
        np.testing.assert_array_equal(history[name], values, err_msg=name)


def test_the_loss_is_scvi_s_with_the_prior_s_divergence():
    found = trained()
    found.module.eval()
    tensors = batch_of(found)
    scvi.settings.seed = 1
    with torch.no_grad():
        outputs, _, loss = found.module(tensors, loss_kwargs={"kl_weight": 0.5})
        q, z = outputs["qz"], outputs["z"]
        components = found.module.components()
        kl = q.log_prob(z).sum(-1) - components.log_prob(z)
        # -H(q) in place of log q(z): the same in expectation
        kl += -q.entropy().sum(-1) - q.log_prob(z).sum(-1)
        torch.testing.assert_close(loss.kl_local["kl_divergence_z"], kl, rtol=1e-4, atol=1e-4)
        total = (loss.reconstruction_loss["reconstruction_loss"] + 0.5 * kl).mean()
    torch.testing.assert_close(loss.loss, total, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("prior", ["vmm", "gmm", "vamp"])
def test_clusters(prior):
    found = trained(prior=prior)
    probabilities = found.get_cluster_probabilities()
    assert probabilities.shape == (240, 12)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    labels = found.get_clusters()
    np.testing.assert_array_equal(labels, probabilities.argmax(1))
    entropy = -(probabilities * np.log(probabilities + 1e-30)).sum(1)
    np.testing.assert_allclose(found.get_cluster_entropy(), entropy, atol=1e-4)
    np.testing.assert_array_equal(found.get_clusters(indices=[3, 5]), labels[[3, 5]])


def test_the_normal_prior_has_no_clusters():
    with pytest.raises(ValueError, match="prior must be 'vmm', 'gmm' or 'vamp' for clusters"):
        trained(prior="normal").get_clusters()


@pytest.mark.parametrize(
    "options",
    [
        {"dispersion": "gene-batch"},
        {"gene_likelihood": "nb"},
        {"gene_likelihood": "poisson"},
        {"use_observed_lib_size": False},
        {"batch_representation": "embedding"},
        {"encode_covariates": False},
        {"latent_distribution": "ln"},
        {"n_layers": 2},
        {"prior_kwargs": {"inference": "closed-form"}},
        {"prior_kwargs": {"pseudo_inputs_per_component": 2, "weights": "stick-breaking"}},
        {"prior_kwargs": {"reuse_encoding": True}},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_of_scvi(options):
    covariates = {
        "categorical_covariate_keys": ["donor"],
        "continuous_covariate_keys": ["age"],
        "labels_key": "cluster",
    }
    found = trained(1, setup=covariates, **options)
    assert np.isfinite(found.get_elbo())
    assert np.isfinite(found.get_latent_representation()).all()
    assert found.get_clusters().shape == (240,)
    if options.get("latent_distribution") == "ln":
        with pytest.raises(NotImplementedError, match="latent_distribution='normal' alone"):
            found.get_marginal_ll(n_mc_samples=3)
    else:
        assert np.isfinite(found.get_marginal_ll(n_mc_samples=3))


def test_pseudo_cells_start_as_cells_and_move():
    found = model()
    assert not found.module.prior.pseudo_inputs.started
    found._start_pseudo_cells()
    pseudo_cells = found.module.prior.pseudo_inputs
    start = pseudo_cells()
    counts = found.adata.X.toarray()
    distance = np.abs(counts[:, None] - start.log_counts.expm1().detach().numpy()).max(-1)
    nearest = distance.argmin(0)
    assert distance.min(0).max() < 1e-3
    batches = found.adata.obs["batch"].astype("category").cat.codes.to_numpy()
    (membership,) = start.categories
    np.testing.assert_array_equal(membership.argmax(1), batches[nearest])
    assert membership.max() < 0.96
    found.train(1, batch_size=64, **TRAIN)
    for before, after in zip(start[:1], pseudo_cells()[:1], strict=True):
        assert not torch.equal(before, after)


def test_pseudo_counts_of_large_cells_are_finite():
    pseudo_cells = PseudoCells(2, 3, [2])
    counts = torch.tensor([[0.0, 1.0, 1e6], [3.0, 1e-3, 200.0]])
    pseudo_cells.start_from(counts, [torch.tensor([0, 1])])
    found = pseudo_cells().log_counts
    torch.testing.assert_close(found, counts.log1p(), rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert pseudo_cells.raw_counts.grad.isfinite().all()


def test_more_pseudo_cells_than_cells():
    found = model(cells(20), n_components=30)
    with pytest.raises(ValueError, match=r"at most the number of cells, 20, .* but is 30"):
        found.train(1, **TRAIN)


def test_the_network_s_optimizer_does_not_see_the_prior():
    found = trained(1)
    plan = found._training_plan_cls(found.module)
    seen = {
        id(p)
        for group in plan.configure_optimizers()["optimizer"].param_groups
        for p in group["params"]
    }
    prior = list(found.module.prior.parameters())
    assert not seen.intersection(id(p) for p in prior)
    assert all(p.requires_grad for p in prior)
    assert len(seen) + len(prior) == len(list(found.module.parameters()))


def test_adam_takes_its_step_in_one_pass():
    found = model()
    for options, fused in (
        ({}, True),
        ({"optimizer": "AdamW"}, True),
        ({"optimizer": "Custom", "optimizer_creator": torch.optim.SGD}, None),
        (
            {
                "optimizer": "Custom",
                "optimizer_creator": lambda p: torch.optim.Adam(p, foreach=True),
            },
            None,
        ),
    ):
        plan = found._training_plan_cls(found.module, **options)
        optimizer = plan.configure_optimizers()["optimizer"]
        assert optimizer.param_groups[0].get("fused") is fused


@pytest.mark.parametrize("reuse", [False, True])
def test_pseudo_cells_move_by_their_own_step_alone(reuse):
    found = model(prior_kwargs={"reuse_encoding": reuse})
    found._start_pseudo_cells()
    found.module(batch_of(found), loss_kwargs={"kl_weight": 1.0})[2].loss.backward()
    cells = found.module.prior.pseudo_inputs
    assert all(p.grad is None for p in cells.parameters())
    assert all(p.grad is not None for p in found.module.z_encoder.parameters())
    before = [p.clone() for p in (cells.raw_counts, *cells.category_logits)]
    found.module.update_prior()
    after = (cells.raw_counts, *cells.category_logits)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_prior_moves_once_an_optimizer_step(monkeypatch):
    found = model()
    calls = []
    update = found.module.update_prior
    monkeypatch.setattr(found.module, "update_prior", lambda: (calls.append(1), update()))
    found.train(2, batch_size=54, accumulate_grad_batches=2, train_size=0.9, **TRAIN)
    assert len(calls) == 4  # 216 cells are 4 batches, 2 steps an epoch


# --- files ---


@pytest.mark.parametrize("prior", ["vmm", "gmm", "vamp", "normal"])
def test_a_loaded_model_gives_the_same(tmp_path, prior):
    found = trained(prior=prior)
    found.save(tmp_path / "model", save_anndata=True)
    loaded = VMMSCVI.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), found.get_latent_representation()
    )
    if prior != "normal":
        np.testing.assert_array_equal(
            loaded.get_cluster_probabilities(), found.get_cluster_probabilities()
        )
    loaded.train(1, batch_size=64, **TRAIN)


SAME = {"atol": 1e-3, "rtol": 0}  # but for a share of e^-10 in the new batch


def test_query_cells_of_a_new_batch_leave_the_clusters_alone(tmp_path):
    adata = cells(400, batches=3)
    query = adata[adata.obs["batch"] == "batch 2"].copy()
    reference = adata[adata.obs["batch"] != "batch 2"].copy()
    found = trained(20, adata=reference)
    found.save(tmp_path / "model")
    mapped = VMMSCVI.load_query_data(query, str(tmp_path / "model"), accelerator="cpu")
    before = found.module.components()
    torch.testing.assert_close(mapped.module.components().centers, before.centers, **SAME)
    mapped.train(5, batch_size=64, plan_kwargs={"weight_decay": 0.0}, **TRAIN)
    assert mapped.get_clusters().shape == (query.n_obs,)
    after = mapped.module.components()
    torch.testing.assert_close(after.centers, before.centers, **SAME)
    for name in ("logits", "raw_precision"):
        assert torch.equal(getattr(mapped.module.prior, name), getattr(found.module.prior, name))


@pytest.mark.parametrize("representation", ["one-hot", "embedding"])
def test_new_batches_and_categories_leave_weights_with_their_own(representation):
    adata = cells(400, batches=4)
    adata.obs["donor"] = np.where(adata.obs["batch"] == "batch 3", "donor 3", adata.obs["donor"])
    new = adata.obs["batch"].isin(["batch 2", "batch 3"])
    reference, query = adata[~new].copy(), adata[new].copy()
    setup = {"categorical_covariate_keys": ["donor", "cluster"]}
    found = trained(adata=reference, setup=setup, batch_representation=representation)
    mapped = VMMSCVI.load_query_data(query, found, accelerator="cpu")
    before, after = found.module.components(), mapped.module.components()
    torch.testing.assert_close(after.centers, before.centers, **SAME)
    mapped.is_trained_ = True
    for give in ("get_latent_representation", "get_normalized_expression"):
        given = []
        for each in (mapped, found):
            scvi.settings.seed = 0
            given.append(getattr(each, give)(reference))
        np.testing.assert_allclose(*given, rtol=1e-3, atol=1e-5)


def test_minified_data():
    found = trained()
    latents = found.get_latent_representation()
    qzm, qzv = found.get_latent_representation(give_mean=False, return_dist=True)
    found.adata.obsm["X_latent_qzm"], found.adata.obsm["X_latent_qzv"] = qzm, qzv
    labels = found.get_clusters()
    found.minify_adata(use_latent_qzm_key="X_latent_qzm", use_latent_qzv_key="X_latent_qzv")
    np.testing.assert_allclose(found.get_latent_representation(), latents)
    np.testing.assert_array_equal(found.get_clusters(), labels)


# --- Lightning ---


def test_training_goes_on_from_a_checkpoint(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    first = model()
    keep = ModelCheckpoint(tmp_path, filename="last")
    at_once = {"batch_size": 64, "plan_kwargs": {"prior_warmup": 0.0}, **TRAIN}
    first.train(2, callbacks=[keep], enable_checkpointing=True, **at_once)
    steps = prior_steps(first)
    second = model(seed=1)
    second.train(5, ckpt_path=tmp_path / "last.ckpt", **at_once)
    assert second.trainer.current_epoch == 5
    assert prior_steps(second) == steps / 2 * 5


def test_accumulated_gradients_go_on_from_a_checkpoint(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    first, second = model(), model(seed=1)
    keep = ModelCheckpoint(tmp_path, filename="last")
    options = {"batch_size": 54, "accumulate_grad_batches": 2, **TRAIN}
    options |= {"train_size": 0.9, "plan_kwargs": {"prior_warmup": 0.0}}
    first.train(2, callbacks=[keep], enable_checkpointing=True, **options)
    assert prior_steps(first) == 2 * 2  # 216 cells are 4 batches
    second.train(3, ckpt_path=tmp_path / "last.ckpt", **options)
    assert prior_steps(second) == 3 * 2


def test_a_checkpoint_amid_an_epoch_has_the_step_of_network_and_prior(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    states = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, plan, *rest):
            state = plan.module.state_dict()
            states[trainer.global_step] = {k: v.clone() for k, v in state.items()}

    found = model()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    found.train(
        2,
        batch_size=64,
        callbacks=[keep, Watch()],
        enable_checkpointing=True,
        plan_kwargs={"prior_warmup": 0.0},
        **TRAIN,
    )
    written = list(tmp_path.glob("*.ckpt"))
    assert len(written) == 2 * found.trainer.num_training_batches
    for path in written:
        checkpoint = torch.load(path, weights_only=False)
        if checkpoint["global_step"] in states:  # after the last step there is none
            for name, value in states[checkpoint["global_step"]].items():
                assert torch.equal(checkpoint["state_dict"][f"module.{name}"], value), name
            assert checkpoint["prior_optimizer"]["state"][0]["step"] == checkpoint["global_step"]


def test_an_interrupted_warmup_leaves_the_prior_in_place():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, plan, *rest):
            assert plan.module.warming_up
            raise RuntimeError("stopped")

    found = model()
    with pytest.raises(RuntimeError, match="stopped"):
        found.train(4, batch_size=64, callbacks=[Stop()], **TRAIN)
    assert not found.module.warming_up


def test_importance_weights_are_under_the_prior():
    found = trained(4)
    calls = []
    plain = scvi.model.SCVI.get_importance_weights

    def keep(self, *arguments, **options):
        calls.append((options["zs"], plain(self, *arguments, **options)))
        return calls[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        for kind in scvi.model.SCVI.__mro__:
            if "get_importance_weights" in vars(kind) and kind.__module__.startswith("scvi."):
                patch.setattr(kind, "get_importance_weights", keep)
        ours = []
        mixed = type(found).get_importance_weights
        patch.setattr(
            VMMSCVI,
            "get_importance_weights",
            lambda self, *a, **k: ours.append(mixed(self, *a, **k)) or ours[-1],
        )
        found.get_normalized_expression(
            indices=np.arange(20),
            n_samples_overall=30,
            weights="importance",
            return_numpy=True,
            n_mc_samples=2,
            n_mc_samples_per_pass=1,
        )
    (zs, normal), (weights,) = calls[0], ours
    z = zs.reshape(-1, zs.shape[-1])
    under_prior = found.module.components().log_prob(z)
    under_normal = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
    expected = normal * (under_prior - under_normal).double().exp().numpy()
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-3, atol=1e-7)


def prior_steps(found):
    state = found.module.prior.get_extra_state()["state"]
    return int(state[0]["step"]) if state else 0


@pytest.mark.parametrize(("epochs", "share"), [(4, 0.5), (1, 0.5), (5, 0.1), (2, 0.0), (1, 0.9)])
def test_the_prior_warms_up_as_the_standard_normal(epochs, share):
    found = model()
    start = {}
    found._start_pseudo_cells()
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
            losses.append(plan.module.warming_up)
            if plan.module.warming_up:
                for name, value in plan.module.prior.named_parameters():
                    assert torch.equal(start.setdefault(name, value.detach().clone()), value)

    plan = {"prior_warmup": share}
    found.train(epochs, batch_size=64, callbacks=[Watch()], plan_kwargs=plan, **TRAIN)
    expected = int(share * len(losses))
    assert losses == [True] * expected + [False] * (len(losses) - expected)
    assert prior_steps(found) == len(losses) - expected
    assert not found.module.warming_up


def test_early_stopping_waits_for_the_end_of_the_warmup():
    stop = {"early_stopping": True, "early_stopping_patience": 1, "check_val_every_n_epoch": 1}
    # No loss is ever so much better than the last one: it would stop in the second epoch.
    stop["early_stopping_min_delta"] = 1e6
    found = trained(8, train=stop)
    assert found.trainer.current_epoch == 4 + 2
    assert prior_steps(found) == 2 * found.trainer.num_training_batches


def test_the_warmup_does_not_count_for_what_follows_the_loss(tmp_path):
    from scvi.train import SaveCheckpoint

    class Better(Callback):
        """Make every loss of the warm-up a better one than those after it."""

        def on_validation_epoch_end(self, trainer, plan):
            loss = trainer.current_epoch - 1000.0 * plan.module.warming_up
            plan.log("steered_validation", loss)
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = []
    found = model()
    keep = SaveCheckpoint(str(tmp_path), monitor="steered_validation")
    found.train(
        8,
        batch_size=64,
        callbacks=[Better(), keep],
        enable_checkpointing=True,
        check_val_every_n_epoch=1,
        plan_kwargs={
            "reduce_lr_on_plateau": True,
            "lr_patience": 0,
            "lr_factor": 0.1,
            "lr_scheduler_metric": "steered_validation",
        },
        **{**TRAIN, "logger": True},
    )
    assert keep.best_model_score == 4
    assert VMMSCVI.load(keep.best_model_path, found.adata, accelerator="cpu").module.prior_learnt
    # Losses rise by 1 an epoch: in the warm-up that costs nothing, after it every rise but the
    # first, which has nothing to be compared with.
    assert rates[:6] == [1e-3] * 6
    assert rates[6] == pytest.approx(1e-4)


def test_the_best_checkpoint_is_there_where_none_follows_the_warmup(tmp_path):
    from scvi.train import SaveCheckpoint

    found = model()
    keep = SaveCheckpoint(str(tmp_path), monitor="elbo_validation", load_best_on_end=True)
    options = {"callbacks": [keep], "enable_checkpointing": True, "check_val_every_n_epoch": 4}
    with pytest.warns(UserWarning, match="the prior has not been trained"):
        found.train(5, batch_size=64, plan_kwargs={"prior_warmup": 0.9}, **options, **TRAIN)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_at_the_end_of_the_warmup_brings_no_loss_with_it(tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Watch(Callback):
        def __init__(self):
            self.best = []

        def on_train_batch_end(self, trainer, plan, *rest):
            (stopping,) = (c for c in trainer.callbacks if isinstance(c, EarlyStopping))
            self.best.append(float(stopping.best_score))

    seen = []
    options = {"early_stopping": True, "check_val_every_n_epoch": 1, **TRAIN}
    for resumed in (None, tmp_path / "epoch=1.ckpt"):
        watch = Watch()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        more = {"callbacks": [watch, keep], "enable_checkpointing": True}
        found = model()
        found.train(4, batch_size=64, ckpt_path=resumed, **more, **options)
        seen.append(watch.best[-found.trainer.num_training_batches * 2 :])
    assert seen[1][0] == math.inf
    assert math.isfinite(seen[1][-1])
    assert [math.isfinite(x) for x in seen[1]] == [math.isfinite(x) for x in seen[0]]


def test_a_prior_that_has_not_been_trained_is_told():
    with pytest.warns(UserWarning, match="the prior has not been trained"):
        trained(10_000, train={"max_time": {"seconds": 1}})
    with pytest.raises(ValueError, match="prior_warmup must be 0 where training has no last step"):
        trained(-1, train={"max_time": {"seconds": 1}})


def test_the_share_of_the_warmup_is_checked():
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="prior_warmup must be in"):
            trained(1, train={"plan_kwargs": {"prior_warmup": share}})


def test_a_prior_that_has_been_learnt_does_not_warm_up_again(tmp_path):
    found = trained(2)
    steps = prior_steps(found)
    found.save(tmp_path / "model")
    loaded = VMMSCVI.load(tmp_path / "model", found.adata, accelerator="cpu")
    for again in (found, loaded):
        again.train(2, batch_size=64, **TRAIN)
    per_epoch = found.trainer.num_training_batches
    assert steps < 2 * per_epoch
    # A loaded model's private optimizer is a new one.
    assert prior_steps(loaded) == 2 * per_epoch


def test_in_the_warmup_the_loss_is_that_of_the_standard_normal():
    found, plain = model(), model(prior="normal")
    plain.module.load_state_dict(
        {k: v for k, v in found.module.state_dict().items() if not k.startswith("prior")}
    )
    found.module.warming_up = True
    losses = []
    for each in (found, plain):
        tensors = next(iter(each._make_data_loader(each.adata, batch_size=64)))
        torch.manual_seed(0)
        losses.append(each.module(tensors)[2].loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "train",
    [
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 1.0},
        {"early_stopping": True, "check_val_every_n_epoch": 1},
        {"plan_kwargs": {"n_epochs_kl_warmup": 2, "reduce_lr_on_plateau": True}, "logger": True},
    ],
    ids=lambda train: next(iter(train)),
)
def test_options_of_lightning(train):
    found = trained(2, train=train)
    assert np.isfinite(found.get_latent_representation()).all()
    assert all(p.isfinite().all() for p in found.module.parameters())


TWO_PROCESSES = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_scvi import TRAIN, model
found = model()
found.train(2, batch_size=32, devices=2, strategy="ddp_find_unused_parameters_true", **TRAIN)
rank = os.environ.get("LOCAL_RANK", "0")
torch.save(found.module.state_dict(), f"{sys.argv[2]}/rank{rank}.pt")
"""


def test_two_processes_have_one_prior(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script, os.path.dirname(__file__), tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    start = model().module.state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert not torch.equal(first["prior.raw_precision"], start["prior.raw_precision"])
