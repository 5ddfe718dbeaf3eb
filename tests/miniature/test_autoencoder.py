"""Whitening is folded into the autoencoder without changing its images."""

from __future__ import annotations

import numpy as np
import torch

from realera.miniature.autoencoder import encode_all, new_autoencoder, psnr, whiten
from realera.miniature.training_tools import to_tensor


def test_whitening_gives_unit_covariance_and_the_same_pictures():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = new_autoencoder().eval()
    pictures = rng.integers(0, 256, (40, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    batch = to_tensor(pictures[:4])
    with torch.no_grad():
        before = vae.decode(vae.encode(batch).latent_dist.mean).sample
    whiten(vae, pictures)
    with torch.no_grad():
        after = vae.decode(vae.encode(batch).latent_dist.mean).sample
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)
    latents = encode_all(vae, pictures).permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(torch.cov(latents.T), torch.eye(8), atol=2e-2, rtol=0)
    torch.testing.assert_close(latents.mean(0), torch.zeros(8), atol=1e-3, rtol=0)


def test_psnr_of_a_known_error():
    class Constant:
        """Draws every picture one grey level off."""

        def encode(self, batch):
            self.batch = batch
            return type("P", (), {"latent_dist": type("D", (), {"mean": batch})})

        def decode(self, latents):
            return type("S", (), {"sample": latents + 0.02})

    pictures = np.full((3, 8, 8, 3), 100, np.uint8)
    assert abs(psnr(Constant(), pictures) - 10 * np.log10(4 / 0.02**2)) < 0.01
