"""MTCNN, the face detector (Zhang et al. 2016, arXiv 1604.02878), in torch with the TensorFlow port's weights. Three
networks propose boxes on a pyramid of image sizes, refine them, and decide.

The TensorFlow port is translated from MATLAB: images are transposed, (B, 3, W, H), and pixels count from 1. Boxes are
(n, 5) float64: left, top, right, bottom, score. The box arithmetic equals the original's to the pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

CELL, STRIDE = 12, 2  # pixels: side of the proposal network's window, and its stride


class _Net(nn.Module):
    """A network whose layers have the names in the weights file."""

    def load(self, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Loads kernels (height, width, in, out) and matrices (in, out) in TensorFlow's layout. Raises KeyError if a
        layer is missing, and ValueError if it has another shape."""
        for name, module in self.named_children():
            if isinstance(module, nn.PReLU):
                _fill(module.weight, arrays[name]["alpha"], name)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                weights = arrays[name]["weights"]
                _fill(module.weight, weights.transpose(3, 2, 0, 1) if weights.ndim == 4 else weights.T, name)
                assert module.bias is not None
                _fill(module.bias, arrays[name]["biases"], name)


def _fill(parameter: Tensor, array: np.ndarray, name: str) -> None:
    if tuple(parameter.shape) != array.shape:
        raise ValueError(f"{name} is {array.shape}, not {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(array)))


class ProposalNet(_Net):
    """(B, 3, W, H) -> probability of a face (B, w, h) and box corrections (B, 4, w, h), one window every 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.PReLU1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.PReLU2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.PReLU3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.add_module("conv4-1", nn.Conv2d(32, 2, 1))
        self.add_module("conv4-2", nn.Conv2d(32, 4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(self.PReLU1(self.conv1(x)))
        x = self.PReLU3(self.conv3(self.PReLU2(self.conv2(x))))
        return self.get_submodule("conv4-1")(x).softmax(dim=1)[:, 1], self.get_submodule("conv4-2")(x)


class RefineNet(_Net):
    """(B, 3, 24, 24) -> (B,) and (B, 4)."""

    size = 24

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Linear(64 * 3 * 3, 128), nn.PReLU(128)
        self.add_module("conv5-1", nn.Linear(128, 2))
        self.add_module("conv5-2", nn.Linear(128, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.pool2(self.prelu2(self.conv2(x)))))
        x = self.prelu4(self.conv4(_flat(x)))
        return self.get_submodule("conv5-1")(x).softmax(dim=1)[:, 1], self.get_submodule("conv5-2")(x)


class OutputNet(_Net):
    """(B, 3, 48, 48) -> (B,) and (B, 4). The weights file's third output, five points of the face, is not used."""

    size = 48

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.conv5, self.prelu5 = nn.Linear(128 * 3 * 3, 256), nn.PReLU(256)
        self.add_module("conv6-1", nn.Linear(256, 2))
        self.add_module("conv6-2", nn.Linear(256, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu5(self.conv5(_flat(self.prelu4(self.conv4(x)))))
        return self.get_submodule("conv6-1")(x).softmax(dim=1)[:, 1], self.get_submodule("conv6-2")(x)


def _flat(x: Tensor) -> Tensor:
    """(B, C, w, h) -> (B, w h C), in TensorFlow's order."""
    return x.permute(0, 2, 3, 1).flatten(1)


class FaceDetector:
    """The three networks in sequence. Defaults are GIPHY's: faces of at least 20 pixels, thresholds .6, .7, .7, pyramid
    factor .709."""

    def __init__(
        self,
        nets: tuple[ProposalNet, RefineNet, OutputNet],
        device: str = "cpu",
        min_size: int = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        factor: float = 0.709,
    ) -> None:
        self.propose_net, self.refine_net, self.output_net = nets
        for net in nets:
            net.to(device).eval().requires_grad_(False)
        self.device, self.min_size, self.thresholds, self.factor = device, min_size, thresholds, factor

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (n, 5) boxes, the highest score first."""
        boxes = self._propose(image)
        if len(boxes):
            score, shift = self._score_boxes(self.refine_net, image, boxes)
            sure = score > self.thresholds[1]
            boxes, shift = np.hstack([boxes[sure, :4], score[sure, None]]), shift[sure]
            kept = suppress(boxes, 0.7)
            boxes = square(corrected(boxes[kept], shift[kept]))
        boxes = whole(boxes)
        if len(boxes):
            score, shift = self._score_boxes(self.output_net, image, boxes)
            sure = score > self.thresholds[2]
            boxes = corrected(np.hstack([boxes[sure, :4], score[sure, None]]), shift[sure])
            boxes = boxes[suppress(boxes, 0.7, of_smaller=True)]
        return boxes

    def _propose(self, image: np.ndarray) -> np.ndarray:
        """Boxes of the first network at all scales, made square and rounded to whole pixels."""
        import cv2

        height, width = image.shape[:2]
        found = [np.zeros((0, 9))]
        for scale in pyramid(min(height, width), self.min_size, self.factor):
            size = int(np.ceil(width * scale)), int(np.ceil(height * scale))
            pixels = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            chance, shift = self._run(self.propose_net, pixels[None].astype(np.float64))
            at = np.argwhere(chance[0] >= self.thresholds[0])
            corners = np.fix((STRIDE * at + 1) / scale), np.fix((STRIDE * at + CELL) / scale)
            index = tuple(at.T)
            boxes = np.hstack([*corners, chance[0][index][:, None], shift[0].transpose(1, 2, 0)[index]])
            found.append(boxes[suppress(boxes, 0.5)])
        boxes = np.concatenate(found)
        boxes = boxes[suppress(boxes, 0.7)]
        sides = np.tile(boxes[:, 2:4] - boxes[:, 0:2], 2)
        return whole(square(np.hstack([boxes[:, :4] + boxes[:, 5:9] * sides, boxes[:, 4:5]])))

    def _score_boxes(
        self, net: RefineNet | OutputNet, image: np.ndarray, boxes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n,) and corrections (n, 4) of the boxes' pixels; pixels outside the image are black."""
        import cv2

        looks = [cv2.resize(cut(image, box), (net.size, net.size), interpolation=cv2.INTER_AREA) for box in boxes]
        return self._run(net, np.stack(looks))

    def _run(self, net: nn.Module, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs a network on images (B, H, W, 3) from 0 to 255, after transposing them."""
        x = torch.from_numpy((pixels - 127.5) / 128).float().permute(0, 3, 2, 1).to(self.device)
        with torch.no_grad():
            chance, shift = net(x)
        return chance.cpu().numpy().astype(np.float64), shift.cpu().numpy().astype(np.float64)


def pyramid(side: int, min_size: int, factor: float) -> Iterator[float]:
    """The scales of the pyramid, while the shorter side has 12 pixels or more. At the first scale a face of min_size
    has 12 pixels."""
    scale = CELL / min_size
    left, step = side * scale, 0
    while left >= CELL:
        yield scale * factor**step
        left, step = left * factor, step + 1


def cut(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(h, w, 3) float64: the pixels left..right, top..bottom (counted from 1) of a box, black outside the image."""
    left, top, right, bottom = (int(edge) for edge in box[:4])
    height, width = image.shape[:2]
    out = np.zeros((bottom - top + 1, right - left + 1, 3))
    x0, y0, x1, y1 = max(left, 1), max(top, 1), min(right, width), min(bottom, height)
    if x0 <= x1 and y0 <= y1:
        out[y0 - top : y1 - top + 1, x0 - left : x1 - left + 1] = image[y0 - 1 : y1, x0 - 1 : x1]
    return out


def whole(boxes: np.ndarray) -> np.ndarray:
    """Rounds the boxes toward 0 to whole pixels and removes empty ones."""
    boxes = np.hstack([np.fix(boxes[:, :4]), boxes[:, 4:5]])
    return boxes[(boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1])]


def square(boxes: np.ndarray) -> np.ndarray:
    """Enlarges the boxes around their centres to squares with the longer side."""
    sides = boxes[:, 2:4] - boxes[:, 0:2]
    longer = sides.max(axis=1, keepdims=True, initial=-np.inf) if len(boxes) else sides[:, :1]
    corner = boxes[:, 0:2] + sides / 2 - longer / 2
    return np.hstack([corner, corner + longer, boxes[:, 4:5]])


def corrected(boxes: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Moves each edge by its correction, which is a share of the box's side."""
    sides = np.tile(boxes[:, 2:4] - boxes[:, 0:2] + 1, 2)
    return np.hstack([boxes[:, :4] + shift * sides, boxes[:, 4:5]])


def suppress(boxes: np.ndarray, overlap: float, of_smaller: bool = False) -> np.ndarray:
    """Non-maximum suppression: row numbers of the remaining boxes, the highest score first. A box is removed if its
    intersection with a better box is more than `overlap` of their union (of_smaller: of the smaller one's area)."""
    order = np.argsort(boxes[:, 4])
    area = (boxes[:, 2:4] - boxes[:, 0:2] + 1).prod(axis=1)
    kept = []
    while order.size:
        best, rest = order[-1], order[:-1]
        kept.append(best)
        least, most = np.maximum(boxes[best, :2], boxes[rest, :2]), np.minimum(boxes[best, 2:4], boxes[rest, 2:4])
        shared = np.maximum(0.0, most - least + 1).prod(axis=1)
        other = np.minimum(area[best], area[rest]) if of_smaller else area[best] + area[rest] - shared
        order = rest[shared / other <= overlap]
    return np.array(kept, dtype=np.int64)
