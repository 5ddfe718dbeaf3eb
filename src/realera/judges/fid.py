"""Fréchet Inception distance between two sets of images (Heusel et al. 2017, arXiv 1706.08500), by torch-fidelity: its
port of TensorFlow's Inception and its formula. How images get to 299 x 299 is a setting, because it moves the number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from realera.contracts import UserError
from realera.files import finite
from realera.judges.images import check_batch, read_rgb, refuse_nan
from realera.judges.resources import out_of_reach, torch_device
from realera.setting_types import Batch, File, TorchDevice

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger(__name__)

Layer = Literal["64", "192", "768", "2048", 64, 192, 768, 2048]
Resize = Literal["clean", "tensorflow"]
_SIDE = 299  # pixels, of Inception
_SOURCE = "https://github.com"


class FidJudge:
    """{"fid": the distance}, 0 or more, lower is closer. It is biased upwards in small sets: below as many images as
    the layer has features a warning says so, and only numbers of equally many images compare.

    weights: torch-fidelity's file; None: downloaded once. layer: which of Inception's averaged layers; papers take
    "2048". resize: "clean", PIL's antialiased bicubic (clean-fid's choice, Parmar et al. 2022; here rounded to whole
    grey levels, there not), or "tensorflow", torch-fidelity's own, without antialiasing, as in the first paper. batch:
    images at once. Raises UserError where the library or the weights are missing.
    """

    name = "fid"

    def __init__(
        self,
        weights: File | None = None,
        layer: Layer = "2048",
        resize: Resize = "clean",
        device: TorchDevice = "auto",
        batch: Batch = 32,
    ) -> None:
        self.batch, self.layer, self.resize = check_batch(batch), str(layer), resize
        if self.layer not in get_args(Layer):
            raise UserError(
                f"judge.layer={layer} is none of Inception's: use {', '.join(map(str, get_args(Layer)[:4]))}"
            )
        if resize not in get_args(Resize):
            raise UserError(f"judge.resize={resize} is unknown: use {' or '.join(get_args(Resize))}")
        try:
            from torch_fidelity.utils import create_feature_extractor
        except ImportError as error:
            raise UserError(
                f"judge=fid needs a package that is not here ({error}): pip install 'realera[fid]', or pip install "
                "torch-fidelity"
            ) from None
        self.device = torch_device(device)
        file = None if weights is None else _checked(Path(weights).expanduser())
        if file is None and not _downloaded() and out_of_reach(_SOURCE):
            raise _lacking("they are not on this disk and their server does not answer")
        try:
            self.net = create_feature_extractor(
                "inception-v3-compat",
                [self.layer],
                cuda=False,
                verbose=False,
                feature_extractor_weights_path=None if file is None else str(file),
            ).to(self.device)
        except Exception as error:  # whatever a download or a torn file raises
            raise _lacking((str(error) or repr(error)).strip().splitlines()[0][:160]) from error

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]:
        """Raises UserError for a set of fewer than two images, and for one that cannot be read."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

        fewest = min(len(images), len(references))
        if fewest < 2:
            raise UserError(f"judge=fid compares sets and was given one of {fewest} images: give both two or more")
        if fewest < int(self.layer):
            log.warning(
                "FID from %d and %d images is biased upwards: the covariance of %s features needs more of them. "
                "Compare it only with an FID from equally many.",
                len(images),
                len(references),
                self.layer,
            )
        known, made = (fid_features_to_statistics(self._features(paths).double()) for paths in (references, images))
        return {"fid": max(float(fid_statistics_to_metric(known, made, verbose=False)[KEY_METRIC_FID]), 0.0)}

    def _features(self, paths: Sequence[Path]) -> Tensor:
        """(images, features) on the CPU."""
        import torch

        found: list[Tensor] = []
        for start in range(0, len(paths), self.batch):
            pixels = [self._read(path) for path in paths[start : start + self.batch]]
            alike = len({picture.shape for picture in pixels}) == 1
            before = len(found)
            for part in [pixels] if alike else [[picture] for picture in pixels]:
                stack = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in part])
                with torch.no_grad():
                    found.append(self.net(stack.to(self.device))[0].cpu())
            sums = torch.cat(found[before:]).double().sum(dim=-1, keepdim=True).tolist()
            refuse_nan(self.name, paths[start : start + self.batch], sums, "get its weights again")
        return torch.cat(found)

    def _read(self, path: Path) -> np.ndarray:
        """(H, W, 3) uint8, a copy of its own."""
        return read_rgb(Path(path), _SIDE if self.resize == "clean" else None).copy()

    def protocol(self) -> dict[str, Any]:
        """Which distance it is."""
        from importlib.metadata import version

        return {
            "judge": self.name,
            "version": 1,
            "package": f"torch-fidelity {version('torch-fidelity')}",
            "layer": self.layer,
            "resize": self.resize,
        }


def _checked(weights: Path) -> Path:
    """The file, if it holds tensors alone: torch-fidelity itself would unpickle anything."""
    import torch

    try:
        if not weights.is_file():  # a pipe would be waited for
            raise FileNotFoundError(f"{weights} is no file")
        content = torch.load(weights, map_location="cpu", weights_only=True)
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if (bad := finite.first_bad(tensors)) is not None:
            raise ValueError(f"{bad} holds NaN or infinity")
    except Exception as error:
        reason = (str(error) or repr(error)).strip().splitlines()[0][:160]
        raise UserError(
            f"judge.weights={weights} cannot be read as tensors alone ({reason}): give torch-fidelity's own file, "
            "weights-inception-2015-12-05-6726825d.pth"
        ) from None
    return weights


def _downloaded() -> bool:
    """Whether torch's own cache holds Inception's weights."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return (Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]).is_file()


def _lacking(reason: str) -> UserError:
    return UserError(
        f"Inception's weights cannot be had ({reason}): connect once to download them (92 MB), point TORCH_HOME at a "
        "cache that holds them, or give judge.weights=FILE."
    )
