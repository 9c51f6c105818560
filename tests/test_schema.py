"""Files whose digest is right and whose content is not are refused, unless it is as good."""

import random
from dataclasses import asdict

import pytest
import torch
from support import mutated, mutations

from vmm_fast import _schema
from vmm_fast._files import save_atomically, write_json
from vmm_fast._folder import Folder
from vmm_fast._schema import check, list_of, number, optional, table, tensor, text, whole
from vmm_fast.arrays.clustering import Clusterer, Settings
from vmm_fast.arrays.data import InputError, Scaling
from vmm_fast.clusters import Clusters, ClusterTree, Confusion
from vmm_fast.mixture import Components
from vmm_fast.models import VAE


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        (whole(1), "x", "a must be a whole number of at least 1, but is 'x'"),
        (whole(1), 0, "a must be a whole number of at least 1, but is 0"),
        (whole(0, 9), 10, "a must be a whole number from 0 to 9, but is 10"),
        (whole(), True, "a must be a whole number of at least 0, but is True"),
        (whole(), 10**30, "a must be a whole number of at least 0, but is 10+"),
        (number(), float("nan"), "a must be a finite number, but is nan"),
        (number(), 10**400, r"a must be a finite number, but is 10+\.\."),
        (_schema.RATE, 0, "a must be a finite number above 0, but is 0"),
        (optional(text), 3, "a must be a text, but is 3"),
        (_schema.flag, 1, "a must be true or false, but is 1"),
        (_schema.none, 1, "a must be absent, but is 1"),
        (_schema.plain, [], r"a must be a text or a number, but is \[\]"),
        (list_of(text), "text", "a must be a list, but is 'text'"),
        (list_of(text, 2), ["b"], "a must have 2 values, but has 1"),
        (list_of(text, least=1), [], "a must have at least 1 values, but has 0"),
        (list_of(text), ["b", None], r"a\[1\] must be a text, but is None"),
        (table({"b": text}), {}, "a must have 'b', but has not"),
        (table({"b": text}), {"b": 1}, r"a\.b must be a text, but is 1"),
        (table({}, None), {"b": 1}, "a must not have 'b', but has"),
        (table({}), [], r"a must be a table, but is \[\]"),
        (
            tensor(torch.int64),
            torch.zeros(2),
            r"a must be a tensor of torch.int64, but is a tensor",
        ),
        (tensor(shape=[3]), torch.zeros(2), r"a must be a tensor \[3\], but is .* \[2\]"),
        (tensor(), torch.tensor([1, float("inf")]), "a must be finite, but is not"),
        (tensor(pruned=True), torch.tensor([-float("inf")]), "a must be finite or -inf, but is"),
        (_schema.generator_state, torch.zeros(16).byte(), "a must be the state of a generator of"),
        (_schema.like({"b": [1, 2.0]}), {"b": [1]}, r"a\.b must have 2 values, but has 1"),
        (_schema.like({"b": [1, 2.0]}), {"b": [1, "x"]}, r"a\.b\[1\] must be a finite number"),
    ],
)
def test_what_does_not_keep_a_rule_is_told(rule, value, message):
    with pytest.raises(ValueError, match=f"^run of out is damaged: {message}"):
        check("run of out", {"a": value}, table({"a": rule}))


def test_what_keeps_a_rule_is_taken():
    pruned = torch.tensor([0.0, -float("inf")])
    taken = [
        (whole(1), 1),
        (number(), 1),
        (optional(text), None),
        (list_of(text, 2), ("a", "b")),
        (table({"a": text}), {"a": "b", "c": 3}),
        (tensor(torch.float32, [2], pruned=True), pruned),
        (_schema.generator_state, torch.get_rng_state()),
        (_schema.weights_of({"prior.logits": pruned}), {"prior.logits": pruned}),
        (
            _schema.like({"a": [True, 1, 2.0, "b", torch.ones(2)]}),
            {"a": [False, 3, 0.5, "", torch.ones(2)]},
        ),
    ]
    for rule, value in taken:
        check("run", value, rule)


def make_folder(path):
    return Folder(path, command="cluster", settings=Settings, checkpoint="a.pt", results=())


@mutations(150)
def test_runs_with_other_settings_than_there_can_be_are_refused(tmp_path, number):
    """Of a run of a week ago, whose settings were changed together with their digest."""
    settings = Settings(epochs=4, latent_dim=2, components=9, batch_size=8, learning_rate=0.1)
    record = {"vmm_fast": "1", "input": "sha256 1", "settings": asdict(settings)}
    refused, rng = 0, random.Random(0)
    path = tmp_path / "run.json"
    for _ in range(number):
        state, where = mutated(record, rng)
        if isinstance(_value(state, where), torch.Tensor):
            continue
        write_json(path, state)
        try:
            found = make_folder(str(tmp_path)).resumed("sha256 1", {})
        except InputError as error:
            refused += 1
            assert "--resume: " in str(error)
        else:
            assert where[0] in ("vmm_fast", "settings")
            assert Settings(**found) == Settings(**{**asdict(settings), **found})
            for name, value in found.items():
                assert value == getattr(settings, name) or type(value) in (int, float, type(None))
    assert refused > 0.6 * number
    with pytest.raises(
        InputError, match=r"run.json of .* is damaged: settings.epochs must be a wh"
    ):
        write_json(path, {**record, "settings": {**asdict(settings), "epochs": "x"}})
        make_folder(str(tmp_path)).resumed("sha256 1", {})


def _value(state, where):
    """Return the value at a path, or None if it is missing."""
    for key in where:
        try:
            state = state[key]
        except (KeyError, IndexError):
            return None
    return state


@pytest.fixture
def clusterer():
    """Return a clusterer with four components, the last without a point, in two clusters."""
    network = VAE(3, 2, hidden=(4,)).eval()
    centers = torch.tensor([[-3.0, 0], [-3.0, 1], [3.0, 0], [9.0, 9]])
    log_weights = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    components = Components(centers, log_weights, torch.eye(2).repeat(4, 1, 1))
    tree = ClusterTree(Confusion.of(components, centers[:3].repeat(5, 1)))
    clusters = Clusters(components, torch.tensor([0, 0, 1, 1]))
    scaling = Scaling(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    return Clusterer(network, clusters, tree, scaling)


@mutations(300)
def test_models_of_other_content_are_refused(clusterer, number):
    rng, refused = random.Random(0), 0
    rows = torch.randn(6, 3)
    expected = clusterer.assign(rows)
    for _ in range(number):
        state, where = mutated(clusterer.state_dict(), rng)
        try:
            found = Clusterer.from_state_dict(state)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("state is damaged: ") or where == ["vmm_fast"]
        else:
            assert where[0] == "confusion" or str(found.assign(rows)) == str(expected), where
            found.tree.cut()
    assert refused > 0.9 * number


def test_a_tree_is_of_its_clusters(clusterer):
    state = clusterer.state_dict()
    fewer = {name: value[:3] for name, value in state["components"].items()}
    others = (
        (
            {"components": fewer, "clusters": torch.tensor([0, 0, 1])},
            "tree must be of these 3 comp",
        ),
        ({"clusters": torch.tensor([0, 0, 0, 1])}, "clusters must be of a cut of this tree"),
        (
            {"network": {**state["network"], "latent_dim": 10**12}},
            "latent_dim must be a whole numb",
        ),
        ({"network": {**state["network"], "hidden": [25] * 9}}, "weights must"),
    )
    for changed, message in others:
        with pytest.raises(ValueError, match=f"state is damaged: .*{message}"):
            Clusterer.from_state_dict({**state, **changed})


def test_a_model_is_read_back_as_it_was_or_named(clusterer, tmp_path):
    path, rows = tmp_path / "model.pt", torch.randn(6, 3)
    save_atomically(path, clusterer.state_dict())
    assert str(Clusterer.load(path).assign(rows)) == str(clusterer.assign(rows))
    save_atomically(path, {**clusterer.state_dict(), "clusters": "x"})
    with pytest.raises(ValueError, match=r"model\.pt' is damaged: clusters must be a tensor of"):
        Clusterer.load(path)
