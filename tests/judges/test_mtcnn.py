"""The face detector against slow, obvious loops."""

import numpy as np
import pytest
import torch

from realera.judges.mtcnn_net import (
    FaceDetector,
    OutputNet,
    ProposalNet,
    RefineNet,
    corrected,
    cut,
    pyramid,
    square,
    suppress,
    whole,
)


def test_kernels_are_applied_to_the_transposed_image() -> None:
    """The first axis of the weights is x: out[o, x, y] = sum_ijc K[i, j, c, o] image[y + j, x + i, c]."""
    rng = np.random.default_rng(0)
    kernel, image = rng.normal(size=(3, 3, 3, 10)).astype(np.float32), rng.normal(size=(7, 9, 3)).astype(np.float32)
    net = ProposalNet()
    arrays = {"conv1": {"weights": kernel, "biases": np.zeros(10, np.float32)}}
    with pytest.raises(KeyError):
        net.load(arrays)  # the other layers are missing, but the first one is already loaded
    out = net.conv1(torch.from_numpy(image).permute(2, 1, 0)[None])[0]
    expected = np.zeros((10, 7, 5), np.float32)
    for x in range(7):
        for y in range(5):
            patch = image[y : y + 3, x : x + 3].transpose(1, 0, 2)
            expected[:, x, y] = np.einsum("ijco,ijc->o", kernel, patch)
    assert np.allclose(out.detach().numpy(), expected, atol=1e-4)


def test_a_matrix_reads_features_in_tensorflow_s_order() -> None:
    rng = np.random.default_rng(0)
    net = RefineNet()
    picture = torch.from_numpy(rng.normal(size=(1, 64, 3, 3)).astype(np.float32))
    weights = rng.normal(size=(576, 128)).astype(np.float32)
    with torch.no_grad():
        net.conv4.weight.copy_(torch.from_numpy(weights.T))
        net.conv4.bias.zero_()
    from realera.judges.mtcnn_net import _flat

    expected = np.einsum("cxy,xyco->o", picture[0].numpy(), weights.reshape(3, 3, 64, 128))
    assert np.allclose(net.conv4(_flat(picture))[0].detach().numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(("net", "size"), [(RefineNet(), 24), (OutputNet(), 48)])
def test_the_networks_accept_their_input_sizes(net: torch.nn.Module, size: int) -> None:
    chance, shift = net(torch.zeros(2, 3, size, size))
    assert chance.shape == (2,) and shift.shape == (2, 4)


def test_the_proposal_network_has_a_stride_of_two() -> None:
    chance, shift = ProposalNet()(torch.zeros(1, 3, 12, 12))
    assert chance.shape == (1, 1, 1) and shift.shape == (1, 4, 1, 1)
    assert ProposalNet()(torch.zeros(1, 3, 40, 21))[0].shape == (1, 15, 6)


def test_the_pyramid_ends_when_the_shorter_side_is_below_12_pixels() -> None:
    scales = list(pyramid(100, 20, 0.709))
    assert scales == pytest.approx([0.6 * 0.709**step for step in range(5)])
    assert 100 * scales[-1] >= 12 > 100 * scales[-1] * 0.709
    assert not list(pyramid(19, 20, 0.709))


def test_a_cut_box_is_black_outside_the_image() -> None:
    image = np.random.default_rng(0).integers(1, 255, (6, 5, 3)).astype(np.uint8)
    for left, top, right, bottom in [(1, 1, 5, 6), (-1, 0, 3, 4), (3, 4, 9, 8), (-3, -3, 9, 9), (7, 7, 9, 9)]:
        seen = cut(image, np.array([left, top, right, bottom, 0.5]))
        for row, y in enumerate(range(top, bottom + 1)):
            for column, x in enumerate(range(left, right + 1)):
                inside = 1 <= x <= 5 and 1 <= y <= 6
                assert (seen[row, column] == (image[y - 1, x - 1] if inside else 0)).all()


def test_boxes_that_overlap_a_better_one_are_removed() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 60, (40, 2)).astype(float)
    boxes = np.hstack([corners, corners + rng.integers(5, 30, (40, 2)), rng.permutation(40)[:, None] / 40])

    def share(a: np.ndarray, b: np.ndarray, of_smaller: bool) -> float:
        cells = [
            {(x, y) for x in range(int(r[0]), int(r[2]) + 1) for y in range(int(r[1]), int(r[3]) + 1)} for r in (a, b)
        ]
        return len(cells[0] & cells[1]) / (min(map(len, cells)) if of_smaller else len(cells[0] | cells[1]))

    for overlap, of_smaller in ((0.5, False), (0.7, True)):
        kept: list[int] = []
        for row in np.argsort(-boxes[:, 4]):
            if all(share(boxes[row], boxes[other], of_smaller) <= overlap for other in kept):
                kept.append(int(row))
        assert suppress(boxes, overlap, of_smaller).tolist() == kept
    assert suppress(boxes[:0], 0.5).tolist() == []


def test_boxes_are_squared_moved_and_rounded() -> None:
    box = np.array([[10.0, 20.0, 20.0, 50.0, 0.9]])
    assert square(box).tolist() == [[0.0, 20.0, 30.0, 50.0, 0.9]]
    assert corrected(box, np.array([[0.1, 0, -0.1, 1]])).tolist() == [[11.1, 20.0, 18.9, 81.0, 0.9]]
    assert whole(np.array([[-1.7, 1.7, 3.2, 4.9, 0.5], [5.0, 5.0, 4.0, 9.0, 0.5]])).tolist() == [[-1, 1, 3, 4, 0.5]]
    assert square(box[:0]).shape == (0, 5)


def test_an_image_smaller_than_a_face_has_no_faces() -> None:
    detector = FaceDetector((ProposalNet(), RefineNet(), OutputNet()))
    assert detector(np.zeros((10, 300, 3), np.uint8)).shape == (0, 5)
