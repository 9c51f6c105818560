"""Two processes take the same empirical-Bayes steps, and those of one process on all points."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributions import Normal

from vmm_fast import VMMPrior

D, COMPONENTS, POINTS = 2, 4, 60


def train(z, inference):
    """Steps on standing points with a standing encoder; the state afterwards."""
    torch.manual_seed(0)
    weight = torch.randn(3, D, dtype=torch.float64)
    start = torch.randn(COMPONENTS, 3, dtype=torch.float64)
    prior = VMMPrior(start, D, inference=inference, data_size=POINTS)

    def encoder(x):
        return Normal(x @ weight, torch.full((len(x), D), 0.3, dtype=torch.float64))

    for _ in range(5):
        prior.update(z, encoder)
    prior.fit(z, encoder, max_iterations=2)
    return {name: p.detach() for name, p in prior.named_parameters()}


def worker(rank, folder, inference):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.set_num_threads(1)
    z = torch.load(f"{folder}/z.pt").chunk(2)[rank]
    torch.save(train(z, inference), f"{folder}/{rank}.pt")
    # gloo's threads abort a process whose peer has left before it.
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_two_processes(tmp_path, inference):
    torch.manual_seed(1)
    z = 2 * torch.randn(POINTS, D, dtype=torch.float64)
    torch.save(z, tmp_path / "z.pt")
    multiprocessing.spawn(worker, (str(tmp_path), inference), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = train(z, inference)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, alone[name], rtol=1e-10, atol=1e-10)
