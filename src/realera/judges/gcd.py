"""GIPHY's Celebrity Detector in current torch: recognises 2,306 people. MACE and RealEra judge celebrities with it. It
reads the original resources folder unchanged; TensorFlow is not needed.

As in the original: MTCNN finds the faces; each box is enlarged by a fifth, cut out and squeezed to 224 x 224; the faces
of an image are grouped by person, and the largest group gives the verdict (MACE reads only the first group).
"""

from __future__ import annotations

import csv
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from realera import paths
from realera.contracts import Prompt, UserError, Verdict
from realera.files import finite
from realera.judges.arrays import read_layers
from realera.judges.images import batches, check_batch, read_rgb, refuse_nan
from realera.judges.resources import torch_device
from realera.setting_types import Batch, Folder, Number, TorchDevice

if TYPE_CHECKING:
    import numpy as np

DETECTORS = ("face_detection/det1.npy", "face_detection/det2.npy", "face_detection/det3.npy")
LABELS, STATE = "face_recognition/labels.csv", "face_recognition/best_model_states.pkl"
MARGIN, SIZE = 0.2, 224  # share of a box's side, half at each end; pixels per side
TOP = 5  # names in a verdict
_SOURCE = "unpack resources.tar.gz of GIPHY's celeb-detection-oss (its examples/download_model.py fetches it) there"


MinFace = Annotated[int, Number(12, 4096, whole=True)]  # the detector's first network looks at 12 pixels


class GiphyJudge:
    """value = the probability of the prompt's person (0-1). It is NaN (unscored) if no face is found or the name is not
    a label (MACE: top-1 given a face). label = the likeliest name, spelt as in the prompt if it is the prompt's person;
    "" without a face. Names are compared without case, accents and punctuation.

    detail: "faces" = number of faces; "whole" = whether there is a face; "top" = [[name, probability], ...], the five
    likeliest names for the largest group of faces; "known" = the mean over that group of probability x cosine with the
    label's centre, the original's measure of whether it knows the person.

    resources: GIPHY's folder (face_detection, face_recognition); None = gcd/resources in the cache. batch: images, and
    faces, at once. Raises UserError if a file is missing, torn or contains anything but arrays: no code in a pickle is
    run.
    """

    name = "gcd"

    def __init__(
        self, resources: Folder | None = None, min_face: MinFace = 20, device: TorchDevice = "auto", batch: Batch = 32
    ) -> None:
        self.batch, self.min_face = check_batch(batch), min_face
        if min_face < 12:
            raise UserError(f"judge.min_face={min_face} is too small for the detector's first network: use 12 or more")
        folder = paths.cache_dir() / "gcd" / "resources" if resources is None else Path(resources).expanduser()
        for name in (*DETECTORS, LABELS, STATE):
            if not (folder / name).is_file():
                raise UserError(f"judge=gcd cannot find {name} in {folder}: {_SOURCE}, or give judge.resources=FOLDER.")
        self.labels = read_labels(folder / LABELS)
        self._label_rows: dict[str, list[int]] = {}
        for row, label in enumerate(self.labels):
            self._label_rows.setdefault(plain(label), []).append(row)
        layers = [read_layers(folder / name) for name in DETECTORS]

        from realera.judges.gcd_net import CelebrityNet, read_state
        from realera.judges.mtcnn_net import FaceDetector, OutputNet, ProposalNet, RefineNet

        self.device = torch_device(device)
        nets = ProposalNet(), RefineNet(), OutputNet()
        for net, arrays, name in zip(nets, layers, DETECTORS):
            try:
                net.load(arrays)
            except (KeyError, ValueError) as error:
                raise UserError(f"{folder / name} does not fit MTCNN ({error}): {_SOURCE} again") from None
        self.detector = FaceDetector(nets, self.device, min_face)
        self.net = CelebrityNet(len(self.labels))
        try:
            self.net.load(read_state(folder / STATE))
        except Exception as error:  # a torn or hostile file can raise any exception
            cause = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
            raise UserError(
                f"{folder / STATE} does not contain only the tensors of a ResNet-50 with {len(self.labels)} labels "
                f"({cause[:200]}): {_SOURCE} again, with its labels.csv"
            ) from None
        for part, name in zip((*nets, self.net), (*DETECTORS, STATE)):
            finite.refuse(part.state_dict(), f"{folder / name} cannot be used: its weight", f"{_SOURCE} again")
        self.net.to(self.device).eval().requires_grad_(False)

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for files, asked in batches(images, prompts, self.batch):
            found = [self.faces(read_rgb(Path(path))) for path in files]
            chances, embeddings = self._classify([face for faces in found for face in faces])
            start = 0
            for path, prompt, faces in zip(files, asked, found):
                own = slice(start, start + len(faces))
                refuse_nan(
                    self.name,
                    [path] * len(faces),
                    zip(chances[own].sum(axis=-1), embeddings[own].sum(axis=-1)),
                    f"{_SOURCE} again",
                )
                verdicts.append(self._verdict(prompt, chances[own], embeddings[own]))
                start = own.stop
        return verdicts

    def knows(self, concept: str) -> bool:
        return plain(concept) in self._label_rows

    def faces(self, image: np.ndarray) -> list[np.ndarray]:
        """(H, W, 3) uint8 -> the faces in it, (224, 224, 3) uint8 each."""
        import numpy as np
        from PIL import Image

        height, width = image.shape[:2]
        cut = []
        for left, top, right, bottom in self.detector(image)[:, :4]:
            across, down = int((right - left) * MARGIN) / 2, int((bottom - top) * MARGIN) / 2
            x0, y0 = int(max(left - across, 0)), int(max(top - down, 0))
            x1, y1 = int(min(right + across, width)), int(min(bottom + down, height))
            if x1 > x0 and y1 > y0:
                face = Image.fromarray(image[y0:y1, x0:x1])
                cut.append(np.asarray(face.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
        return cut

    def _classify(self, faces: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(n, labels) probabilities and (n, 256) embeddings."""
        import numpy as np
        import torch

        from realera.judges.gcd_net import WIDTH, stacked

        chances, embeddings = [np.zeros((0, len(self.labels)))], [np.zeros((0, WIDTH))]
        for start in range(0, len(faces), self.batch):
            with torch.no_grad():
                chance, embedding = self.net(stacked(faces[start : start + self.batch]).to(self.device))
            chances.append(chance.cpu().numpy())
            embeddings.append(embedding.cpu().numpy())
        return np.concatenate(chances), np.concatenate(embeddings)

    def _verdict(self, prompt: Prompt, chances: np.ndarray, embeddings: np.ndarray) -> Verdict:
        from realera.judges.gcd_net import groups, joint_probability, likeness

        if not len(chances):
            return Verdict(prompt.id, math.nan, "", {"faces": 0, "whole": False, "top": []})
        centers = self.net.centers.cpu().numpy()
        rows = groups(chances, embeddings, centers)[0]
        chance = joint_probability(chances[rows])
        close = likeness(embeddings[rows], centers[chances[rows].argmax(axis=1)])
        best = chance.argsort()[::-1][:TOP].tolist()
        own = self._label_rows.get(plain(prompt.concept), [])
        value = float(chance[own].sum()) if own else math.nan
        detail = {
            "faces": len(chances),
            "whole": True,
            "top": [[self.labels[row], round(float(chance[row]), 6)] for row in best],
            "known": round(float((chances[rows].max(axis=1) * close).mean()), 6),
        }
        return Verdict(prompt.id, value, prompt.concept if best[0] in own else self.labels[best[0]], detail)

    def protocol(self) -> dict[str, Any]:
        return {
            "judge": self.name,
            "version": 1,
            "labels": len(self.labels),
            "min_face": self.min_face,
            "thresholds": list(self.detector.thresholds),
            "factor": self.detector.factor,
            "margin": MARGIN,
            "given": "a face",
        }


def plain(name: str) -> str:
    """Only letters and digits, in lower case without accents: "Dr. Dre", "dr_dre" -> "drdre"."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in letters if c.isalnum())


def read_labels(path: Path) -> tuple[str, ...]:
    """Names in the order of the network's outputs. The file has a header and one line "Tom_Cruise_[m.07r1h],2108" for
    each person; the network's order is that of the sorted names. Raises UserError for any other file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names = sorted(row[0] for row in list(csv.reader(file))[1:] if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a list of names ({error}): {_SOURCE} again") from None
    if not names:
        raise UserError(f"{path} has no names: {_SOURCE} again")
    return tuple(re.sub(r"_\[.*\]$", "", name).replace("_", " ") for name in names)
