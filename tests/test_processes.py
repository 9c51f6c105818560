"""Sums over two processes; they take the same steps, and those of one process on all points."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributions import Normal

from vmm_fast import VMMPrior
from vmm_fast.inference.processes import (
    average_over_processes,
    sum_over_processes,
    telling_of_lost_processes,
)

D, COMPONENTS, POINTS = 2, 4, 60
INFERENCES = ["gradient", "closed-form"]

several_processes = pytest.mark.skipif(
    not dist.is_available(), reason="this torch has no torch.distributed"
)


def points():
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(POINTS, D, generator=generator, dtype=torch.float64)


def train(z, inference):
    """Take steps on fixed points with a fixed encoder; return the state afterwards."""
    torch.manual_seed(0)
    weight = torch.randn(3, D, dtype=torch.float64)
    start = torch.randn(COMPONENTS, 3, dtype=torch.float64)
    prior = VMMPrior(start, D, inference=inference)  # n is the batch of all processes

    def encoder(x):
        return Normal(x @ weight, torch.full((len(x), D), 0.3, dtype=torch.float64))

    for _ in range(5):
        prior.update(z, encoder)
    prior.fit(z, encoder, max_iterations=2)
    return {name: p.detach() for name, p in prior.named_parameters()}


def mixed(rank):
    """Return tensors of a process, whose sums float32 would round."""
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


def worker(rank, folder):
    """Do all that the tests check in this process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {inference: train(points().chunk(2)[rank], inference) for inference in INFERENCES}
    rounds, all_reduce = [], dist.all_reduce

    def counted(tensor):
        rounds.append(tensor.dtype)
        all_reduce(tensor)

    dist.all_reduce = counted
    sums, means = mixed(rank), [x for x in mixed(rank) if x.is_floating_point()]
    places = [x.data_ptr() for x in sums + means]
    found |= {"number": sum_over_processes(sums), "sums": sums, "means": means}
    average_over_processes(x for x in means)
    found["in place"] = places == [x.data_ptr() for x in sums + means]
    found["rounds"] = rounds.copy()
    average_over_processes([])
    sum_over_processes([torch.empty(0)])
    found["alone"] = torch.tensor([1.0 + rank, 2.0])  # a single one goes as it is
    average_over_processes([found["alone"]])
    torch.save(found, f"{folder}/{rank}.pt")
    # gloo's threads abort a process whose peer has left before it.
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    # What takes seconds to import is imported once for both.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "vmm_fast"])
    multiprocessing.start_processes(worker, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@several_processes
@pytest.mark.parametrize("inference", INFERENCES)
def test_two_processes_take_the_steps_of_one(both, inference):
    alone = train(points(), inference)
    for name, value in alone.items():
        first, second = (found[inference][name] for found in both)
        assert torch.equal(first, second), name
        torch.testing.assert_close(first, value, rtol=1e-10, atol=1e-10)


@several_processes
def test_sums_and_means_are_in_place_and_in_one_round_a_dtype(both):
    expected = [a + b for a, b in zip(mixed(0), mixed(1), strict=True)]
    halves = [x / 2 for x in expected if x.is_floating_point()]
    for found in both:
        assert found["number"] == 2 and found["in place"]
        for given, values in ((found["sums"], expected), (found["means"], halves)):
            for tensor, value in zip(given, values, strict=True):
                assert tensor.dtype == value.dtype and torch.equal(tensor, value)
        dtypes = [torch.float32, torch.float64]
        assert found["rounds"] == [*dtypes, torch.int64, torch.int32, *dtypes]
        assert found["alone"].tolist() == [1.5, 2]


def test_without_a_process_group_nothing_happens():
    z = torch.ones(2)
    assert sum_over_processes([z]) == 1
    average_over_processes([z])
    assert z.tolist() == [1, 1]


VAIN = "has waited in vain for"
LOST = "has lost its connection to another of the 2 processes"
TIMED_OUT = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation"
GAVE_UP = "Application timeout caused pair closure"
CLOSED = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"


@several_processes
@pytest.mark.parametrize(
    ("error", "processes", "message"),
    [
        (RuntimeError(TIMED_OUT), 2, f"{VAIN} process 0, which hangs"),
        (RuntimeError(GAVE_UP), 2, f"{VAIN} process 0, which hangs"),
        (RuntimeError(TIMED_OUT), 3, f"{VAIN} another of the 3, which hangs"),
        (RuntimeError(CLOSED), 2, LOST),
        (dist.DistError("closed"), 2, LOST),
        (RuntimeError(CLOSED), 1, None),
        (RuntimeError("of the model"), 2, None),
        (ValueError("gloo"), 2, None),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_an_error_of_the_connection_tells_what_has_happened(monkeypatch, error, processes, message):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(Exception) as caught, telling_of_lost_processes():
        raise error
    if message is None:
        assert caught.value is error
    else:
        assert caught.match(f"^process 1 {message}") and caught.value.__cause__ is error
