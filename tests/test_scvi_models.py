"""The mixture prior in other models of scvi-tools: each next to its stock model."""

import numpy as np
import pandas as pd
import pytest
import torch

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from test_scvi import TRAIN, batch_of, cells, prior_steps, trained  # noqa: E402

from vmm_fast.scvi import VMMPEAKVI, VMMSCANVI, VMMTOTALVI  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def logs(tmp_path):
    scvi.settings.logging_dir = tmp_path


def some_labels(adata=None):
    """Cells of which every other one has its label."""
    adata = cells() if adata is None else adata
    labels = adata.obs["cluster"].to_numpy(object, copy=True)
    labels[::2] = "Unknown"
    adata.obs["label"] = labels
    return adata


def open_regions():
    adata = cells()
    adata.X = (adata.X > 3).astype(np.float32)
    return adata


def with_proteins():
    adata = cells()
    random = np.random.default_rng(1)
    rates = random.gamma(2.0, 10.0, (4, 6))
    adata.obsm["protein"] = random.poisson(rates[adata.obs["cluster"].astype(int)])
    return adata


LABELS = {"labels_key": "label", "unlabeled_category": "Unknown"}
MODELS = {
    "SCANVI": (VMMSCANVI, scvi.model.SCANVI, some_labels, LABELS),
    "PEAKVI": (VMMPEAKVI, scvi.model.PEAKVI, open_regions, {}),
    "TOTALVI": (
        VMMTOTALVI,
        scvi.model.TOTALVI,
        with_proteins,
        {"protein_expression_obsm_key": "protein"},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(cls, adata, setup, **options):
    cls.setup_anndata(adata, batch_key="batch", **setup)
    scvi.settings.seed = 0
    return cls(adata, n_latent=4, n_hidden=32, **options)


def train_options(name):
    """TOTALVI watches its learning rate, for which Lightning wants a logger."""
    return {**TRAIN, "logger": name == "TOTALVI"}


def made_and_trained(name, epochs=2, **options):
    ours, _, data, setup = MODELS[name]
    found = made(ours, data(), setup, n_components=12, **options)
    found.train(epochs, batch_size=64, **train_options(name))
    return found


@every_model
def test_the_normal_prior_is_the_stock_model(name):
    ours, stock, data, setup = MODELS[name]
    adata, losses = data(), []
    own = {"prior": "normal"} | ({"fused_likelihood": False} if name == "SCANVI" else {})
    for cls, options in ((ours, own), (stock, {"encode_covariates": True})):
        found = made(cls, adata, setup, **options)
        tensors = batch_of(found)
        loss_kwargs = {"kl_weight": 0.7}
        if name == "SCANVI":
            loss_kwargs |= {"labelled_tensors": tensors, "classification_ratio": 50}
            tensors["labels"] = tensors["labels"].clamp(max=found.n_labels - 1)
        scvi.settings.seed = 1
        losses.append(found.module(tensors, loss_kwargs=loss_kwargs)[2].loss)
    assert losses[0] == losses[1]


@every_model
def test_the_loss_is_a_bound_under_the_prior(name):
    found = made_and_trained(name)
    tensors = batch_of(found)
    outputs, generated, loss = found.module(tensors, loss_kwargs={"kl_weight": 0.5})
    q, z = outputs["qz"], outputs["z"]
    kl = -q.entropy().sum(-1) - found.module.components().log_prob(z)
    reconstruction = sum(loss.reconstruction_loss.values())
    if name == "TOTALVI":
        np.testing.assert_allclose(loss.kl_local["kl_div_z"].detach(), kl.detach(), atol=1e-3)
        return
    np.testing.assert_allclose(
        sum(loss.kl_local.values()).detach(), kl.detach(), rtol=1e-4, atol=1e-3
    )
    if name == "SCANVI":
        likelihood = -generated["px"].log_prob(tensors["X"]).sum(-1)
        np.testing.assert_allclose(reconstruction.detach(), likelihood.detach(), rtol=1e-5)
    total = (reconstruction + 0.5 * kl).mean()
    np.testing.assert_allclose(loss.loss.item(), total.item(), rtol=1e-5)


@every_model
@pytest.mark.parametrize("prior", ["vmm", "gmm"])
def test_trains_clusters_and_loads(tmp_path, name, prior):
    found = made_and_trained(name, prior=prior)
    probabilities = found.get_cluster_probabilities()
    assert probabilities.shape == (240, 12)
    np.testing.assert_array_equal(found.get_clusters(), probabilities.argmax(1))
    assert np.isfinite(found.get_elbo())
    if name == "SCANVI":
        assert found.get_marginal_ll(n_mc_samples=3) > found.get_elbo() - 1
    if name == "TOTALVI":
        with pytest.raises(NotImplementedError, match="prior='normal' alone"):
            found.get_marginal_ll()
    found.save(tmp_path / "model", save_anndata=True)
    loaded = type(found).load(tmp_path / "model", accelerator="cpu")
    latents = found.get_latent_representation()
    np.testing.assert_array_equal(loaded.get_latent_representation(), latents)
    np.testing.assert_array_equal(loaded.get_cluster_probabilities(), probabilities)


@every_model
def test_the_prior_moves_once_a_batch_after_the_warmup(name):
    ours, _, data, setup = MODELS[name]
    found = made(ours, data(), setup, n_components=12)
    options = {"adversarial_classifier": True} if name == "TOTALVI" else {}
    options |= {"batch_size": 54, "train_size": 0.9, **train_options(name)}
    found.train(10, plan_kwargs={"prior_warmup": 0.1}, **options)
    assert prior_steps(found) == 9 * 4  # 216 cells are 4 batches


@every_model
def test_pseudo_cells_start_as_cells(name):
    ours, _, data, setup = MODELS[name]
    found = made(ours, data(), setup, n_components=12)
    found._start_pseudo_cells()
    tensors = next(iter(found._make_data_loader(found.adata, batch_size=240)))
    counts = found.module.features(tensors).numpy()
    start = found.module.prior.pseudo_inputs().log_counts.expm1().detach().numpy()
    assert np.abs(counts[:, None] - start).max(-1).min(0).max() < 1e-3


def test_pseudo_cells_are_encoded_as_cells_are():
    """Soft memberships apart: the components' centers are the latents of the cells begun from."""
    for name, (ours, _, data, setup) in MODELS.items():
        found = made(ours, data(), setup, n_components=12, encode_covariates=False)
        found._start_pseudo_cells()
        found.module.eval()
        found.is_trained = True
        latents, _ = found.get_latent_representation(return_dist=True)
        centers = found.module.components().centers.numpy()
        distance = np.abs(latents[:, None] - centers).max(-1)
        assert distance.min(0).max() < 1e-4, name


# --- labels ---


def test_labels_of_some_cells_predict_the_others_and_guide_clusters():
    found = made_and_trained("SCANVI", 20)
    cluster = found.adata.obs["cluster"].to_numpy()
    assert (found.predict()[::2] == cluster[::2]).mean() > 0.9
    clusters = found.get_clusters()
    purity = sum(
        np.unique(cluster[clusters == c], return_counts=True)[1].max() for c in {*clusters}
    )
    assert purity / len(cluster) > 0.9


@pytest.mark.parametrize("batch_representation", ["one-hot", "embedding"])
def test_labels_after_integration(batch_representation):
    adata = some_labels()
    first = trained(2, adata=adata, batch_representation=batch_representation)
    second = VMMSCANVI.from_scvi_model(first, "Unknown", labels_key="label")
    np.testing.assert_array_equal(
        second.module.components().centers, first.module.components().centers
    )
    second.train(1, batch_size=64, **TRAIN)
    assert set(second.predict()) <= {"0", "1", "2", "3"}


def test_labels_after_stock_scvi():
    adata = some_labels()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    stock = scvi.model.SCVI(adata, n_hidden=32, n_latent=4)
    stock.train(1, batch_size=64, **TRAIN)
    found = VMMSCANVI.from_scvi_model(stock, "Unknown", labels_key="label", n_components=12)
    stock.module.eval(), found.module.eval()
    found.is_trained = True
    np.testing.assert_array_equal(
        found.get_latent_representation(), stock.get_latent_representation(adata)
    )
    found.train(1, batch_size=64, **TRAIN)
    assert found.get_clusters().max() < 12


def test_query_cells_of_a_new_batch_without_labels(tmp_path):
    adata = some_labels(cells(300, batches=3))
    new = adata.obs["batch"] == "batch 2"
    query, reference = adata[new].copy(), adata[~new].copy()
    found = made(VMMSCANVI, reference, LABELS, n_components=12)
    found.train(2, batch_size=64, **TRAIN)
    found.save(tmp_path / "model")
    query.obs["label"] = "Unknown"
    mapped = VMMSCANVI.load_query_data(query, str(tmp_path / "model"), accelerator="cpu")
    mapped.train(1, batch_size=64, plan_kwargs={"weight_decay": 0.0}, **TRAIN)
    assert len(mapped.predict()) == len(mapped.get_clusters()) == query.n_obs
    np.testing.assert_allclose(
        mapped.module.components().centers, found.module.components().centers, atol=1e-3
    )


# --- expression of components ---


def test_component_expression_is_that_of_its_cells():
    found = trained(30)
    clusters = found.get_clusters()
    largest = np.bincount(clusters).argmax()
    mean = found.get_component_expression(pd.Index([largest, 3]), n_samples=50)
    assert mean.shape == (2, 40)
    assert list(mean.index) == [largest, 3]
    np.testing.assert_allclose(mean.sum(1), 1, rtol=1e-4)
    cells_of_it = found.get_normalized_expression(indices=np.flatnonzero(clusters == largest))
    others = found.get_normalized_expression(indices=np.flatnonzero(clusters != largest))
    found_there = np.corrcoef(mean.loc[largest], cells_of_it.mean(0))[0, 1]
    assert found_there > 0.95
    assert found_there > np.corrcoef(mean.loc[largest], others.mean(0))[0, 1]


def test_samples_of_components():
    found = trained(1)
    genes = list(found.adata.var_names[[3, 1]])
    options = {"gene_list": genes, "n_samples": 7, "components": [2, 0, 5]}
    samples = found.get_component_expression(return_mean=False, batch_size=4, **options)
    assert samples.shape == (7, 3, 2)
    scvi.settings.seed = 1
    mean = found.get_component_expression(**options)
    scvi.settings.seed = 1
    scaled = found.get_component_expression(library_size=1e4, **options)
    np.testing.assert_allclose(scaled, 1e4 * mean, rtol=1e-5)
    assert list(mean.columns) == [g for g in found.adata.var_names if g in genes]
    decoded = []
    for batch in ("batch 0", "batch 1", ["batch 0", "batch 1"]):
        scvi.settings.seed = 1
        decoded.append(found.get_component_expression(transform_batch=batch, **options))
    np.testing.assert_allclose((decoded[0] + decoded[1]) / 2, decoded[2], rtol=1e-5)
    assert not np.allclose(decoded[0], decoded[1], rtol=1e-3)
    with pytest.raises(ValueError, match="not a valid batch"):
        found.get_component_expression(transform_batch="batch 7")
    with pytest.raises(ValueError, match=r"component must be in 0 .. 11"):
        found.get_component_expression([12])


@pytest.mark.parametrize(
    "options",
    [
        {"dispersion": "gene-batch", "gene_likelihood": "nb", "latent_distribution": "ln"},
        {"gene_likelihood": "poisson", "use_observed_lib_size": False},
        {"batch_representation": "embedding"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_decoder(options):
    covariates = {
        "categorical_covariate_keys": ["donor"],
        "continuous_covariate_keys": ["age"],
        "labels_key": "cluster",
    }
    found = trained(1, setup=covariates, **options)
    for library_size in (1, "latent"):
        mean = found.get_component_expression(n_samples=2, library_size=library_size)
        assert mean.shape == (12, 40)
        assert np.isfinite(mean).all(axis=None)
    if found.module.use_observed_lib_size:
        assert mean.sum(1).mean() > 10  # counts


def test_softmax_latents_are_assigned_where_components_are():
    found = trained(2, latent_distribution="ln")
    means, _ = found.get_latent_representation(return_dist=True)
    labels = found.module.components().assign(torch.from_numpy(means)).labels
    np.testing.assert_array_equal(found.get_clusters(), labels)
