"""The VMM prior in a module of Lightning, with its warm-up and its clusters.

    python examples/lightning_module.py [epochs]

Trains on scikit-learn's 1,797 digits (8 x 8) and prints the clusters of the held-out ones.
"""

import sys

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from vmm_fast import StandardNormalPrior, VMMPrior

LATENT_DIM, PIXELS = 8, 64


class LitVAE(lightning.LightningModule):
    """A VAE of perceptrons; N(0, I) stands in for the prior during a tenth of all steps."""

    def __init__(self, start, data_size):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT_DIM))
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM, 256), nn.ReLU(), nn.Linear(256, PIXELS))
        self.prior = VMMPrior(start, LATENT_DIM, data_size=data_size)
        self.normal = StandardNormalPrior(LATENT_DIM)

    def encode(self, x):
        """Return q(z | x); the prior calls this for its pseudo-inputs, too."""
        mean, raw = self.body(x).chunk(2, -1)
        return Independent(Normal(mean, softplus(raw) + 1e-4), 1)

    def training_step(self, batch, _):
        """Return the negative ELBO, in nats per image."""
        (x,) = batch
        q = self.encode(x)
        z = q.rsample()
        self.learning = self.global_step >= 0.1 * self.trainer.estimated_stepping_batches
        kl = (self.prior if self.learning else self.normal).kl(q, self.encode, z=z).mean()
        self.z = z.detach()
        return kl + 0.5 * PIXELS * (x - self.decoder(z)).square().mean().log()

    def on_train_batch_end(self, *_):
        """Let the prior learn, after the optimizer's step."""
        if self.learning:
            self.prior.update(self.z, self.encode)

    def configure_optimizers(self):
        """Return an optimizer; the prior's parameters get no gradient from ``kl``."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(epochs: int) -> None:
    """Train the VAE and report its clusters."""
    lightning.seed_everything(0, verbose=False)
    x = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    x, held_out = x[:1500], x[1500:]
    model = LitVAE(x[torch.randperm(len(x))[:50]], data_size=len(x))
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=128, shuffle=True))
    with torch.no_grad():
        clusters = model.prior.clusters(model.encode(x).mean, model.encode)
        labels = clusters.assign(model.encode(held_out).mean).labels
    print(
        f"{clusters.num_clusters} clusters; held-out images in each: {labels.bincount().tolist()}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
