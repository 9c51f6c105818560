"""The mixture prior in scVI and other models of scvi-tools: each next to its stock model."""

import math
import os
import random
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from support import (
    TRAIN,
    batch_of,
    complaint,
    prior_steps,
    scvi_model,
    separated_cells,
    written,
)
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from anndata import AnnData  # noqa: E402
from lightning import LightningDataModule  # noqa: E402

from vmm_fast import Components, cli  # noqa: E402
from vmm_fast.cells.assignment import find_model  # noqa: E402
from vmm_fast.clusters import find_clusters  # noqa: E402
from vmm_fast.scvi import VMMCYTOVI, VMMPEAKVI, VMMSCANVI, VMMSCVI, VMMTOTALVI  # noqa: E402
from vmm_fast.scvi.saved import check_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def logs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scvi.settings, "logging_dir", tmp_path_factory.mktemp("logs"))
        yield


def some_labels(adata=None):
    """Return cells of which every other one has its label."""
    adata = separated_cells() if adata is None else adata
    labels = adata.obs["cluster"].to_numpy(object, copy=True)
    labels[::2] = "Unknown"
    adata.obs["label"] = labels
    return adata


def open_regions():
    adata = separated_cells()
    adata.X = (adata.X > 3).astype(np.float32)
    return adata


def intensities():
    """Return transformed and scaled values, which are no counts."""
    adata = separated_cells()
    x = np.arcsinh(adata.X.toarray())
    adata.X = (x / x.max(0)).astype(np.float32)
    return adata


def with_proteins():
    adata = separated_cells()
    random = np.random.default_rng(1)
    rates = random.gamma(2.0, 10.0, (4, 6))
    adata.obsm["protein"] = random.poisson(rates[adata.obs["cluster"].astype(int)])
    return adata


LABELS = {"labels_key": "label", "unlabeled_category": "Unknown"}
PROTEINS = {"protein_expression_obsm_key": "protein"}
MODELS = {
    "SCVI": (VMMSCVI, scvi.model.SCVI, separated_cells, {}),
    "SCANVI": (VMMSCANVI, scvi.model.SCANVI, some_labels, LABELS),
    "PEAKVI": (VMMPEAKVI, scvi.model.PEAKVI, open_regions, {}),
    "TOTALVI": (VMMTOTALVI, scvi.model.TOTALVI, with_proteins, PROTEINS),
    "CYTOVI": (VMMCYTOVI, scvi.external.CYTOVI, intensities, {}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name, setup=None, **options):
    ours, _, data, own = MODELS[name]
    return scvi_model(ours, data(), {**own, **(setup or {})}, n_components=12, **options)


def train(model, epochs=1, **options):
    # TOTALVI watches its learning rate, for which Lightning wants a logger.
    logger = isinstance(model, VMMTOTALVI)
    model.train(epochs, **{**TRAIN, "logger": logger, **options})
    return model


@cache
def learnt(name, prior="vmm", epochs=2):
    """Return a trained model, which no test may change."""
    return train(made(name, prior=prior), epochs)


# --- every model ---


@pytest.mark.parametrize(
    ("name", "encode_covariates"), [*((name, True) for name in MODELS), ("SCVI", False)]
)
def test_the_normal_prior_is_the_stock_model(name, encode_covariates):
    ours, stock, data, setup = MODELS[name]
    adata, losses = data(), []
    own = {"prior": "normal"}
    if name in ("SCVI", "SCANVI"):
        own["fused_likelihood"] = False
    others = {"prior_mixture": False} if name == "CYTOVI" else {}
    for kind, options in ((ours, own), (stock, others)):
        model = scvi_model(kind, adata, setup, encode_covariates=encode_covariates, **options)
        tensors, loss_kwargs = batch_of(model), {"kl_weight": 0.7}
        if name == "SCANVI":
            loss_kwargs |= {"labelled_tensors": tensors, "classification_ratio": 50}
            tensors["labels"] = tensors["labels"].clamp(max=model.n_labels - 1)
        scvi.settings.seed = 1
        losses.append(model.module(tensors, loss_kwargs=loss_kwargs)[2].loss)
    assert losses[0] == losses[1]


def log_prior(components, z):
    """Return log p(z) of the mixture from torch.distributions."""
    covariance = components.precision_cholesky
    if covariance is not None:
        covariance = torch.cholesky_inverse(covariance)
    if components.scale is not None:
        scale = components.scale
        scale = scale if scale.ndim == 3 else torch.diag_embed(scale)
        covariance = scale @ scale.mT + (0 if covariance is None else covariance)
    each = MultivariateNormal(components.centers, covariance).log_prob(z[:, None])
    return (each + components.log_weights).logsumexp(-1)


@every_model
def test_the_loss_is_a_bound_under_the_prior(name):
    module, tensors = learnt(name).module, batch_of(learnt(name))
    loss_kwargs = {"kl_weight": 0.5}
    if name == "SCANVI":
        tensors["labels"] = tensors["labels"].clamp(max=3)
        loss_kwargs |= {"labelled_tensors": tensors, "classification_ratio": 50}
    module.eval()
    with torch.no_grad():
        outputs, generated, loss = module(tensors, loss_kwargs=loss_kwargs)
        q, z = outputs["qz"], outputs["z"]
        # -H(q) in place of log q(z): the same in expectation
        kl = -q.entropy().sum(-1) - log_prior(module.components(), z)
    kls = loss.kl_local
    found = kls["kl_div_z"] if name == "TOTALVI" else sum(kls.values())
    torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-3)
    if name == "TOTALVI":  # it weighs two divergences more
        return
    reconstruction = sum(loss.reconstruction_loss.values())
    if name != "PEAKVI":
        likelihood = -generated["px"].log_prob(tensors["X"]).sum(-1)
        torch.testing.assert_close(reconstruction, likelihood, rtol=1e-5, atol=1e-4)
    total = (reconstruction + 0.5 * kl).mean()
    if name == "SCANVI":
        logits = module.classifier(q.loc)
        total += 50 * cross_entropy(logits, tensors["labels"].flatten())
    torch.testing.assert_close(loss.loss, total, rtol=1e-5, atol=1e-4)


PRIORS = [*((name, "vmm") for name in MODELS), ("SCANVI", "gmm"), ("SCVI", "vamp")]


@pytest.mark.parametrize(("name", "prior"), PRIORS)
def test_clusters_are_groups_of_components(name, prior):
    model = learnt(name, prior)
    means = torch.from_numpy(model.get_latent_representation())
    expected = find_clusters(model.module.components(), means)
    shared = model.get_component_probabilities()
    responsibilities = model.module.components().responsibilities(means)
    np.testing.assert_allclose(shared, responsibilities, rtol=1e-5, atol=1e-7)
    assert shared.shape == (240, 12)
    np.testing.assert_array_equal(model.get_components(), shared.argmax(1))
    most = {"n_clusters": len(model.get_cluster_tree().leaves)}
    finest = find_clusters(expected.components, means, **most)
    for cut, clusters in (({}, expected), (most, finest)):
        probabilities = model.get_cluster_probabilities(**cut)
        np.testing.assert_allclose(
            probabilities, clusters.probabilities(means), rtol=1e-5, atol=1e-7
        )
        labels = model.get_clusters(**cut)
        np.testing.assert_array_equal(labels, probabilities.argmax(1))
        entropy = -(probabilities * np.log(probabilities + 1e-30)).sum(1)
        np.testing.assert_allclose(model.get_cluster_entropy(**cut), entropy, atol=1e-4)
        np.testing.assert_array_equal(model.get_clusters(indices=[3, 5], **cut), labels[[3, 5]])
    assert math.isfinite(model.get_elbo())
    if name == "TOTALVI":
        with pytest.raises(NotImplementedError, match="prior='normal' alone"):
            model.get_marginal_ll()
    if name == "SCANVI":
        assert model.get_marginal_ll(n_mc_samples=3) > model.get_elbo() - 1


@pytest.mark.parametrize(("name", "prior"), [*PRIORS, ("SCVI", "normal")])
def test_a_loaded_model_gives_the_same(tmp_path, name, prior):
    model = learnt(name, prior)
    model.save(tmp_path / "model", save_anndata=True)
    loaded = type(model).load(tmp_path / "model", accelerator="cpu")
    latents = model.get_latent_representation()
    np.testing.assert_array_equal(loaded.get_latent_representation(), latents)
    if prior != "normal":
        for cut in ({}, {"n_clusters": len(model.get_cluster_tree().leaves)}):
            probabilities = model.get_cluster_probabilities(**cut)
            np.testing.assert_array_equal(loaded.get_cluster_probabilities(**cut), probabilities)
        assert loaded.module.prior_learnt and prior_steps(loaded) == 0
    else:
        with pytest.raises(ValueError, match="prior must be 'vmm', 'gmm' or 'vamp' for clusters"):
            model.get_clusters()
    train(loaded)


def test_a_model_is_shared_by_scvi_hub(tmp_path):
    hub = pytest.importorskip("scvi.hub", exc_type=ImportError, reason="scvi-hub is not installed")
    from huggingface_hub import ModelCard

    model, path = learnt("SCVI", "vmm"), str(tmp_path / "model")
    model.save(path, save_anndata=True)
    metadata = hub.HubMetadata.from_dir(path, "0.12", model_parent_module="vmm_fast.scvi")
    hub.HubModel(path, None, metadata, ModelCard("# Cells")).save()
    shared = hub.HubModel(path).model
    latents = model.get_latent_representation()
    np.testing.assert_array_equal(shared.get_latent_representation(), latents)
    np.testing.assert_array_equal(shared.get_clusters(), model.get_clusters())


class MakesFolder:
    """An object that makes a folder when pickle reads it, as malicious code in a file might."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


def test_a_saved_model_runs_nothing_as_it_is_read(tmp_path, capsys):
    model, ran = learnt("SCVI"), tmp_path / "ran"
    model.save(tmp_path, save_anndata=True, overwrite=True)
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    saved["attr_dict"]["note"] = MakesFolder(ran)
    torch.save(saved, tmp_path / "model.pt")
    for load in (
        lambda: VMMSCVI.load(tmp_path),
        lambda: VMMSCVI.load_query_data(model.adata, str(tmp_path)),
        lambda: VMMSCVI.load_registry(str(tmp_path)),
        lambda: VMMSCVI.prepare_query_anndata(model.adata, str(tmp_path)),
        lambda: find_model(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"tensors and tables alone, but holds os\.makedirs"):
            load()
        assert not ran.exists()
    VMMSCVI.load(tmp_path, accelerator="cpu", trust=True)
    ran.rmdir()
    assert VMMSCVI.load_registry(str(tmp_path), trust=True)["model_name"] == "VMMSCVI"
    ran.rmdir()
    capsys.readouterr()
    cells = written(tmp_path, model.adata)
    command = ["assign", str(tmp_path), str(cells), "--out", str(tmp_path / "out.h5ad")]
    error = complaint(capsys, cli.main(command))
    assert "if you made it yourself, load it with --trust\n" in error and not ran.exists()
    assert cli.main([*command, "--trust"]) == 0 and ran.exists()


def test_every_flipped_bit_of_a_saved_model_is_found(tmp_path):
    model, rng, path = learnt("SCVI"), random.Random(0), tmp_path / "model.pt"
    model.save(tmp_path, save_anndata=True, overwrite=True)
    whole, harmless = path.read_bytes(), 0
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            check_model(path)
        except ValueError as error:
            assert "is damaged" in str(error)
        else:  # padding
            harmless += 1
            loaded = VMMSCVI.load(tmp_path, accelerator="cpu").module.state_dict()
            assert str(loaded) == str(model.module.state_dict())
    assert harmless < 10


def test_a_model_that_was_saved_before_there_were_clusters(tmp_path):
    model = learnt("SCVI")
    model.save(tmp_path / "model", save_anndata=True)
    path = tmp_path / "model" / "model.pt"
    saved = torch.load(path, weights_only=False)
    for name in model.module.no_clusters():
        del saved["model_state_dict"][name]
    torch.save(saved, path)
    loaded = VMMSCVI.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_components(), model.get_components())
    with pytest.raises(ValueError, match="call find_clusters\\(\\) with the cells"):
        loaded.get_clusters()
    loaded.find_clusters()
    np.testing.assert_array_equal(loaded.get_clusters(), model.get_clusters())
    finest = {"n_clusters": len(model.get_cluster_tree().leaves)}
    loaded.find_clusters(**finest)
    np.testing.assert_array_equal(loaded.get_clusters(), model.get_clusters(**finest))


def test_a_model_whose_components_move_has_no_clusters_until_it_is_trained(monkeypatch):
    trained = learnt("SCVI")
    assert trained.module.cluster_points.isfinite().all(1).sum() == 240

    def stopped(*args, **kwargs):
        raise RuntimeError("stopped")

    monkeypatch.setattr(VMMSCVI._training_plan_cls, "on_train_epoch_end", stopped)
    model = made("SCVI")
    model.module.load_state_dict(trained.module.state_dict())
    assert model.module.tree is not None
    with pytest.raises(RuntimeError, match="stopped"):
        train(model)
    model.is_trained_ = True
    with pytest.raises(ValueError, match="call find_clusters"):
        model.get_clusters()


def test_clusters_encode_the_pseudo_cells_once(monkeypatch):
    model, calls = learnt("SCVI"), []
    encode = type(model.module).encode
    monkeypatch.setattr(
        model.module, "encode", lambda x: calls.append(x) or encode(model.module, x)
    )
    model.get_clusters()
    assert len(calls) == 1


def test_external_indices_count_the_cells_that_are_trained_on():
    indices = [np.arange(100), np.arange(100, 240), np.arange(0)]
    model = train(made("SCVI"), datasplitter_kwargs={"external_indexing": indices})
    assert model.module.prior.data_size == 100


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 216),
        ({"prior_kwargs": {"data_size": 7}}, 7),
        ({"prior_kwargs": {"data_size": None}}, None),
    ],
)
def test_parameter_priors_weigh_as_for_all_cells_that_are_trained_on(options, size):
    assert train(made("SCVI", **options)).module.prior.data_size == size


def test_a_weight_that_the_user_sets_is_kept():
    model = made("SCVI")
    model.module.prior.data_size = 50
    assert train(model).module.prior.data_size == 50
    model = train(made("SCVI"))
    for number in (100, 120):  # counted again in each training
        cells = [np.arange(number), np.arange(number, 240), np.arange(0)]
        train(model, datasplitter_kwargs={"external_indexing": cells})
        assert model.module.prior.data_size == number
    model.module.prior.data_size = None
    assert train(model).module.prior.data_size is None


def test_cytovi_s_own_mixture_is_left_out():
    summary = learnt("CYTOVI")._model_summary_string
    assert "MoG prior: False," in summary and "Prior: vmm" in summary
    with pytest.raises(ValueError, match=r"prior_mixture must be False, but is True: .*'gmm'"):
        made("CYTOVI", prior_mixture=True)


@every_model
def test_the_prior_moves_once_a_batch_after_the_warmup(name):
    options = {"adversarial_classifier": True} if name == "TOTALVI" else {}
    options |= {"batch_size": 54, "train_size": 0.9, "plan_kwargs": {"prior_warmup": 0.25}}
    # 216 cells are 4 batches
    assert prior_steps(train(made(name), 4, **options)) == 3 * 4


@every_model
def test_pseudo_cells_start_as_cells(name):
    model = made(name)
    assert not model.module.prior.pseudo_inputs.started
    model._start_pseudo_cells()
    assert model.module.prior.pseudo_inputs.started
    tensors = batch_of(model, 240)
    start = model.module.prior.pseudo_inputs()
    counts = start.log_counts.expm1().detach()
    distance = (model.module.features(tensors)[:, None] - counts).abs().amax(-1)
    assert distance.amin(0).max() < 1e-3
    batches = tensors["batch"].flatten()[distance.argmin(0)]
    membership = start.categories[0].detach()
    # 0.9 to its own of the two, and the rest spread over both
    torch.testing.assert_close(membership, 0.05 + 0.9 * torch.eye(2)[batches])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in MODELS),
        *((name, {"batch_representation": "embedding"}) for name in ("SCVI", "SCANVI")),
        ("SCVI", {"encode_covariates": False}),
        ("SCVI", {"log_variational": False}),
    ],
)
def test_pseudo_cells_are_encoded_as_cells_are(name, options):
    """Also by batch, donor and age: centers are the latents of the cells that they start from."""
    covariates = {"continuous_covariate_keys": ["age"], "categorical_covariate_keys": ["donor"]}
    model = made(name, covariates, **options)
    model._start_pseudo_cells()
    with torch.no_grad():
        for logits in model.module.prior.pseudo_inputs.category_logits:
            logits *= 1e3  # from a share of 0.9 to all
    model.module.eval()
    model.is_trained = True
    latents, _ = model.get_latent_representation(return_dist=True)
    centers = model.module.components().centers.numpy()
    distance = np.abs(latents[:, None] - centers).max(-1)
    assert distance.min(0).max() < 1e-4


def test_pseudo_cells_of_totalvi_are_over_their_mean_by_modality():
    """Also where a count is a little below 0, and so its share of a small mean below -1."""
    module = learnt("TOTALVI").module
    counts = torch.arange(46.0).expand(2, 46)
    genes, proteins = counts[:, :40] / (1 + 19.5), counts[:, 40:] / (1 + 42.5)
    expected = torch.cat([genes, proteins], -1).log1p()
    torch.testing.assert_close(module.encoder_input(counts.log1p()), expected)
    assert module.encoder_input(torch.full((2, 46), -1.0)).isfinite().all()


# --- expression of components ---


def test_component_expression_is_that_of_its_cells():
    model = learnt("SCANVI", epochs=20)
    components = model.get_components()
    largest = np.bincount(components).argmax()
    mean = model.get_component_expression(pd.Index([largest, 3]), n_samples=50)
    assert mean.shape == (2, 40)
    assert list(mean.index) == [largest, 3]
    np.testing.assert_allclose(mean.sum(axis=1), 1, rtol=1e-4)
    inside, others = (
        model.get_normalized_expression(indices=np.flatnonzero(chosen)).mean(axis=0)
        for chosen in (components == largest, components != largest)
    )
    found = np.corrcoef(mean.loc[largest], inside)[0, 1]
    assert found > 0.95
    assert found > np.corrcoef(mean.loc[largest], others)[0, 1]


def test_a_component_s_samples_are_its_own(monkeypatch):
    model = learnt("SCVI")
    dim = model.module.n_latent
    narrow = 1e4 * torch.eye(dim).expand(3, dim, dim)
    mixture = Components(20 * torch.eye(dim)[:3], torch.full((3,), -math.log(3)), narrow)
    monkeypatch.setattr(model.module, "components", lambda: mixture)
    samples = model.get_component_expression(
        np.array([0, 2])[::-1], n_samples=5, transform_batch="batch 0", return_mean=False
    )
    np.testing.assert_allclose(samples, samples[:1].repeat(5, 0), rtol=0.05)
    assert not np.allclose(samples[0, 0], samples[0, 1], rtol=0.05)


def test_samples_of_components():
    model = learnt("SCVI")
    names = model.adata.var_names
    chosen = {"n_samples": 7, "components": [2, 0, 5]}
    genes = {"gene_list": list(names[[3, 1]])}

    def expression(**options):
        scvi.settings.seed = 1
        return model.get_component_expression(**chosen, **options)

    samples = expression(return_mean=False, batch_size=4, **genes)
    assert samples.shape == (7, 3, 2)
    mean = expression(**genes)
    np.testing.assert_allclose(samples.mean(0), mean, rtol=1e-5)
    assert list(mean.columns) == list(names[[1, 3]]) and list(mean.index) == chosen["components"]
    np.testing.assert_allclose(expression()[names[[1, 3]]], mean, rtol=1e-5)
    np.testing.assert_allclose(expression(library_size=1e4, **genes), 1e4 * mean, rtol=1e-5)
    first, second, both = (
        expression(transform_batch=batch, **genes)
        for batch in ("batch 0", "batch 1", ["batch 0", "batch 1"])
    )
    np.testing.assert_allclose((first + second) / 2, both, rtol=1e-5)
    assert not np.allclose(first, second, rtol=1e-3)
    with pytest.raises(ValueError, match="not a valid batch"):
        model.get_component_expression(transform_batch="batch 7")
    with pytest.raises(ValueError, match=r"component must be in 0 .. 11"):
        model.get_component_expression([12])
    with pytest.raises(ValueError, match=r"gene_list must hold genes of the model, .* \['no'\]"):
        model.get_component_expression(gene_list=["no", names[0]])


@every_model
def test_every_model_takes_cells_with_its_genes_in_its_order_alone(name):
    model = made(name)
    cells = model.adata.copy()
    assert model._validate_anndata(cells) is cells
    with pytest.raises(ValueError, match="adata must have the model's genes in its order"):
        model._validate_anndata(cells[:, ::-1].copy())


def test_a_mudata_must_have_the_genes_and_proteins_of_the_model_in_its_order():
    mudata = pytest.importorskip("mudata", reason="mudata is not installed")
    cells = with_proteins()
    proteins = AnnData(cells.obsm["protein"].astype(np.float32), cells.obs[[]])

    def pair(genes, proteins):
        return mudata.MuData(
            {"rna": genes.copy(), "protein": proteins.copy(), "more": genes.copy()}
        )

    data = pair(cells, proteins)
    VMMTOTALVI.setup_mudata(
        data,
        rna_layer=None,
        protein_layer=None,
        modalities={"rna_layer": "rna", "protein_layer": "protein"},
    )
    model = VMMTOTALVI(data, n_components=12)
    same = pair(cells, proteins)
    same.mod["more"].var_names = same.mod["more"].var_names[::-1]
    assert model._validate_anndata(same) is same
    for other in (pair(cells[:, ::-1], proteins), pair(cells, proteins[:, ::-1])):
        with pytest.raises(ValueError, match="adata must have the model's genes in its order"):
            model._validate_anndata(other)


class CellsElsewhere(LightningDataModule):
    """Cells as data modules of scvi-tools give them: in batches, without an AnnData."""

    def __init__(self, made):
        super().__init__()
        self.n_obs, self.n_batch = made.adata.n_obs, made.summary_stats.n_batch
        self.train_dataloader = lambda: made._make_data_loader(made.adata, batch_size=64)

    def __iter__(self):
        return iter(self.train_dataloader())


def test_a_model_without_an_adata_trains_from_batches(tmp_path):
    """Embedding and clusters are those of the same weights with the same cells in memory."""
    made = scvi_model(VMMSCVI, n_components=12)
    cells = CellsElsewhere(made)
    found = VMMSCVI(registry=made.registry, n_components=12, n_latent=4, n_hidden=32)
    for prior in ("vmm", "gmm"):  # before any training
        with pytest.raises(ValueError, match=r"datamodule must be iterable.* but is None"):
            VMMSCVI(registry=made.registry, n_components=12, prior=prior).train(1, **TRAIN)
    with pytest.raises(ValueError, match="registry must be None for VMMTOTALVI, which takes none"):
        VMMTOTALVI(registry=made.registry)
    found.train(max_epochs=2, datamodule=cells, **TRAIN)
    assert found.module.prior.data_size == made.adata.n_obs
    started = found.module.prior.pseudo_inputs
    assert started.started and started().log_counts.std() > 0.1
    made.module.load_state_dict(found.module.state_dict())
    made.is_trained_ = True
    made.module.eval()
    found.save(str(tmp_path / "model"), datamodule=cells)
    loaded = VMMSCVI.load(str(tmp_path / "model"), datamodule=cells)
    with pytest.raises(ValueError, match="dataloader or adata must be given"):
        loaded.find_clusters()
    with pytest.raises(ValueError, match="indices must be None with a dataloader"):
        loaded.get_clusters(indices=[0], dataloader=cells)
    for model in (found, loaded):
        z = model.get_latent_representation(dataloader=cells)
        np.testing.assert_array_equal(z, made.get_latent_representation(batch_size=64))
        labels = model.get_clusters(dataloader=cells)
        np.testing.assert_array_equal(labels, made.get_clusters(batch_size=64))
