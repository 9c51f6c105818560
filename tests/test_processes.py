"""Sums over two processes; they take the same steps, and those of one process on all points."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributions import Normal

from vmm_fast import VMMPrior
from vmm_fast.inference.processes import average_over_processes, sum_over_processes

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


several_processes = pytest.mark.skipif(
    not dist.is_available(), reason="this torch has no torch.distributed"
)


@several_processes
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


def mixed(rank):
    """Tensors of a process, with values whose sums rounding in float32 would change."""
    generator = torch.Generator().manual_seed(rank)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return [
        random(5),
        2.0**40 + random(4, 3, dtype=torch.float64),
        random(6, 2).T,
        random(()),
        torch.empty(0, 3),
        torch.tensor(2**53 + 1 + rank),
        random(7, 4)[1::2, ::3],
        torch.arange(6).view(2, 3) + rank,
        random(2, 2, dtype=torch.float64).T,
        torch.tensor([3, 250], dtype=torch.int32),
    ]


def summing_worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.set_num_threads(1)
    rounds = []
    all_reduce = dist.all_reduce

    def counted(tensor):
        rounds.append(tensor.dtype)
        all_reduce(tensor)

    dist.all_reduce = counted
    sums, means = mixed(rank), [x for x in mixed(rank) if x.is_floating_point()]
    places = [x.data_ptr() for x in sums + means]
    number = sum_over_processes(sums)
    average_over_processes(x for x in means)
    assert places == [x.data_ptr() for x in sums + means]
    found = rounds.copy()
    average_over_processes([])
    sum_over_processes([torch.empty(0)])
    alone = torch.tensor([1.0, 2.0])  # a single one goes as it is
    average_over_processes([alone])
    torch.save((number, sums, means, found, alone), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@several_processes
def test_sums_and_means_are_in_place_and_in_one_round_a_dtype(tmp_path):
    multiprocessing.spawn(summing_worker, (str(tmp_path),), nprocs=2)
    expected = [a + b for a, b in zip(mixed(0), mixed(1), strict=True)]
    for rank in range(2):
        number, sums, means, rounds, alone = torch.load(tmp_path / f"{rank}.pt")
        assert number == 2
        for found, value in zip(sums, expected, strict=True):
            assert found.dtype == value.dtype and torch.equal(found, value)
        floating = [x for x in expected if x.is_floating_point()]
        for found, value in zip(means, floating, strict=True):
            assert found.dtype == value.dtype and torch.equal(found, value / 2)
        dtypes = [torch.float32, torch.float64]
        assert rounds == [*dtypes, torch.int64, torch.int32, *dtypes]
        assert alone.tolist() == [1, 2]


def test_without_a_process_group_nothing_happens():
    z = torch.ones(2)
    assert sum_over_processes([z]) == 1
    average_over_processes([z])
    assert z.tolist() == [1, 1]
