"""GIPHY's celebrity network, and its handling of several faces in one image.

The network is a ResNet-50 without its last layer, a linear layer to an embedding of width 256, and a linear layer to
the labels. It also stores the centres of the labels' embeddings, from the centre loss of its training. Faces are (B, 3,
224, 224) in 0-1, not normalised by mean and deviation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 256  # width of an embedding
RIDGE = 1e-6  # added to the variances, as scikit-learn does
ROUNDS, STILL = 100, 1e-3  # scikit-learn's maximum of iterations, and the gain in mean log-likelihood that stops them


class CelebrityNet(nn.Module):
    """Faces -> (probabilities (B, labels), embeddings (B, 256)). centers: (labels, 256)."""

    centers: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        import torchvision

        layers = list(torchvision.models.resnet50(weights=None).children())
        self.stem = nn.Sequential(*layers[:-1])
        self.fc1 = nn.Linear(layers[-1].in_features, WIDTH)
        self.fc2 = nn.Linear(WIDTH, labels)
        self.register_buffer("centers", torch.zeros(labels, WIDTH))

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.fc1(self.stem(faces).flatten(1))
        return self.fc2(embedding).softmax(dim=-1), embedding

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state of GIPHY's trainer, with keys such as "model.stem.0.weight", "center_loss_criterion.centers".
        The state has no num_batches_tracked, which an older torch did not have and which is not used here. Raises
        RuntimeError if a tensor is missing, unexpected or of another shape.
        """
        loaded = {
            key.removeprefix("model.").replace("center_loss_criterion.", ""): value for key, value in state.items()
        }
        fresh = {key: value for key, value in self.state_dict().items() if key.endswith("num_batches_tracked")}
        self.load_state_dict({**fresh, **loaded})


def groups(chances: np.ndarray, embeddings: np.ndarray, centers: np.ndarray) -> list[list[int]]:
    """Groups the faces of an image by person: lists of row numbers, the largest group first.

    chances (n, labels), embeddings (n, 256), centers (labels, 256). The groups are the components of a Gaussian mixture
    with one shared covariance, started at the centres of the faces' likeliest labels, as in GIPHY's code with
    scikit-learn.
    """
    if len(chances) < 2:
        return [[row] for row in range(len(chances))]
    counted = Counter(chances.argmax(axis=1).tolist())
    weights = np.array(list(counted.values())) / len(chances)
    chosen = mixture(embeddings.astype(np.float64), centers[list(counted)].astype(np.float64), weights)
    members = [[row for row, at in enumerate(chosen) if at == group] for group in dict.fromkeys(chosen)]
    return sorted(members, key=len, reverse=True)


def mixture(points: np.ndarray, means: np.ndarray, weights: np.ndarray) -> list[int]:
    """The component of each point (n, d), after expectation-maximisation from means (k, d) and weights (k,).

    The first covariance comes from a k-means, as in scikit-learn. Here the k-means also starts at `means`;
    scikit-learn's starts at random points.
    """
    _, _, covariance = _fitted(points, _k_means(points, means))
    before = -np.inf
    for _ in range(ROUNDS):
        densities = _log_densities(points, weights, means, covariance)
        top = densities.max(axis=1, keepdims=True)
        total = top + np.log(np.exp(densities - top).sum(axis=1, keepdims=True))
        now = float(total.mean())
        weights, means, covariance = _fitted(points, np.exp(densities - total))
        if abs(now - before) < STILL:
            break
        before = now
    chosen: list[int] = _log_densities(points, weights, means, covariance).argmax(axis=1).tolist()
    return chosen


def _k_means(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    """(n, k): 1 for the cluster of each point, else 0."""
    belongs = np.zeros((len(points), len(means)))
    for _ in range(ROUNDS):
        nearest = ((points[:, None] - means[None]) ** 2).sum(axis=-1).argmin(axis=1)
        before, belongs = belongs, np.eye(len(means))[nearest]
        if np.array_equal(before, belongs):
            break
        counts = belongs.sum(axis=0)[:, None]
        means = np.where(counts > 0, belongs.T @ points / np.maximum(counts, 1), means)
    return belongs


def _fitted(points: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (k,), means (k, d) and the shared covariance (d, d)."""
    counts = shares.sum(axis=0) + 10 * np.finfo(np.float64).eps
    means = shares.T @ points / counts[:, None]
    covariance = (points.T @ points - (counts[:, None] * means).T @ means) / counts.sum()
    return counts / counts.sum(), means, covariance + RIDGE * np.eye(points.shape[1])


def _log_densities(points: np.ndarray, weights: np.ndarray, means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(n, k): log weight + log density, without the constant."""
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    apart = ((points @ whiten)[:, None] - (means @ whiten)[None]) ** 2
    bent: np.ndarray = np.log(weights) + np.log(np.diag(whiten)).sum() - apart.sum(axis=-1) / 2
    return bent


def joint_probability(chances: np.ndarray) -> np.ndarray:
    """(n, labels) of one person's faces -> (labels,): the product over faces, normalised to sum 1. Computed in
    logarithms, because the product over many faces would underflow to 0."""
    with np.errstate(divide="ignore"):
        summed = np.log(chances.astype(np.float64)).sum(axis=0)
    if np.isneginf(summed).all():  # every label has probability 0 for some face
        summed = np.zeros_like(summed)
    shares: np.ndarray = np.exp(summed - summed.max())
    result: np.ndarray = shares / shares.sum()
    return result


def likeness(embeddings: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(n,): the cosine of each embedding with its centre."""
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(centers, axis=1)
    cosines: np.ndarray = (embeddings * centers).sum(axis=1) / np.maximum(lengths, 1e-12)
    return cosines


def read_state(path: Any) -> dict[str, Tensor]:
    """The tensors of GIPHY's state file, read with weights_only=True, so that no code in the file is run. Raises the
    exceptions of torch.load."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = content["model_state"]
    return state


def stacked(faces: Sequence[np.ndarray]) -> Tensor:
    """(224, 224, 3) uint8 each -> (B, 3, 224, 224) in 0-1."""
    return torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).float() / 255
