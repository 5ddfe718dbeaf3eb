"""Fréchet Inception distance between two sets of images (Heusel et al. 2017, arXiv 1706.08500), with torch-fidelity's
port of TensorFlow's Inception and its formula. Resizing to 299 x 299 is a setting, because it changes the number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from realera.contracts import UserError
from realera.files import finite
from realera.judges.images import check_batch, read_rgb, refuse_nan
from realera.judges.resources import torch_device, unreachable
from realera.setting_types import Batch, File, TorchDevice

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger(__name__)

Layer = Literal["64", "192", "768", "2048", 64, 192, 768, 2048]
Resize = Literal["clean", "tensorflow"]
_SIDE = 299  # pixels; Inception's input size
_SOURCE = "https://github.com"


class FidJudge:
    """{"fid": the distance}, 0 or more; lower means closer. Small sets are biased upwards, so compare only values from
    equally many images. A warning is logged if a set has fewer images than the layer has features.

    weights: torch-fidelity's file; None: downloaded once. layer: the averaged Inception layer; papers use "2048".
    resize: "clean" is PIL's antialiased bicubic (as clean-fid, Parmar et al. 2022, but rounded to whole grey levels);
    "tensorflow" is torch-fidelity's own, without antialiasing, as in the first paper. batch: images at once. Raises
    UserError if the library or the weights are missing.
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
                f"judge.layer={layer} is not a layer of Inception: use {', '.join(map(str, get_args(Layer)[:4]))}"
            )
        if resize not in get_args(Resize):
            raise UserError(f"judge.resize={resize} is unknown: use {' or '.join(get_args(Resize))}")
        try:
            from torch_fidelity.utils import create_feature_extractor
        except ImportError as error:
            raise UserError(
                f"judge=fid needs a missing package ({error}): pip install 'realera[fid]', or pip install "
                "torch-fidelity"
            ) from None
        self.device = torch_device(device)
        file = None if weights is None else _checked(Path(weights).expanduser())
        if file is None and not _downloaded() and unreachable(_SOURCE):
            raise _unavailable("they are not on this disk, and the server does not answer")
        try:
            self.net = create_feature_extractor(
                "inception-v3-compat",
                [self.layer],
                cuda=False,
                verbose=False,
                feature_extractor_weights_path=None if file is None else str(file),
            ).to(self.device)
        except Exception as error:  # a download or a torn file can raise any exception
            raise _unavailable((str(error) or repr(error)).strip().splitlines()[0][:160]) from error

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]:
        """Raises UserError if a set has fewer than two images, or an image cannot be read."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

        fewest = min(len(images), len(references))
        if fewest < 2:
            raise UserError(f"judge=fid compares two sets, and one has {fewest} images: give two or more in each")
        if fewest < int(self.layer):
            log.warning(
                "FID from %d and %d images is biased upwards: the covariance of %s features needs more images. "
                "Compare it only with an FID from equally many images.",
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
        """(H, W, 3) uint8, writable."""
        return read_rgb(Path(path), _SIDE if self.resize == "clean" else None).copy()

    def protocol(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "judge": self.name,
            "version": 1,
            "package": f"torch-fidelity {version('torch-fidelity')}",
            "layer": self.layer,
            "resize": self.resize,
        }


def _checked(weights: Path) -> Path:
    """The file, if it contains only tensors: torch-fidelity itself would unpickle anything."""
    import torch

    try:
        if not weights.is_file():  # reading a pipe would block
            raise FileNotFoundError(f"{weights} is not a file")
        content = torch.load(weights, map_location="cpu", weights_only=True)
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if (bad := finite.first_bad(tensors)) is not None:
            raise ValueError(f"{bad} holds NaN or infinity")
    except Exception as error:
        reason = (str(error) or repr(error)).strip().splitlines()[0][:160]
        raise UserError(
            f"judge.weights={weights} does not contain only tensors ({reason}): give torch-fidelity's own file, "
            "weights-inception-2015-12-05-6726825d.pth"
        ) from None
    return weights


def _downloaded() -> bool:
    """Whether torch's cache has Inception's weights."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    result: bool = (Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]).is_file()
    return result


def _unavailable(reason: str) -> UserError:
    return UserError(
        f"Inception's weights cannot be loaded ({reason}): connect once to download them (92 MB), set TORCH_HOME to a "
        "cache that has them, or give judge.weights=FILE."
    )
