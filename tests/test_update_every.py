"""An empirical-Bayes step in every so many calls of update, and the mixture that kl keeps."""

import copy

import pytest
import torch
from test_priors import (
    INPUTS,
    LEARNT,
    TIGHT,
    Counted,
    D,
    Encoder,
    inputs,
    same_state,
    state_of,
    vamp,
    vmm,
)
from torch.distributions import Independent, Normal
from torch.func import functional_call

from vmm_fast import VMMPrior
from vmm_fast.priors import learnt

EVERY = 3
MAKERS = {
    "vmm": vmm,
    "vmm, closed form": lambda **options: vmm(inference="closed-form", **options),
    "vmm, two a component": lambda **options: vmm(pseudo_inputs_per_component=2, **options),
    "vamp": vamp,
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_all_priors_with_pseudo_inputs_are_here():
    assert MAKERS.keys() == LEARNT.keys() - {"gmm", "gmm, closed form"}


def network_step(encoder, prior, x):
    """Return the KL of a batch; the network moves a little."""
    encoder.zero_grad()
    q = encoder(x)
    kl = prior.kl(q, encoder, q.mean)
    kl.mean().backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter -= 0.1 * parameter.grad
    return kl.detach()


@makers
def test_pseudo_inputs_move_in_the_first_of_so_many_calls_and_all_else_in_each(make):
    """By gradient it is torch's Adam with two rates."""
    encoder, rate = Encoder(), 0.01
    prior, points = make(update_every=EVERY, learning_rate=rate), []
    if hasattr(prior, "data_size"):
        prior.data_size = 50
    twin = copy.deepcopy(prior)
    others = [p for name, p in twin.named_parameters() if name != "pseudo_inputs"]
    groups = [
        {"params": [twin.pseudo_inputs], "lr": EVERY**0.5 * rate},
        {"params": others, "lr": rate},
    ]
    adam = torch.optim.Adam(groups[: 1 + bool(others)], eps=1e-7)
    for number in range(2 * EVERY + 1):
        z, before = encoder(inputs()).sample(), state_of(prior)
        due = number % EVERY == 0
        assert prior.is_due == due
        prior.update(z, encoder)
        after = state_of(prior)
        for name in {"pseudo_inputs", "logits", "raw_precision"} & after.keys():
            same = torch.equal(before[name], after[name])
            assert same == (name == "pseudo_inputs" and not due)
        if getattr(prior.options, "inference", None) != "closed-form":
            points.append(z)
            adam.zero_grad()
            twin.map_loss(torch.cat(points) if due else z, encoder).backward()
            if due:  # for the points of all calls since they moved last
                points = []
            else:
                twin.pseudo_inputs.grad = None
            adam.step()
            for name, value in after.items():
                torch.testing.assert_close(value, twin.state_dict()[name], **TIGHT)


@makers
def test_points_that_wait_for_a_step_are_the_priors_own(make):
    encoder, prior, other = Encoder(), make(update_every=EVERY), None
    for number in range(EVERY + 1):
        z = encoder(inputs()).sample()
        if number == 0:
            other = copy.deepcopy(prior)
        other.update(z.clone(), encoder)
        prior.update(z, encoder)
        z.zero_()
    assert same_state(state_of(prior), state_of(other))


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_n_is_the_size_of_one_batch_however_many_wait(inference):
    encoder, prior = Encoder(), vmm(update_every=EVERY, inference=inference)
    other = copy.deepcopy(prior)
    other.data_size = 7
    for _ in range(2 * EVERY):
        z = encoder(inputs(7)).sample()
        prior.update(z, encoder)
        other.update(z, encoder)
    assert same_state(state_of(prior), state_of(other))


@makers
@pytest.mark.parametrize("calls", range(EVERY))
def test_points_that_are_not_finite_are_refused_at_once_and_forgotten(make, calls):
    encoder, prior, x = Encoder(), make(update_every=EVERY), inputs()
    for _ in range(calls):
        prior.update(encoder(x).mean, encoder)
    before = state_of(prior)
    with pytest.raises((ValueError, FloatingPointError)):
        prior.update(torch.full((5, D), torch.nan, dtype=torch.float64), encoder)
    assert same_state(before, state_of(prior))
    for _ in range(2 * EVERY):
        prior.update(encoder(x).mean, encoder)
    assert not torch.equal(before["pseudo_inputs"], state_of(prior)["pseudo_inputs"])


def test_a_concentration_that_is_fixed_stays_whatever_requires_grad_says():
    encoder, prior, x = Encoder(), vmm(update_every=EVERY, map_prior="fixed"), inputs()
    for _ in range(2 * EVERY):
        prior.requires_grad_(True)
        prior.update(encoder(x), encoder)
    assert float(prior.concentration) == pytest.approx(1.7)


def test_the_other_parameters_follow_around_the_centers_that_kl_keeps():
    encoder, x = Encoder(), inputs()
    prior = vmm(update_every=EVERY, learning_rate=0.01)
    prior.update(encoder(x).mean, encoder)
    prior.kl(encoder(x), encoder)
    twin, there = copy.deepcopy(prior), copy.deepcopy(encoder)
    with torch.no_grad():
        encoder.linear.weight.add_(1)
    z = encoder(x).mean.detach()
    prior.update(z, encoder)
    twin.update(z, there)  # encodes where the centers were
    assert same_state(state_of(prior), state_of(twin))


@pytest.mark.parametrize("kept", [True, False])
def test_in_closed_form_every_batch_counts(kept):
    """With pseudo-inputs that stand still, a cycle is as a step in every call."""
    encoder, x = Encoder(), inputs()
    options = {"inference": "closed-form", "learning_rate": 1e-30}
    prior, each = vmm(update_every=EVERY, **options), vmm(**options)
    each.load_state_dict({**state_of(prior), "_extra_state": {}})
    for _ in range(2 * EVERY):
        z = encoder(x).sample()
        for one in (prior, each):
            if kept:
                one.kl(encoder(x), encoder)
            one.update(z, encoder)
        found, expected = state_of(prior), state_of(each)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], **TIGHT)
        expected = each.kl(encoder(x), encoder, z)
        torch.testing.assert_close(prior.kl(encoder(x), encoder, z), expected, **TIGHT)


@makers
def test_kl_keeps_the_mixture_between_two_steps(make):
    """The mixture has the centers of the first call after a move, and the newest of all else.

    Evaluation and other methods see the newest centers, too.
    """
    encoder, x = Encoder(), inputs()
    prior = make(update_every=EVERY)
    network_step(encoder, prior, x)
    for _ in range(3):
        z = encoder(x).sample()
        prior.update(z, encoder)
        fresh = prior.components(encoder).detach()
        for _ in range(EVERY):
            expected = fresh.kl(encoder(x), encoder(x).mean).detach()
            torch.testing.assert_close(network_step(encoder, prior, x), expected, **TIGHT)
            newest = prior.components(encoder)
            q = encoder(x)
            prior.eval()
            torch.testing.assert_close(prior.kl(q, encoder, q.mean), newest.kl(q, q.mean), **TIGHT)
            prior.train()
            with torch.no_grad():
                torch.testing.assert_close(
                    prior.kl(q, encoder, q.mean), newest.kl(q, q.mean), **TIGHT
                )
            if not prior.is_due:
                prior.update(z, encoder)
                fresh = prior._mixture(fresh.centers, fresh.scale).detach()


def test_pseudo_inputs_are_encoded_twice_in_so_many_steps():
    counted, prior, x = Counted(Encoder()), vmm(update_every=EVERY), inputs()
    calls = []
    for _ in range(3 * EVERY):
        counted.calls = 0
        q, at_pseudo_inputs = prior.encode(x, counted)
        prior.kl(q, at_pseudo_inputs)
        assert counted.calls == 1  # batch and pseudo-inputs together, or the batch alone
        prior.update(q, counted)
        calls.append(counted.calls)
    # The mixture is built in the step after, and the first time of all.
    assert calls == 3 * [2, 1, 1]


@pytest.mark.parametrize("per_update", [1, 2, 3])
def test_no_gradient_is_lost_or_doubled(per_update):
    """Whatever the number of kl per update: gradients of what was reused come with the next."""
    encoder, prior, x = Encoder(), vmm(update_every=EVERY, learning_rate=1e-30), inputs()
    z = encoder(x).mean.detach()

    def gradient(one, through_mixture=True):
        encoder.zero_grad()
        mixture = encoder if through_mixture else lambda u: detached(encoder(u))
        one.kl(encoder(x), mixture, z).sum().backward()
        return encoder.linear.weight.grad.clone()

    def detached(q):
        return type(q)(q.loc.detach(), scale_tril=q.scale_tril.detach())

    for _ in range(EVERY):
        prior.update(z, encoder)  # calls without kl count for nothing
    for _ in range(3):
        prior.update(z, encoder)
        each = copy.deepcopy(prior).eval()
        whole = gradient(each) - gradient(each, through_mixture=False)
        through_q = gradient(each, through_mixture=False)
        owed, total = prior._since.reused, torch.zeros_like(whole)
        for call in range(EVERY):
            for _ in range(per_update):
                total += gradient(prior) - through_q
            if call < EVERY - 1:
                prior.update(z, encoder)
        given = EVERY * per_update + owed - prior._since.reused
        torch.testing.assert_close(total, given * whole, **TIGHT)
        assert prior._since.reused < EVERY


@pytest.mark.parametrize("kind", ["each", "looked at", "first skipped", "others skipped"])
def test_gradients_count_where_they_come(kind):
    """A loss without a backward pass owes nothing and pays nothing."""
    encoder, prior, x = Encoder(), vmm(update_every=EVERY, learning_rate=1e-30), inputs()
    z = encoder(x).mean.detach()

    def gradient(kl):
        return torch.autograd.grad(kl.sum(), encoder.linear.weight)[0]

    mixture = prior.components(encoder)
    through_q = gradient(mixture.detach().kl(encoder(x), z))
    whole = gradient(mixture.kl(encoder(x), z)) - through_q
    total, backwards = torch.zeros_like(whole), 0
    for number in range(4 * EVERY + 1):
        kl = prior.kl(encoder(x), encoder, z)
        first = number % EVERY == 1
        skipped = "first skipped" if first else "others skipped"
        if kind != skipped:
            total += gradient(kl) - through_q
            backwards += 1
        if kind == "looked at":
            prior.kl(encoder(x), encoder, z).mean().item()
        prior.update(z, encoder)
    torch.testing.assert_close(total, (backwards - prior._since.reused) * whole, **TIGHT)
    assert prior._since.reused < EVERY or kind == "first skipped"


def test_an_exact_fit_and_a_loaded_state_count_at_once():
    encoder, prior, x = Encoder(), vmm(update_every=EVERY), inputs()
    z = encoder(x).mean.detach()

    def is_new():
        expected = prior.components(encoder).detach().kl(encoder(x), z)
        torch.testing.assert_close(prior.kl(encoder(x), encoder, z), expected, **TIGHT)

    def begin():
        for _ in range(2):
            prior.kl(encoder(x), encoder, z)
            prior.update(z, encoder)

    begin()
    prior.fit(z, encoder)
    is_new()
    other = state_of(vmm())
    for state, strict in (({**other, "_extra_state": {}}, True), (other, False)):
        begin()
        prior.load_state_dict(state, strict=strict)
        is_new()
    begin()
    prior.pseudo_inputs = torch.nn.Parameter(inputs(8))
    is_new()


def test_a_scale_that_the_network_moves_does_not_move_what_is_kept():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(INPUTS, D, dtype=torch.float64)
            self.scale = torch.nn.Parameter(torch.ones(D, dtype=torch.float64))

        def forward(self, x):
            mean = self.linear(x)
            return Independent(Normal(mean, self.scale.expand_as(mean)), 1)

    encoder, prior, x = Shared(), vmm(update_every=EVERY), inputs()
    for _ in range(2):
        network_step(encoder, prior, x)
        prior.update(encoder(x).mean, encoder)
    kept = prior._since.kept.scale.clone()
    with torch.no_grad():
        encoder.scale += 1
    assert torch.equal(prior._since.kept.scale, kept)


def test_without_update_every_mixture_is_new():
    """Nothing says how old it is, in a loop that learns the network alone."""
    encoder, prior, x = Encoder(), vmm(), inputs()
    prior.update(encoder(x), encoder)
    prior.update(encoder(x), encoder)
    for _ in range(3):
        fresh = prior.components(encoder).detach()
        expected = fresh.kl(encoder(x), encoder(x).mean).detach()
        torch.testing.assert_close(network_step(encoder, prior, x), expected, **TIGHT)


@pytest.mark.parametrize(
    "change",
    [
        lambda prior: setattr(prior, "logits", torch.linspace(-1, 1, 8)),
        lambda prior: setattr(prior, "precision_cholesky", 2 * prior.precision_cholesky),
        lambda prior: torch.nn.init.normal_(prior.logits),
        lambda prior: setattr(prior, "_is_replica", True),
    ],
    ids=["logits", "precisions", "in place", "replica"],
)
@pytest.mark.parametrize("calls", range(EVERY))
def test_a_change_from_outside_counts_at_once(change, calls):
    encoder, prior, x = Encoder(), vmm(update_every=EVERY), inputs()
    for _ in range(1 + calls):
        network_step(encoder, prior, x)
        prior.update(encoder(x), encoder)
    change(prior)
    fresh = prior.components(encoder).detach()
    expected = fresh.kl(encoder(x), encoder(x).mean).detach()
    torch.testing.assert_close(network_step(encoder, prior, x), expected, **TIGHT)


def copied_state(prior):
    return copy.deepcopy(prior.state_dict())


class Given(torch.nn.Module):
    """Pseudo-inputs that are a module's parameter and buffer."""

    def __init__(self):
        super().__init__()
        self.u = torch.nn.Parameter(inputs(8))
        self.register_buffer("shift", torch.zeros(INPUTS).double())

    def forward(self):
        return self.u + self.shift


@pytest.mark.parametrize(
    "what",
    [
        lambda prior: prior.logits,
        lambda prior: prior.pseudo_inputs,
        lambda prior: prior.pseudo_inputs.u,
        lambda prior: prior.pseudo_inputs.shift,
    ],
    ids=["logits", "pseudo-inputs", "parameter of a module", "buffer of a module"],
)
@pytest.mark.parametrize(
    "then",
    [
        lambda prior, z, encoder: prior,
        lambda prior, z, encoder: prior.update(z, encoder) or prior,
        lambda prior, z, encoder: prior.double(),
        lambda prior, z, encoder: copy.deepcopy(prior),
        lambda prior, z, encoder: (
            prior.load_state_dict(copy.deepcopy(prior.state_dict())) and prior
        ),
    ],
    ids=["nothing", "update", "cast", "copy", "state"],
)
@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_a_change_in_place_is_seen_whatever_follows(what, then, inference, request):
    encoder, x = Encoder(), inputs()
    start = Given() if "module" in request.node.callspec.id else inputs(8)
    prior = VMMPrior(start, D, update_every=EVERY, inference=inference).double()
    z = encoder(x).mean.detach()
    prior.update(z, encoder)
    prior.kl(encoder(x), encoder, z)
    with torch.no_grad():
        what(prior).add_(torch.linspace(-1, 1, what(prior).shape[-1]))
    prior = then(prior, z, encoder)
    expected = prior.components(encoder).detach().kl(encoder(x), z)
    torch.testing.assert_close(prior.kl(encoder(x), encoder, z), expected, **TIGHT)


def test_a_process_without_a_mixture_lets_all_build_one(monkeypatch):
    encoder, prior, x = Encoder(), vmm(update_every=EVERY), inputs()
    monkeypatch.setattr(learnt, "number_of_processes", lambda: 2)
    having = []
    monkeypatch.setattr(learnt, "sum_over_processes", lambda x: having.extend(x) or 2)
    mixture = prior.components(encoder).detach()
    assert learnt._averaged(mixture, x.device) is None  # this one has, the other has not
    assert learnt._averaged(None, x.device) is None
    assert having == [1, 0]  # each takes part in the exchange


def test_the_mixture_is_cast_with_the_prior():
    encoder, prior, x = Encoder(), vmm(update_every=EVERY), inputs()
    for _ in range(2):
        network_step(encoder, prior, x)
        prior.update(encoder(x), encoder)
    other = copy.deepcopy(prior).float()
    expected = network_step(copy.deepcopy(encoder), prior, x)
    found = network_step(encoder.float(), other, x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def of_a_module(**options):
    """Return a prior whose pseudo-inputs are a module, always the same."""
    torch.manual_seed(0)
    return VMMPrior(Given(), D, **options).double()


@pytest.mark.parametrize("make", [*MAKERS.values(), of_a_module], ids=[*MAKERS, "module"])
def test_copies_and_states_go_on_within_a_cycle(make):
    encoder, prior, x = Encoder(), make(update_every=EVERY), inputs()
    for _ in range(EVERY + 2):  # two steps of the network after the prior's
        network_step(encoder, prior, x)
        prior.update(encoder(x).mean, encoder)
    other = make(update_every=EVERY)
    other.load_state_dict(copy.deepcopy(prior.state_dict()))
    runs = [(encoder, prior)] + [
        (copy.deepcopy(encoder), each) for each in (other, copy.deepcopy(prior))
    ]
    found = []
    for network, each in runs:
        found.append([])
        for _ in range(2 * EVERY):
            found[-1].append(network_step(network, each, x))
            each.update(network(x).mean, network)
    for _, each in runs[1:]:
        assert same_state(state_of(prior), state_of(each))
    for values in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], values, strict=True))


def test_a_state_of_a_version_without_cycles_takes_a_step_in_every_call():
    encoder, prior = Encoder(), vmm(learning_rate=0.02)
    prior.update(encoder(inputs()), encoder)
    state = prior.state_dict()
    del state["_extra_state"]["options"]["update_every"], state["_extra_state"]["since_step"]
    new = VMMPrior(inputs(8), D)
    assert new.options.update_every > 1
    new.load_state_dict(state)
    assert new.options == prior.options and new.is_due
    for each in (prior, new):
        torch.manual_seed(1)
        each.update(encoder(torch.ones(5, INPUTS).double()), encoder)
    assert same_state(state_of(prior), state_of(new))


@pytest.mark.parametrize("value", [0, -1, 1.5, "8"])
def test_update_every_is_a_number_of_calls(value):
    with pytest.raises(ValueError, match="update_every must be an integer of at least 1"):
        vmm(update_every=value)
    with pytest.raises(AttributeError, match="update_every must be given when the prior is made"):
        vmm().update_every = value


@makers
def test_transforms_see_the_newest_mixture_and_leave_nothing(make):
    encoder, prior, x = Encoder(), make(update_every=EVERY), inputs()
    z = encoder(x).mean.detach()
    for _ in range(2):
        prior.kl(encoder(x), encoder, z)
        prior.update(z, encoder)
    parameters = dict(encoder.named_parameters())
    kept = prior._since.kept

    def loss(parameters):
        def encode(inputs):
            return functional_call(encoder, parameters, (inputs,))

        return prior.kl(encode(x), encode, z).sum()

    found = torch.func.grad(loss)(parameters)
    assert prior._since.kept is kept
    prior.eval()
    expected = torch.autograd.grad(loss(parameters), parameters.values())
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
