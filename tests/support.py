"""What several tests share: small random problems, layouts in memory, error budgets, limits."""

import contextlib
import copy
import math
import re
import resource
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vmm_fast import Components, ops, reference


@contextlib.contextmanager
def threads(count):
    """Let the core use up to this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def files_of_at_most(size):
    """Limit the size of files: Python ignores SIGXFSZ, so that writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def shifted(x, items=1):
    """Return the same values at an address that is not aligned to vectors."""
    count = x.numel() * x.element_size()
    buffer = bytearray(count + (64 + items) * x.element_size())
    start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 64
    start += items * x.element_size()
    flat = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=start)
    return flat.copy_(x.flatten()).view(x.shape)


def strided(x):
    """Return the same values, with dimensions in reverse order and gaps between items in memory."""
    reverse = tuple(range(x.ndim))[::-1]
    return x.permute(reverse).contiguous().permute(reverse).repeat_interleave(2, 0)[::2]


def expanded(x):
    """Return the first entry repeated for all others, with a stride of zero."""
    return x[:1].expand_as(x)


def negated(x):
    """Return the same values as a view of memory with the other sign, like ``y.conj().imag``."""
    view = torch._neg_view(-x.detach().contiguous())
    assert view.is_neg() and torch.equal(view, x)
    return view


def random_mixture(num, components, dim, dtype=torch.float64, seed=0, spread=2.0):
    """Return z [B, D], centers [J, D], well-conditioned whitening [J, D, D] and offsets [J]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whitening = 0.3 * normal(components, dim, dim).tril()
    whitening.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    tensors = (
        normal(num, dim) * spread,
        normal(components, dim) * spread,
        whitening,
        normal(components),
    )
    return tuple(t.to(dtype) for t in tensors)


def random_gaussians(components, centers, dim, form, dtype=torch.float64, seed=0):
    """Return log_weights [C], precision_cholesky [C, D, D] and scale of one of the FORMS."""
    generator = torch.Generator().manual_seed(seed)

    def factor(count):
        matrix = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
        matrix = (0.3 * matrix).tril()
        matrix.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
        return matrix

    log_weights = torch.randn(components, generator=generator, dtype=torch.float64).log_softmax(-1)
    precision_cholesky = factor(components) if form.startswith("precision") else None
    scale = None if form == "precision" else factor(centers)
    if form.endswith("diagonal"):
        scale = scale.diagonal(dim1=-2, dim2=-1).contiguous()
    tensors = (log_weights, precision_cholesky, scale)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def random_counts(cells, genes, seed=0, dtype=torch.float64, per_cell=False, depth=1.0):
    """Return counts, most of them 0, with mean, inverse dispersion and dropout logits."""
    random = np.random.default_rng(seed)
    mean = random.lognormal(-1, 2, (cells, genes)) * depth
    theta = random.lognormal(0, 1.5, (cells, genes) if per_cell else genes)
    x = random.poisson(random.gamma(theta, mean / theta, (cells, genes)))
    x[random.random((cells, genes)) < 0.3] = 0
    logits = random.normal(size=(cells, genes)) * 3
    return tuple(torch.tensor(a, dtype=dtype) for a in (x, mean, theta, logits))


FORMS = ["precision", "precision+full", "precision+diagonal", "full", "diagonal"]


def random_components(c=4, k=1, d=3, scale="full", precision=True, dtype=torch.float64, seed=0):
    """Components of k centers each, with a scale that is "full", "diagonal" or None."""
    form = [name for name, given in (("precision", precision), (scale, scale)) if given]
    gaussians = random_gaussians(c, c * k, d, "+".join(form), dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    centers = torch.randn(c * k, d, generator=generator, dtype=torch.float64).to(dtype)
    return Components(centers, *gaussians)


def random_scale(size, dim, full, dtype=torch.float64):
    """Return scales of posteriors: [B, D], or [B, D, D] if ``full``."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(size, dim, generator=generator, dtype=dtype) + 0.1
    if not full:
        return scale
    below = torch.randn(size, dim, dim, generator=generator, dtype=dtype).tril(-1)
    return below + torch.diag_embed(scale)


def on_backends(*names):
    """Run a test in only these backends of the fixture."""
    return pytest.mark.parametrize("backend", names, indirect=True)


def on(device, tensors, dtype=None):
    """Return the tensors on a device and in a dtype, if one is given; None stays None."""
    return tuple(x if x is None else x.to(device, dtype) for x in tensors)


def assert_no_worse(ours, eager, truth):
    """Check that our error against float64 is at most that of eager float32, plus rounding.

    All three are values by name. Eager's own largest error is a draw, which depends on the
    machine's matrix products: of few numbers it may be several times smaller than usual.
    """
    for name, true in truth.items():
        rounding = torch.finfo(ours[name].dtype).eps
        budget = 1.5 * (eager[name] - true).abs().max() + 16 * rounding * true.abs().max()
        assert (ours[name] - true).abs().max() <= budget, name


@contextlib.contextmanager
def counted_launches():
    """Collect the names of the kernels that the interpreter launches, in order."""
    from triton.runtime.interpreter import InterpretedFunction

    names, run = [], InterpretedFunction.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter copies with torch
            return run(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", counted):
        yield names


class Computations(TorchDispatchMode):
    """Collect the torch operations that would launch something on a GPU, or wait for it."""

    IDLE = ("empty", "new_empty", "view", "detach", "expand", "alias", "as_strided", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if not name.startswith(self.IDLE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def all_outputs(module, mixture, transpose=False, group=1):
    """Every output of every operation on a mixture, by name."""
    lse, expected = module.mixture_log_prob(*mixture, transpose)
    n, s, m = module.mixture_statistics(*mixture, transpose)
    label, probability, entropy = module.mixture_assign(*mixture, transpose, group)
    return {
        "lse": lse,
        "expected": expected,
        "N": n,
        "s": s,
        "M": m,
        "log_joint": module.mixture_log_joint(*mixture, transpose, group),
        "responsibilities": module.mixture_responsibilities(*mixture, transpose, group),
        "label": label,
        "probability": probability,
        "entropy": entropy,
    }


def gradients(module, mixture, transpose=False):
    """Gradients of both outputs of ``mixture_log_prob``, each point with a weight of its own."""
    inputs = [x.detach().requires_grad_() for x in mixture]  # as they lie in memory
    lse, expected = module.mixture_log_prob(*inputs, transpose)
    g = torch.linspace(-1, 2, len(lse), dtype=lse.dtype, device=lse.device)
    return torch.autograd.grad((lse * g).sum() + (expected * g.flip(0)).sum(), inputs)


def everything(module, mixture, transpose=False, group=1):
    """Every output of every operation on a mixture and every gradient, by name."""
    names = ("grad_z", "grad_centers", "grad_whitening", "grad_offsets")
    slopes = zip(names, gradients(module, mixture, transpose), strict=True)
    return all_outputs(module, mixture, transpose, group) | dict(slopes)


def composed_kl(z, centers, whitening, offsets, transpose, scale):
    """Return the estimate of ``mixture_kl``, composed of its parts."""
    lse, _ = reference.mixture_log_prob(z, centers, whitening, offsets, transpose)
    diagonal = scale if scale.ndim == 2 else scale.diagonal(dim1=-2, dim2=-1)
    entropy = torch.distributions.Normal(torch.zeros_like(diagonal), diagonal).entropy().sum(-1)
    return -entropy - lse


def kl_with_gradients(kl, inputs, transpose=False):
    """Value and gradients of an estimate by (z, centers, whitening, offsets, scale), by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = kl(*leaves[:4], transpose, leaves[4])
    weights = torch.linspace(-1, 2, len(value), dtype=value.dtype, device=value.device)
    names = ("kl", "grad_z", "grad_centers", "grad_whitening", "grad_offsets", "grad_scale")
    found = (value.detach(), *torch.autograd.grad(value @ weights, leaves))
    return dict(zip(names, found, strict=True))


def assert_all_close(found, true, tolerance):
    """Compare values by name, with a tolerance relative to the largest of each, or to 1."""
    for name, value in true.items():
        finite = value[value.isfinite()]
        largest = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
        torch.testing.assert_close(
            found[name],
            value,
            rtol=tolerance,
            atol=tolerance * largest,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_equals_reference(mixture, transpose=False, group=1, tolerance=1e-9):
    """Compare everything with the reference on the same numbers."""
    found, true = (everything(m, mixture, transpose, group) for m in (ops, reference))
    assert_all_close(found, true, tolerance)


def assert_within_budget(mixture, transpose=False):
    """Compare everything in float32 with float64, as :func:`assert_no_worse` says."""
    double = tuple(x.double() for x in mixture)
    found, eager, true = (
        everything(module, given, transpose)
        for module, given in ((ops, mixture), (reference, mixture), (reference, double))
    )
    del true["label"]  # may differ where two components are all but equal
    assert_no_worse(found, eager, true)


# --- models of scvi-tools; imported only where these are called ---

TRAIN = {
    "accelerator": "cpu",
    "batch_size": 64,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
COVARIATES = {
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
    "labels_key": "cluster",
}


def separated_cells(number=240, genes=40, clusters=4, batches=2, seed=0):
    """Counts of well-separated clusters, in batches that scale every gene by its own factor."""
    from anndata import AnnData
    from scipy.sparse import csr_matrix

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


def scvi_model(kind, adata=None, setup=None, seed=0, **options):
    """A small model of this class, which has not been trained."""
    import scvi

    adata = separated_cells() if adata is None else adata
    kind.setup_anndata(adata, **{"batch_key": "batch", **(setup or {})})
    scvi.settings.seed = seed
    return kind(adata, n_latent=4, n_hidden=32, **options)


def batch_of(model, size=50):
    """The first cells, as the model's module takes them."""
    return next(iter(model._make_data_loader(model.adata, batch_size=size)))


def prior_steps(model):
    """Return the number of steps of training that the model's prior has followed."""
    prior = model.module.prior
    private = prior.get_extra_state()
    if not private["state"]:
        return 0
    return max(int(entry["step"]) for entry in private["state"].values())


# --- commands ---


def complaint(capsys, code, expected_code=2):
    """Return the single line with which a command failed, after any lines of progress."""
    progress = r"\A((epoch|embedding|writing|drawing) .*\n)*"
    error = re.sub(progress, "", capsys.readouterr().err)
    assert code == expected_code, error
    assert error.startswith("vmm-fast: ") and error.count("\n") == 1, error
    return error


def make_cells(number=60, genes=20, batches=2, seed=0):
    """Return cells of two types, in batches."""
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    random = np.random.default_rng(seed)
    types, batch = random.integers(2, size=number), np.arange(number) % batches
    rates = np.random.default_rng(5).gamma(1.0, 4.0, (2, genes)) + 0.1
    counts = random.poisson(rates[types] * (1 + batch[:, None])).astype(np.float32)
    adata = AnnData(csr_matrix(counts))
    adata.obs_names = [f"cell {i}" for i in range(number)]
    adata.var_names = [f"gene {i}" for i in range(genes)]
    adata.obs["batch"] = [f"b{i}" for i in batch]
    adata.obs["type"] = types.astype(str)
    return adata


def written(folder, adata=None, name="cells.h5ad"):
    """Write cells, by default those of :func:`make_cells`, to an .h5ad file and return its path."""
    path = folder / name
    (make_cells() if adata is None else adata).write_h5ad(path)
    return path


# Settings of Adam that change no step, or that may be absent: versions of torch differ.
AS_GOOD = ("capturable", "decoupled_weight_decay", "foreach", "fused")


def mutations(number):
    """Return a decorator: a test with so many changed states, and, among the slow, with 500."""
    many = pytest.param(500, marks=pytest.mark.slow("500 changed states"))
    return pytest.mark.parametrize("number", [number, many])


def mutated(state, rng):
    """Return a copy in which one entry is missing or wrong, and the path of that entry."""
    state = copy.deepcopy(state)
    holder, key, path = [state], 0, []
    while isinstance(holder[key], dict | list) and holder[key] and (not path or rng.random() < 0.9):
        holder = holder[key]
        key = rng.choice(list(holder if isinstance(holder, dict) else range(len(holder))))
        path.append(key)
    old = holder[key]
    others = ["text", None, True, -1, 10**30, 0.5, math.nan, math.inf, [], {}, torch.zeros(3)]
    if isinstance(old, list | tuple):
        others += [old[1:], 2 * old]
    if isinstance(old, torch.Tensor):
        others += [old.flatten()[1:].clone(), old[None].repeat(2, *[1] * old.ndim)]
        if old.is_floating_point():
            others += [old * math.nan, old.to(torch.int32)]
    place = rng.randrange(-1, len(others))
    if place < 0 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = others[place]
    return state, path


def integrated(cells, out, *options):
    """Return the exit code of ``vmm-fast integrate``, of two epochs if no others are given."""
    from vmm_fast import cli

    command = ["integrate", cells, "--out", out, "--epochs", 2, "--accelerator", "cpu", *options]
    return cli.main([str(word) for word in command])


def assigned(model, cells, out, *options):
    """Return the exit code of ``vmm-fast assign``."""
    from vmm_fast import cli

    return cli.main([str(word) for word in ("assign", model, cells, "--out", out, *options)])


def cells_of(out):
    """Return the cells that ``vmm-fast integrate`` wrote to this folder."""
    from anndata import read_h5ad

    return read_h5ad(out / "cells.h5ad")


def model_of(out):
    """Return the model of a run of ``vmm-fast integrate``, with its cells."""
    from vmm_fast.scvi import VMMSCVI

    cells = cells_of(out)
    cells = cells[:, cells.var["vmm_gene"]].copy()
    return VMMSCVI.load(out / "model", cells, accelerator="cpu")
