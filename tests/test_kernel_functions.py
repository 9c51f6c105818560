"""Functions of one number inside the Triton kernels: of gammas, and of one count."""

import pytest
import torch
from support import on

from vmm_fast import reference

triton = pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")

# Where Triton is missing, nothing below may be imported.
import triton.language as tl  # noqa: E402

from vmm_fast.kernels import counts as count_kernels  # noqa: E402
from vmm_fast.kernels import weight_priors  # noqa: E402

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@triton.jit
def gamma_functions_kernel(x, log_gamma, psi, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(log_gamma + i, weight_priors.lgamma(value))
    tl.store(psi + i, weight_priors.digamma(value))


def test_gamma_functions(backend):
    x = torch.logspace(-8, 8, 64, dtype=torch.float64, device=backend)
    log_gamma, psi = found = [torch.empty_like(x) for _ in range(2)]
    gamma_functions_kernel[(1,)](x, *found, N=64)
    torch.testing.assert_close(log_gamma, torch.lgamma(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(psi, torch.digamma(x), rtol=1e-12, atol=1e-12)


@triton.jit
def each_count_kernel(
    x, mu, theta, logits, value, by_mu, by_theta, by_l, N: tl.constexpr, MODEL: tl.constexpr
):
    i = tl.arange(0, N)
    given = (tl.load(x + i), tl.load(mu + i), tl.load(theta + i), tl.load(logits + i))
    DTYPE: tl.constexpr = given[0].dtype
    tl.store(value + i, count_kernels.log_prob_of(*given, MODEL, DTYPE))
    first, second, third = count_kernels.slopes_of(*given, MODEL, True, DTYPE)
    tl.store(by_mu + i, first)
    tl.store(by_theta + i, second)
    tl.store(by_l + i, third)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("model", "parameters"), [("poisson", 1), ("nb", 2), ("zinb", 3)])
def test_counts_at_the_extremes(backend, model, parameters, dtype):
    grid = (
        [0, 1, 2, 5, 7, 8, 9, 17, 100, 10**6, 0.3, 2.5],
        [1e-8, 1e-3, 0.3, 50.0, 1e6],
        [1e-6, 1e-2, 0.7, 1e3, 1e6],
        [-30.0, -3.0, 0.0, 20.0],
    )
    inputs = torch.cartesian_prod(*(torch.tensor(x, dtype=dtype) for x in grid))
    inputs = on(backend, [x.contiguous() for x in torch.cat([inputs, inputs[:848]]).T])
    found, *slopes = outputs = [torch.empty_like(inputs[0]) for _ in range(4)]
    each_count_kernel[(1,)](*inputs, *outputs, N=2048, MODEL=model)
    x, *given = (column.double()[:, None] for column in inputs)
    leaves = [p.requires_grad_() for p in given[:parameters]]
    true = reference.count_log_prob(x, *leaves)
    expected = torch.autograd.grad(true.sum(), leaves)
    single = dtype == torch.float32
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if single else {"rtol": 1e-9, "atol": 1e-8}
    torch.testing.assert_close(found.double(), true.detach(), **tolerance)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if single else {"rtol": 1e-8, "atol": 3e-8}
    scales = (*(p.detach() for p in given[:2]), torch.ones_like(x))
    for p, a, b in zip(scales, slopes, expected, strict=False):
        # As of log mu and log theta; the reference loses digits where theta is large.
        torch.testing.assert_close(a.double()[:, None] * p, b * p, **tolerance)
