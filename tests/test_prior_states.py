"""The priors' state: what is read and set, kept, copied and cast; and every error told."""

import copy
import inspect
import math
import pickle
import random

import numpy as np
import pytest
import torch
from support import mutated, mutations
from test_priors import (
    INPUTS,
    LEARNT,
    PRIORS,
    D,
    Encoder,
    inputs,
    perturb,
    same_state,
    state_of,
    vmm,
)
from torch import nn
from torch.distributions import Normal

from vmm_fast import GaussianMixturePrior, VampPrior, VMMPrior
from vmm_fast.priors.options import MixtureOptions, VampOptions

# --- state ---


def test_state_is_readable_and_settable():
    prior = vmm()
    parameter = prior.logits
    for new in (torch.randn(8, dtype=torch.float64), nn.Parameter(torch.randn(8).double())):
        prior.logits = new
        assert prior.logits is parameter and torch.equal(prior.logits, new)
    lower = torch.randn(8, D, D, dtype=torch.float64).tril()
    lower.diagonal(dim1=-2, dim2=-1).abs_().add_(1e-3).mul_(1e3)
    prior.precision_cholesky = lower
    torch.testing.assert_close(prior.precision_cholesky, lower, rtol=1e-12, atol=0)
    for value in (1e-6, 2.5, 1e6):
        prior.concentration = value
        assert math.isclose(prior.concentration.item(), value, rel_tol=1e-9)
    prior.pseudo_inputs = torch.ones(8, INPUTS)
    assert (prior.pseudo_inputs == 1).all() and prior.pseudo_inputs.dtype == torch.float64


@pytest.mark.parametrize("weights", ["dirichlet", "stick-breaking"])
@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_pruning_by_hand(inference, weights):
    encoder, prior = Encoder(), vmm(inference=inference, weights=weights)
    with torch.no_grad():
        prior.logits[3] = -torch.inf
    z = encoder(inputs()).sample()
    assert (prior.responsibilities(z, encoder)[:, 3] == 0).all()
    for _ in range(3):
        prior.update(z, encoder)
    prior.fit(z, encoder)
    assert prior.logits[3] == -torch.inf and prior.logits[:3].isfinite().all()
    assert prior.kl(encoder(inputs()), encoder).isfinite().all()


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_frozen_parameters_stand_still(inference):
    encoder, prior = Encoder(), vmm(inference=inference).requires_grad_(False)
    z = encoder(inputs()).sample()
    before = {name: p.clone() for name, p in prior.named_parameters()}
    prior.update(z, encoder)
    prior.fit(z, encoder)
    assert same_state(before, state_of(prior))
    prior.raw_precision.requires_grad_(True)
    prior.update(z, encoder)
    assert not torch.equal(before["raw_precision"], prior.raw_precision)
    assert torch.equal(before["logits"], prior.logits)
    prior.requires_grad_(False)
    prior.load_state_dict(prior.state_dict())
    assert not any(p.requires_grad for p in prior.parameters())


def test_a_fixed_concentration_stands_still_though_all_is_asked_to_learn():
    encoder, prior = Encoder(), vmm(map_prior="fixed").requires_grad_(True)
    before = prior.concentration.item()
    prior.update(encoder(inputs()).sample(), encoder)
    assert prior.concentration.item() == before


def test_options_are_kept_as_plain_values(tmp_path):
    """Numbers of numpy's would make a state that torch.load refuses."""
    prior = vmm(data_size=np.int64(7), learning_rate=np.float32(0.5), map_prior=np.str_("fixed"))
    torch.save(prior.state_dict(), tmp_path / "state.pt")
    other = vmm()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.options == prior.options and type(other.data_size) is int


def pickled(prior):
    return pickle.loads(pickle.dumps(prior))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, "state_dict"])
@pytest.mark.parametrize("name", LEARNT)
def test_copies_go_on_alike(name, copied):
    """A copy, a pickle and a loaded state take the same next steps, the private Adam's included."""
    encoder, prior = Encoder(), LEARNT[name]()
    batches = [encoder(inputs()).sample() for _ in range(6)]
    for z in batches[:3]:
        prior.update(z, encoder)
    if copied == "state_dict":
        other = LEARNT[name]()
        other.update(batches[5], encoder)
        other.load_state_dict(prior.state_dict())
    else:
        other = copied(prior)
    at_copy = state_of(prior)
    for z in batches[3:]:
        prior.update(z, encoder)
    assert same_state(at_copy, state_of(other))  # nothing is shared
    for z in batches[3:]:
        other.update(z, encoder)
    assert same_state(state_of(prior), state_of(other))
    assert not same_state(at_copy, state_of(other))


@mutations(30)
@pytest.mark.parametrize("name", LEARNT)
def test_states_that_do_not_fit_change_nothing(name, number):
    """A state is loaded whole or not at all, and no later step runs out of bounds."""
    encoder, prior, rng = Encoder(), LEARNT[name](), random.Random(0)
    z = encoder(inputs()).sample()
    prior.update(z, encoder)
    sound = prior.state_dict()
    refused = 0
    for _ in range(number):
        private, _ = mutated(sound["_extra_state"], rng)
        before, moments = state_of(prior), copy.deepcopy(prior.get_extra_state())
        try:
            prior.load_state_dict({**sound, "_extra_state": private})
        except RuntimeError as error:
            refused += 1
            assert " must " in str(error)
            assert same_state(before, state_of(prior))
            assert str(moments) == str(prior.get_extra_state())
        prior.update(z, encoder)
        assert all(x.isfinite().all() for x in state_of(prior).values())
    assert (refused > number // 3) == bool(sound["_extra_state"])
    wide = VMMPrior(inputs(30), D, inference="closed-form" if "closed" in name else "gradient")
    before = state_of(wide)
    with pytest.raises(RuntimeError, match="must have shape"):
        wide.load_state_dict(sound, strict=False)
    assert same_state(before, state_of(wide))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(2)), "must have shape"),
        (lambda state: state["state"][0].update(exp_avg=torch.eye(2).to_sparse()), "dense"),
        (lambda state: state["state"][0].update(exp_avg=torch.empty(2, device="meta")), "dense"),
        (lambda state: state["state"][0]["exp_avg"].fill_(torch.nan), "must be finite"),
        (lambda state: state["state"][0]["exp_avg_sq"].sub_(1e3), "nowhere negative"),
        (lambda state: state["state"][0].pop("exp_avg_sq"), "must have steps and moments"),
        (lambda state: state["state"][0].update(step=-1.0), "at least 0"),
        (lambda state: state["state"].update({9: {}}), "that it lists, but is of 9"),
        (lambda state: state["param_groups"][0].update(lr=torch.nan), "lr must be a number"),
        (lambda state: state["param_groups"][0].update(eps=torch.nan), "eps must be a number"),
        (
            lambda state: state["param_groups"][0].update(betas=(0.9, 1.0)),
            "beta2 must be a number",
        ),
        (lambda state: state["param_groups"][0].pop("eps"), "must have betas, eps"),
        (lambda state: state["param_groups"][0]["params"].pop(), "parameters, but is of"),
        (lambda state: state.pop("state"), "must have param_groups, a list, and state"),
    ],
)
def test_states_of_the_private_optimizer_are_checked(change, message):
    encoder, prior = Encoder(), vmm()
    prior.update(encoder(inputs()), encoder)
    state = copy.deepcopy(prior.get_extra_state())
    change(state)
    before = str(prior.get_extra_state())
    with pytest.raises(ValueError, match=message):
        prior.set_extra_state(state)
    assert str(prior.get_extra_state()) == before


def test_a_state_keeps_the_options():
    """A schedule of the data weight, set between steps, goes on from a loaded state."""
    encoder, prior, other = Encoder(), vmm(data_size=50, statistics_rate=0.1), vmm()
    z = encoder(inputs()).sample()
    prior.update(z, encoder)
    prior.data_size = 400
    other.load_state_dict(prior.state_dict())
    assert other.options == prior.options and other.data_size == 400
    for each in (prior, other):
        each.update(z, encoder)
    assert same_state(state_of(prior), state_of(other))
    with pytest.raises(ValueError, match="data_size must be an integer of at least 1, but is 0"):
        prior.data_size = 0
    state = prior.state_dict()
    with pytest.raises(RuntimeError, match="inference must be 'closed-form', as the prior's, but"):
        vmm(inference="closed-form").load_state_dict(state)
    del state["_extra_state"]["options"]  # as versions before wrote it
    prior.load_state_dict(state)
    assert prior.options == other.options


def test_a_state_of_a_vamp_prior_keeps_its_options():
    encoder, prior = Encoder(), VampPrior(inputs(8), D, learning_rate=0.02)
    prior.update(encoder(inputs()), encoder)
    state = prior.state_dict()
    assert state["_extra_state"]["options"] == {
        "learning_rate": 0.02,
        "update_every": 8,
        "joint": False,
    }
    other = VampPrior(inputs(8), D)
    other.load_state_dict(state)
    assert other.options == prior.options
    with pytest.raises(RuntimeError, match="joint must be True, as the prior's, but is False"):
        VampPrior(inputs(8), D, joint=True).load_state_dict(state)
    del state["_extra_state"]["options"]  # as versions before wrote it
    other = VampPrior(inputs(8), D)
    other.load_state_dict(state)
    assert other.options.learning_rate == 0.001 and same_state(state_of(prior), state_of(other))


def test_constructors_have_the_defaults_of_the_options():
    mixtures = {VMMPrior: MixtureOptions(), GaussianMixturePrior: MixtureOptions()}
    for prior, options in {**mixtures, VampPrior: VampOptions()}.items():
        parameters = inspect.signature(prior).parameters
        expected = vars(options).copy()
        if prior is GaussianMixturePrior:  # it has no pseudo-inputs, which alone move seldom
            del expected["update_every"]
        assert {name: parameters[name].default for name in expected} == expected


@pytest.mark.parametrize("name", PRIORS)
def test_casts_follow(name):
    """After .float() the private Adam goes on in float32; running sums stay as they are."""

    def running():
        return {k: x.clone() for k, x in prior.named_buffers() if k.startswith("running")}

    encoder, prior = Encoder(), PRIORS[name]()
    prior.update(encoder(inputs()), encoder)
    before = running()
    assert bool(before) == ("closed form" in name)
    for dtype in (torch.bfloat16, torch.float32):
        encoder, prior = encoder.to(dtype), prior.to(dtype)
        torch.testing.assert_close(running(), before, rtol=0, atol=0)
    q = encoder(inputs(dtype=torch.float32))
    prior.update(q, encoder)
    assert {p.dtype for p in prior.parameters()} <= {torch.float32}
    assert all(p.isfinite().all() for p in prior.parameters())
    assert prior.kl(q, encoder).dtype == prior.components(encoder).centers.dtype == torch.float32


def test_autocast():
    """Half-precision encoder outputs are taken; arithmetic and the prior's state are float32."""
    encoder = Encoder("diagonal", torch.float32)
    prior = perturb(VMMPrior(inputs(8, torch.float32), D))
    x = inputs(20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        q, at_pseudo_inputs = encoder(x), encoder(prior.pseudo_inputs)
        assert q.mean.dtype == torch.bfloat16
        z = q.mean
        kl, loss = prior.kl(q, encoder, z=z), prior.map_loss(z, encoder)
        assert prior.sample(3, encoder).dtype == torch.float32
        prior_before = copy.deepcopy(prior)
        prior.update(q, encoder)

    def same_outputs(inputs):
        base = (q if inputs is x else at_pseudo_inputs).base_dist
        return Normal(base.loc.float(), base.scale.float())

    # The same encoder outputs in float32: nothing else may have been rounded.
    assert kl.dtype == loss.dtype == torch.float32
    exact = prior_before.kl(same_outputs(x), same_outputs, z=z.float())
    torch.testing.assert_close(kl, exact)
    torch.testing.assert_close(loss, prior_before.map_loss(z.float(), same_outputs))


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weights": "uniform"},
            "weights must be one of 'dirichlet', 'stick-breaking', but is 'uniform'",
        ),
        ({"inference": "mcmc"}, "inference must be one of"),
        ({"map_prior": True}, "map_prior must be one of"),
        ({"pseudo_inputs_per_component": 3}, "pseudo_inputs_per_component must divide"),
        ({"pseudo_inputs_per_component": 0}, "pseudo_inputs_per_component must be an integer"),
        ({"latent_dim": 0}, "latent_dim must be an integer"),
        ({"latent_dim": True}, "latent_dim must be an integer"),
        ({"data_size": 2.5}, "data_size must be an integer"),
        ({"responsibility_gradient": "no"}, "responsibility_gradient must be True or False"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0"),
        ({"concentration": math.inf}, "concentration must be a finite number above 0"),
        ({"statistics_rate": 0}, "statistics_rate must be in"),
        ({"statistics_rate": 1.1}, "statistics_rate must be in"),
        ({"data_size": 0}, "data_size must be an integer of at least 1"),
        ({"discount": 0.5}, "discount must be in"),
        ({"discount": 1.0, "weights": "stick-breaking"}, "discount must be in"),
        ({"joint": True, "inference": "closed-form"}, "joint must be False with"),
        ({"pseudo_inputs": torch.full((4, 2), math.nan)}, "pseudo_inputs must be finite"),
        ({"pseudo_inputs": torch.zeros(0, 2)}, "pseudo_inputs must have shape"),
    ],
)
def test_constructor_errors(settings, message):
    arguments = {"pseudo_inputs": torch.zeros(4, 2), "latent_dim": 2, **settings}
    with pytest.raises(ValueError, match=message):
        VMMPrior(**arguments)


Z = torch.zeros(4, D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: VMMPrior(Z.long(), 2), TypeError, "pseudo_inputs must be of a floating dtype"),
        (lambda p: VMMPrior([[0.0]], 1), TypeError, "pseudo_inputs must be a tensor .* or a torch"),
        (lambda p: p.kl(Z, Encoder()), TypeError, "q must be a torch"),
        (lambda p: p.log_prob(Z), TypeError, "encoder must be a callable"),
        (
            lambda p: p.update(Z, p.encode(inputs(), Encoder())[1]),
            TypeError,
            "encoder must be the network's own",
        ),
        (
            lambda p: p.log_prob(Z, lambda x: Encoder()(x[:5])),
            ValueError,
            "encoder must give 8 pseudo-inputs means of shape",
        ),
        (lambda p: p.update(Z[:, :2], Encoder()), ValueError, r"z must have shape \[B, 3\]"),
        (lambda p: p.update(Z[:0], Encoder()), ValueError, "z must have at least one row"),
        (lambda p: p.log_prob(Z / 0, Encoder()), ValueError, "z must be finite, but row 0"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(vmm())


@pytest.mark.parametrize("name", ["vmm", "normal"])
def test_errors_of_kl(name):
    encoder, prior = Encoder(), PRIORS[name]()
    q = encoder(inputs(6))
    for z in (torch.zeros(1, D), torch.zeros(6, 9)):
        with pytest.raises(ValueError, match="z must have q's shape"):
            prior.kl(q, encoder, z=z.double())
    bad = Normal(torch.zeros(6, D).double(), -torch.ones(6, D).double(), validate_args=False)
    with pytest.raises(ValueError, match="q must be finite with a positive scale, but row 0"):
        prior.kl(bad, encoder, z=torch.zeros(6, D).double())
    with pytest.raises(ValueError, match="finite"):
        prior.kl(q, encoder, z=torch.full((6, D), math.nan).double())
    with pytest.raises(ValueError, match="q must have latent_dim = 3 dimensions, but has 2"):
        prior.kl(Normal(torch.zeros(4, 2), torch.ones(4, 2)), encoder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.zeros(3), "logits must have shape"),
        ("logits", torch.full((8,), math.nan), "logits must not hold NaN"),
        ("pseudo_inputs", torch.zeros(8, 2), "pseudo_inputs must have shape"),
        ("precision_cholesky", torch.zeros(3, D, D), "precision_cholesky must have shape"),
        ("precision_cholesky", torch.zeros(8, D, D), "positive diagonal"),
        ("precision_cholesky", torch.ones(8, D, D), "lower triangular"),
        ("precision_cholesky", torch.eye(D).expand(8, D, D) * math.nan, "must be finite"),
        ("concentration", -1.0, "concentration must be a finite number above 0"),
    ],
)
def test_errors_of_setters(name, value, message):
    prior = vmm()
    before = state_of(prior)
    with pytest.raises(ValueError, match=message):
        setattr(prior, name, value)
    assert same_state(before, state_of(prior))
