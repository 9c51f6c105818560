"""The training loop of `vmm_fast.models.VAE`, with early stopping and exact checkpoints.

Each step encodes its batch once:

    variational step        Adam on the network raises mean ELBO(x); prior parameters are fixed
    empirical-Bayes step    prior.update(z, encode) with the z of the same forward pass

Batches come from a generator of their own, so that one seed gives the same batches whatever the
prior draws. Validation uses the same noise after every epoch, so that epochs are comparable.
A checkpoint holds everything that the next epoch depends on; a resumed run has the same bits as an
unbroken one (same machine, versions and thread count).
"""

import copy
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmm_fast._checks import check_choice
from vmm_fast._files import load_checked, save_atomically
from vmm_fast._schema import (
    check,
    generator_state,
    list_of,
    none,
    number,
    optional,
    plain,
    table,
    tensor,
    weights_of,
    whole,
)
from vmm_fast._text import counted, print_progress
from vmm_fast.inference.gradient import check_adam_state, check_same_settings
from vmm_fast.models.noise import noise_state, own_random_state, seed_noise, set_noise_state
from vmm_fast.models.vae import VAE
from vmm_fast.priors import StandardNormalPrior
from vmm_fast.priors.learnt import LearntPrior
from vmm_fast.schedules import SCHEDULES, learning_rate_share

ADAM_EPS = 1e-7  # the paper's (TensorFlow's default)
CHECK_ROWS = 4096  # rows of data checked at once
TERMS = ("elbo", "log_likelihood", "kl")
# Keys of an epoch's record.
RECORD = (
    "epoch",
    "seconds",
    *(f"train_{name}" for name in TERMS),
    *(f"validation_{name}" for name in TERMS),
    "scale",
    "concentration",
    "components_active",
)


class History(list[dict[str, Any]]):
    """The measurements of `fit`: one dict per epoch.

    Keys: ``epoch`` (from 1), ``seconds``, ``train_elbo``, ``train_log_likelihood``, ``train_kl``
    (means over the epoch's steps, nats), the same three with ``validation_``, ``scale`` (sigma),
    ``concentration`` and ``components_active`` (components that hold over 0.2 % of the validation
    data). A value that does not exist for this model or without validation data is None.

    Attributes
    ----------
    best_epoch : int or None
        The epoch whose weights the model got back; None without validation data.
    """

    best_epoch: int | None = None


def fit(
    model: VAE,
    x_train: Tensor,
    x_val: Tensor | None = None,
    *,
    epochs: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    schedule: str = "constant",
    prior_warmup: float = 0.0,
    patience: int | None = None,
    min_delta: float = 0.0,
    seed: int = 0,
    transform: Callable[[Tensor], Tensor] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    on_epoch_end: Callable[[dict[str, Any]], object] | None = None,
) -> History:
    """Train a VAE and its prior on data in memory.

    Parameters
    ----------
    model : VAE
        Trained in place, on its own device and in its own dtype; batches are moved there.
    x_train : Tensor [N, *input_shape]
        Floating point, or anything that `transform` makes so. An incomplete last batch is dropped;
        N <= batch_size is one batch of N.
    x_val : Tensor [M, *input_shape], optional
        Validation data. With it the model ends with the weights of its best epoch.
    epochs : int
        Epochs in all, those before a resumed checkpoint included.
    batch_size : int
    learning_rate : float
        Of the network's Adam, at its highest; the prior has its own.
    schedule : {"constant", "cosine"}
        How the network's learning rate changes over `epochs`; see :mod:`vmm_fast.schedules`.
        With a cosine a checkpoint is resumed with the same number of epochs alone.
    prior_warmup : float
        The share of all steps, in [0, 1), in which N(0, I) replaces the prior, so that the prior
        starts from codes that are spread out. Without it all codes may lie in few components while
        the network has learnt little, and most components are lost. Epochs before the warm-up's end
        count neither as best nor as without improvement. Checkpoints are as with a cosine.
    patience : int, optional
        Stop after this many epochs in a row without an improvement of the validation ELBO.
    min_delta : float
        Nats by which the validation ELBO must rise to be an improvement (and the best so far).
    seed : int
        Seed of the batches' order, of the posterior's noise and of the validation noise.
    transform : callable, optional
        Applied to every batch on the model's device, e.g. ``lambda x: x / 127.5 - 1`` for uint8.
    augment : callable, optional
        Applied to every training batch after `transform`, at random if it likes, e.g.
        :class:`vmm_fast.models.RandomShifts`. Must be the same when a checkpoint is resumed.
    checkpoint : path-like, optional
        Written after every epoch, whole or not at all; a file that is there is replaced.
    resume : bool
        Go on from `checkpoint`.
    progress : bool
        Show progress on stderr (needs tqdm): a bar on a terminal, else a line in every tenth.
    on_epoch_end : callable, optional
        Called with the epoch's dict (see `History`) after the checkpoint was written. It may draw
        random numbers and switch the model to evaluation mode without changing the training.

    Returns
    -------
    History
        All epochs, those before a resumed checkpoint included.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; if the checkpoint is unreadable or of another run.
    FileNotFoundError
        If `resume` is set and there is no checkpoint, or if its folder does not exist.
    FloatingPointError
        If a term of the loss is not finite. The model keeps the weights of that step; the
        checkpoint holds the last complete epoch and the best weights so far.
    ImportError
        If `progress` is set and tqdm is not installed.

    Notes
    -----
    The caller's random number generators and the model's mode are what they were before, also after
    an exception or Ctrl-C.

    Examples
    --------
    >>> from vmm_fast.models import VAE
    >>> model, x = VAE(input_shape=4, latent_dim=2, hidden=(16,)), torch.randn(256, 4)
    >>> history = fit(model, x[64:], x[:64], epochs=2, batch_size=64)
    >>> len(history), history.best_epoch in (1, 2)
    (2, True)
    """
    _check_arguments(epochs, batch_size, learning_rate, patience, min_delta, seed, x_val)
    check_choice("schedule", schedule, SCHEDULES)
    share = isinstance(prior_warmup, int | float) and not isinstance(prior_warmup, bool)
    if not share or not 0 <= prior_warmup < 1:
        raise ValueError(f"prior_warmup must be in [0, 1), but is {prior_warmup!r}")
    if augment is not None and not callable(augment):
        raise TypeError(f"augment must be callable, but is {augment!r}")
    path = _checkpoint_path(checkpoint, resume)
    was_training = model.training
    try:
        with own_random_state(model):
            run = _Run(
                model,
                x_train,
                x_val,
                epochs,
                batch_size,
                learning_rate,
                schedule,
                prior_warmup,
                seed,
                transform,
                augment,
            )
            if resume:
                assert path is not None
                run.load(path)
            with _progress(epochs, run, progress) as show:
                while run.epoch < epochs and (patience is None or run.stale < patience):
                    record = run.one_epoch(min_delta)
                    if path is not None:
                        save_atomically(path, run.state())
                    show(record)
                    if on_epoch_end is not None:
                        with own_random_state(model):
                            on_epoch_end(dict(record))
            if run.best_weights is not None:
                model.load_state_dict(run.best_weights)
    finally:
        model.train(was_training)
    return run.history


class _Run:
    """The state of a training run: `state` returns it for a checkpoint, `load` restores it."""

    def __init__(
        self,
        model: VAE,
        x_train: Tensor,
        x_val: Tensor | None,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        schedule: str,
        prior_warmup: float,
        seed: int,
        transform: Callable[[Tensor], Tensor] | None,
        augment: Callable[[Tensor], Tensor] | None,
    ) -> None:
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.model, self.transform, self.augment = model, transform, augment
        self.batch_size, self.seed = batch_size, seed
        self.learning_rate, self.schedule, self.epochs = learning_rate, schedule, epochs
        self.steps = max(1, len(x_train) // batch_size)  # of an epoch
        self.warmup_steps = int(prior_warmup * epochs * self.steps)
        self.normal = StandardNormalPrior(model.latent_dim)
        self.x_train, self.x_val = x_train, x_val
        for name, x in (("x_train", x_train), ("x_val", x_val)):
            if x is not None:
                self.check_data(name, x)

        # Raises an error before the training if prior and encoder do not fit together.
        with torch.no_grad():
            model.prior.components(model.encode)

        # Fused: eight times faster on a CPU. Prior parameters have no gradient, hence are skipped.
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=learning_rate, eps=ADAM_EPS, fused=True
        )
        self.shuffle = torch.Generator().manual_seed(seed)
        seed_noise(seed, self.device)
        self.epoch = 0
        self.history = History()
        self.best_elbo = -math.inf
        self.best_weights: dict[str, Any] | None = None
        self.stale = 0  # epochs since the last improvement
        self.settings = {
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "schedule": schedule if schedule == "constant" else f"{schedule}, {epochs} epochs",
            "prior_warmup": f"{prior_warmup} of {epochs} epochs" if prior_warmup else "none",
            "seed": seed,
            "augment": "none" if augment is None else _name(augment),
            "length of x_train": len(x_train),
            "checksum of x_train": _checksum(x_train),
            "checksum of x_val": None if x_val is None else _checksum(x_val),
            "length of x_val": None if x_val is None else len(x_val),
            "model": model.extra_repr(),
            "prior": repr(model.prior),
            **{
                f"model's {name}": f"{value.dtype} {list(value.shape)}"
                for name, value in model.state_dict().items()
                if isinstance(value, Tensor)
            },
        }

    def batch(self, x: Tensor) -> Tensor:
        """Return rows of the data in the form that the model takes."""
        x = x.to(self.device)
        return (x if self.transform is None else self.transform(x)).to(self.dtype)

    def augmented(self, x: Tensor) -> Tensor:
        """Return a batch after the augmentation."""
        assert self.augment is not None
        found = self.augment(x)
        if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
            kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else found
            raise ValueError(
                f"augment must give {x.dtype} {list(x.shape)} as it was given, but gave {kind}"
            )
        return found

    def check_data(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise TypeError(f"{name} must be a tensor [N, *input_shape], but is {type(x).__name__}")
        if len(x) == 0:
            raise ValueError(f"{name} must have at least one row, but is empty")
        for start in range(0, len(x), CHECK_ROWS):
            rows = x[start : start + CHECK_ROWS].to(self.device)
            try:
                self.model.check_data(rows if self.transform is None else self.transform(rows))
            except (TypeError, ValueError) as error:
                after = "" if self.transform is None else " after `transform`"
                message = f"{name}, rows from {start}{after}: {error}"
                if isinstance(error, TypeError) and self.transform is None:
                    message += "; pass x.float(), or a `transform` that makes a batch so"
                raise type(error)(message) from None

    def one_epoch(self, min_delta: float) -> dict[str, Any]:
        """Train and validate for an epoch, update history and best weights; return the record."""
        start = time.perf_counter()
        train = self.train()
        validation: Sequence[float | None] = [None] * 3
        components_active = None
        if self.x_val is not None:
            validation, components_active = self.validate(self.x_val)
        self.epoch += 1

        values = (
            self.epoch,
            time.perf_counter() - start,
            *train,
            *validation,
            _number(self.model.scale),
            _number(getattr(self.model.prior, "concentration", None)),
            components_active,
        )
        record: dict[str, Any] = dict(zip(RECORD, values, strict=True))
        self.history.append(record)
        if self.x_val is not None and self.stand_in(self.epoch * self.steps - 1) is None:
            elbo = record["validation_elbo"]
            self.stale += 1
            if elbo > self.best_elbo + min_delta:
                self.stale = 0
                self.best_elbo = elbo
                self.best_weights = copy.deepcopy(self.model.state_dict())
                self.history.best_epoch = self.epoch
        return record

    def stand_in(self, step: int) -> StandardNormalPrior | None:
        """Return N(0, I) as the prior of a warm-up step, None for later steps."""
        return self.normal if step < self.warmup_steps else None

    def train(self) -> list[float]:
        """Take every step of an epoch; return the mean ELBO, log-likelihood and KL."""
        model, n, steps = self.model, len(self.x_train), self.steps
        model.train()
        order = torch.randperm(n, generator=self.shuffle).to(self.x_train.device)
        totals = [0.0] * 3
        for step in range(steps):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            done = self.epoch * steps + step
            share = learning_rate_share(self.schedule, done, self.epochs * steps)
            self.optimizer.param_groups[0]["lr"] = share * self.learning_rate
            x = self.batch(self.x_train[rows])
            if self.augment is not None:
                x = self.augmented(x)
            with self.diverging(f"training step {step + 1}"):
                prior = self.stand_in(done)
                terms = model.elbo(x, prior)
                elbo = terms.elbo.mean()
                values = torch.stack([elbo, terms.log_likelihood.mean(), terms.kl.mean()]).tolist()
                self.check_finite(values)
                self.optimizer.zero_grad()
                (-elbo).backward()
                self.optimizer.step()
                if prior is None:
                    model.prior.update(terms.z.detach(), model.encode)
            totals = [total + value for total, value in zip(totals, values, strict=True)]
        return [total / steps for total in totals]

    @torch.no_grad()
    def validate(self, x_val: Tensor) -> tuple[list[float], int]:
        """Return the mean ELBO, log-likelihood and KL, and the number of active components."""
        model = self.model
        model.eval()
        prior = self.stand_in((self.epoch + 1) * self.steps - 1)
        totals, means = [0.0] * 3, []
        with own_random_state(model), self.diverging("validation"):
            seed_noise(self.seed, self.device)
            for start in range(0, len(x_val), self.batch_size):
                terms = model.elbo(self.batch(x_val[start : start + self.batch_size]), prior)
                sums = torch.stack([term.sum() for term in terms[:3]]).tolist()
                totals = [total + value for total, value in zip(totals, sums, strict=True)]
                means.append(terms.q.mean)
            values = [total / len(x_val) for total in totals]
            self.check_finite(values)
            components = model.prior.components(model.encode)
            return values, len(components.active_components(torch.cat(means)))

    def check_finite(self, values: list[float]) -> None:
        names = ("log-likelihood", "KL")
        bad = [f"{n} {v}" for n, v in zip(names, values[1:], strict=True) if not math.isfinite(v)]
        if bad:
            raise FloatingPointError(" and ".join(bad))

    @contextmanager
    def diverging(self, where: str) -> Iterator[None]:
        """Turn errors in a ``with`` block into one that says where it was and what to do."""
        try:
            yield
        except (FloatingPointError, ValueError) as error:  # data were checked: it has diverged
            raise FloatingPointError(
                f"epoch {self.epoch + 1}, {where}: {error}. Lower learning_rate (of `fit` or of "
                "the prior), or bring the data to a range near [-1, 1]; a checkpoint, if asked "
                "for, holds the last complete epoch and the best weights so far"
            ) from error

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "versions": {"torch": str(torch.__version__)},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "noise": noise_state(self.device),
            "shuffle": self.shuffle.get_state(),
            "epoch": self.epoch,
            "history": list(self.history),
            "best_epoch": self.history.best_epoch,
            "best_weights": self.best_weights,
        }

    def load(self, path: Path) -> None:
        """Restore a checkpoint; if it does not fit, raise ValueError and change nothing."""
        what = f"checkpoint {str(path)!r}"
        try:
            state = load_checked(path)
        except ValueError as error:
            raise ValueError(f"{what} cannot be read (damaged, or not written by `fit`)") from error
        check(what, state, table({"settings": table({}, plain)}))
        settings = state["settings"]
        differ = [
            f"{key}: {settings.get(key, 'absent')} in the checkpoint, "
            f"{self.settings.get(key, 'absent')} now"
            for key in {**self.settings, **settings}
            if settings.get(key) != self.settings.get(key)
        ]
        if differ:
            more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise ValueError(f"{what} is of another run: {'; '.join(differ[:5])}{more}")
        check(what, state, self.check)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_noise_state(state["noise"], self.device)
        self.shuffle.set_state(state["shuffle"])
        self.history = History(state["history"])
        self.epoch = len(self.history)
        best = self.history.best_epoch = state["best_epoch"]
        if best is not None:
            self.best_weights = state["best_weights"]
            self.best_elbo = self.history[best - 1]["validation_elbo"]
            self.stale = self.epoch - best

    def check(self, name: str, state: Any) -> None:
        """Raise ValueError unless every entry of a checkpoint is like one that `state` returns."""
        weights = weights_of(self.model.state_dict())
        rows = list_of(self.check_record, least=1)
        noise = table({"cpu": generator_state}, tensor(torch.uint8, [16]))  # the others: GPUs
        table({"model": weights, "noise": noise, "shuffle": generator_state, "history": rows})(
            name, state
        )
        epochs = len(state["history"])
        for epoch, record in enumerate(state["history"], 1):
            whole(epoch, epoch)(f"history[{epoch - 1}].epoch", record["epoch"])
        best = none if state.get("best_weights") is None else whole(1, epochs)
        table({"best_epoch": best, "epoch": whole(epochs, epochs)})(name, state)
        table({"best_weights": none if state["best_epoch"] is None else weights})(name, state)
        try:
            check_adam_state(self.optimizer, state.get("optimizer"))
            check_same_settings(self.optimizer, state["optimizer"], scheduled=True)
            trial = copy.deepcopy(self.model)
            for key in ("model", "best_weights"):
                if state[key] is not None:
                    trial.load_state_dict(state[key])
                    if isinstance(self.model.prior, LearntPrior):
                        self.model.prior.check_same_run(state[key]["prior._extra_state"])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error

    def check_record(self, name: str, record: Any) -> None:
        """Raise ValueError unless a record is like one that `one_epoch` returns."""
        validated = self.x_val is not None
        values = {
            "seconds": number("of at least 0", lambda x: x >= 0),
            **{f"train_{term}": number() for term in TERMS},
            **{f"validation_{term}": number() if validated else none for term in TERMS},
            "scale": optional(number()),
            "concentration": optional(number()),
            "components_active": optional(whole()) if validated else none,
        }
        table({"epoch": whole(1), **values}, None)(name, record)


def _name(function: Callable[..., Any]) -> str:
    """Return the name of a function or of an object's class, the same in another process."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def _checksum(x: Tensor) -> int:
    """Return a checksum of all values, which prevents resuming a checkpoint on other data."""
    return zlib.adler32(x.detach().cpu().contiguous().numpy().tobytes())


def _number(value: Tensor | float | None) -> float | None:
    return None if value is None else float(torch.as_tensor(value).detach())


def _check_arguments(
    epochs: int,
    batch_size: int,
    learning_rate: float,
    patience: int | None,
    min_delta: float,
    seed: int,
    x_val: Tensor | None,
) -> None:
    for name, value, least in (
        ("epochs", epochs, 1),
        ("batch_size", batch_size, 1),
        ("patience", 1 if patience is None else patience, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, but is {value!r}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, but is {learning_rate!r}")
    if not 0 <= min_delta < math.inf:
        raise ValueError(f"min_delta must be at least 0 and finite, but is {min_delta!r}")
    if patience is not None and x_val is None:
        raise ValueError(f"patience ({patience}) needs x_val, but that is None")


def _checkpoint_path(checkpoint: str | os.PathLike[str] | None, resume: bool) -> Path | None:
    if checkpoint is None:
        if resume:
            raise ValueError("resume=True needs checkpoint, but that is None")
        return None
    path = Path(checkpoint)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint's folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise ValueError(f"checkpoint must be a file, but {str(path)!r} is a folder")
    if resume and not path.exists():
        raise FileNotFoundError(
            f"resume=True, but checkpoint {str(path)!r} does not exist; leave resume out to start"
        )
    return path


@contextmanager
def _progress(epochs: int, run: _Run, wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that shows an epoch's record on a line that fits into 80 columns."""
    if not wanted:
        yield lambda record: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install vmm-fast[cli]") from error

    bar = tqdm(
        total=epochs,
        initial=run.epoch,
        disable=not sys.stderr.isatty(),
        bar_format="epoch {n_fmt}/{total_fmt} |{bar}| {desc}ETA {remaining}",
        dynamic_ncols=True,
    )

    def show(record: dict[str, Any]) -> None:
        of = "train" if record["validation_elbo"] is None else "validation"
        fields = [f"ELBO {record[f'{of}_elbo']:.1f}", f"KL {record[f'{of}_kl']:.1f}"]
        if record["components_active"] is not None:
            fields.append(counted(record["components_active"], "active component"))
        if bar.disable:
            seconds = sum(epoch["seconds"] for epoch in run.history)
            print_progress(run.epoch, epochs, seconds, ", ".join(fields))
        bar.set_description_str(", ".join([*fields, ""]), refresh=False)
        bar.update()

    with bar:
        yield show
