"""GIPHY's celebrity net, and what it does with several faces in one image.

ResNet-50 without its last layer, a bottleneck of 256 to the embedding, and a linear layer to the labels; beside it the
centres of the labels' embeddings, from the centre loss it was trained with. Faces are (B, 3, 224, 224) in 0-1, neither
mean nor deviation taken out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 256  # of an embedding
RIDGE = 1e-6  # added to the variances, as scikit-learn does
ROUNDS, STILL = 100, 1e-3  # its iterations at most, and the gain in mean log-likelihood that ends them


class CelebrityNet(nn.Module):
    """Faces -> (probabilities (B, labels), embeddings (B, 256)). `centers` (labels, 256)."""

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
        """The state as GIPHY's trainer saved it: "model.stem.0.weight", "center_loss_criterion.centers". Raises
        RuntimeError where a tensor is missing, of another shape or one too many.

        It was saved before torch counted BatchNorm's batches; that count is not used here.
        """
        mine = {key.removeprefix("model.").replace("center_loss_criterion.", ""): value for key, value in state.items()}
        fresh = {key: value for key, value in self.state_dict().items() if key.endswith("num_batches_tracked")}
        self.load_state_dict({**fresh, **mine})


def groups(chances: np.ndarray, embeddings: np.ndarray, centers: np.ndarray) -> list[list[int]]:
    """Rows of faces taken for one person's, the largest group first.

    chances (n, labels), embeddings (n, 256), centers (labels, 256). A Gaussian mixture with one covariance, begun at
    the centres of the faces' own first labels, as GIPHY's does with scikit-learn.
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

    The first covariance is that of a k-means, as in scikit-learn, begun at the means too: there, at points drawn with a
    seed.
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
    """(n, k): 1 where a point belongs, 0 elsewhere."""
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
    """(n, k), without the constant."""
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    apart = ((points @ whiten)[:, None] - (means @ whiten)[None]) ** 2
    bent: np.ndarray = np.log(weights) + np.log(np.diag(whiten)).sum() - apart.sum(axis=-1) / 2
    return bent


def together(chances: np.ndarray) -> np.ndarray:
    """(n, labels) of one person's faces -> (labels,): their product, of sum 1. In logarithms: many faces' product would
    be 0."""
    with np.errstate(divide="ignore"):
        summed = np.log(chances.astype(np.float64)).sum(axis=0)
    if np.isneginf(summed).all():  # every label is ruled out by some face
        summed = np.zeros_like(summed)
    shares: np.ndarray = np.exp(summed - summed.max())
    return shares / shares.sum()


def likeness(embeddings: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(n,): the cosine of each embedding with its centre."""
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(centers, axis=1)
    cosines: np.ndarray = (embeddings * centers).sum(axis=1) / np.maximum(lengths, 1e-12)
    return cosines


def read_state(path: Any) -> dict[str, Tensor]:
    """The tensors of GIPHY's state file, by torch's reader of weights alone: no code of the file's is run. Raises what
    that raises."""
    held = torch.load(path, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = held["model_state"]
    return state


def stacked(faces: Sequence[np.ndarray]) -> Tensor:
    """(224, 224, 3) uint8 each -> (B, 3, 224, 224) in 0-1."""
    return torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).float() / 255
