"""The VMM prior in a VAE of your own, here of convolutions: the three lines that change are marked.

    python examples/own_vae.py [epochs]

Trains on scikit-learn's 1,797 digits (8 x 8) and prints the loss and the clusters.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.functional import softplus

from vmm_fast import VMMPrior

LATENT_DIM, PIXELS, BATCH = 8, 64, 128


class Encoder(nn.Module):
    """An encoder q(z | x), which may return any Normal or MultivariateNormal."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 4, 2 * LATENT_DIM),
        )  # fmt: skip

    def forward(self, x):
        """Return the posterior of a batch [B, 1, 8, 8]."""
        mean, raw = self.layers(x).chunk(2, -1)
        return Independent(Normal(mean, softplus(raw) + 1e-4), 1)


def main(epochs: int) -> None:
    """Train the VAE and report its clusters."""
    torch.manual_seed(0)
    images, _ = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    encoder = Encoder()
    decoder = nn.Sequential(
        nn.Linear(LATENT_DIM, 64 * 4), nn.ReLU(), nn.Unflatten(1, (64, 2, 2)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1),
    )  # fmt: skip
    start = x[torch.randperm(len(x))[:50]]
    prior = VMMPrior(start, LATENT_DIM, data_size=len(x))  # 1. instead of N(0, I)
    network = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(network, lr=1e-3)

    for epoch in range(epochs):
        total = 0.0
        for batch in x[torch.randperm(len(x))].split(BATCH):
            q = encoder(batch)
            z = q.rsample()
            # The Gaussian likelihood at its maximum-likelihood scale, in nats per image.
            reconstruction = 0.5 * PIXELS * (batch - decoder(z)).square().mean().log()
            kl = prior.kl(q, encoder, z=z)  # 2. instead of KL(q || N(0, I))
            loss = reconstruction + kl.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            prior.update(z, encoder)  # 3. the prior learns, the network is held fixed
            total += loss.item() * len(batch)
        if epoch % 10 == 9 or epoch == epochs - 1:
            with torch.no_grad():
                clusters = prior.clusters(encoder(x).mean, encoder)
            print(
                f"epoch {epoch + 1}: loss {total / len(x):.1f}, clusters: {clusters.num_clusters}"
            )

    with torch.no_grad():
        labels, probability, _ = clusters.assign(encoder(x[:5]).mean)
    print("first images: clusters", labels.tolist(), "with probability", probability.tolist())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
