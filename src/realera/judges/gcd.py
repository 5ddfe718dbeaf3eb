"""GIPHY's Celebrity Detector on today's torch: who of 2,306 people an image shows, the judge of MACE's and RealEra's
celebrities. It reads the original resources folder as it is; TensorFlow is not needed.

Where it follows the original: faces by MTCNN, each box grown by a fifth, cut, squeezed to 224 x 224; all faces of an
image grouped by person, and the group with the most faces speaks (MACE reads the first group only).
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
MARGIN, SIZE = 0.2, 224  # of a box's side, half on each end; pixels a side
TOP = 5  # names kept in a verdict
_SOURCE = "unpack resources.tar.gz of GIPHY's celeb-detection-oss (its examples/download_model.py fetches it) there"


MinFace = Annotated[int, Number(12, 4096, whole=True)]  # the detector's first net sees 12 pixels


class GiphyJudge:
    """value = the probability of the prompt's person (0-1), NaN where no face is found or the name is no label: such an
    image is unscored (MACE: top-1 given a face). label = the likeliest name, in the prompt's spelling where it is the
    prompt's; "" without a face. Names match whatever their case, accents and punctuation.

    detail: "faces" found; "whole", whether there is one; "top" [[name, probability], ...] the first five of the
    largest group of faces; "known" the mean over that group of confidence x cosine with the label's centre, the
    original's measure of knowing the person.

    resources: GIPHY's folder (face_detection, face_recognition); None = gcd/resources in the cache. batch: faces at
    once. Raises UserError for what is missing, torn or holds more than arrays: pickles are read without running them.
    """

    name = "gcd"

    def __init__(
        self, resources: Folder | None = None, min_face: MinFace = 20, device: TorchDevice = "auto", batch: Batch = 32
    ) -> None:
        self.batch, self.min_face = check_batch(batch), min_face
        if min_face < 12:
            raise UserError(f"judge.min_face={min_face} is below what the detector's first net sees: use 12 or more")
        folder = paths.cache_dir() / "gcd" / "resources" if resources is None else Path(resources).expanduser()
        for name in (*DETECTORS, LABELS, STATE):
            if not (folder / name).is_file():
                raise UserError(f"judge=gcd finds no {name} in {folder}: {_SOURCE}, or give judge.resources=FOLDER.")
        self.labels = read_labels(folder / LABELS)
        self._rows: dict[str, list[int]] = {}
        for row, label in enumerate(self.labels):
            self._rows.setdefault(plain(label), []).append(row)
        layers = [read_layers(folder / name) for name in DETECTORS]

        from realera.judges.gcd_net import CelebrityNet, read_state
        from realera.judges.mtcnn_net import FaceDetector, OutputNet, ProposalNet, RefineNet

        self.device = torch_device(device)
        nets = ProposalNet(), RefineNet(), OutputNet()
        for net, arrays, name in zip(nets, layers, DETECTORS):
            try:
                net.load(arrays)
            except (KeyError, ValueError) as error:
                raise UserError(f"{folder / name} is not MTCNN's ({error}): {_SOURCE} again") from None
        self.detector = FaceDetector(nets, self.device, min_face)
        self.net = CelebrityNet(len(self.labels))
        try:
            self.net.load(read_state(folder / STATE))
        except Exception as error:  # whatever the reader of a torn or hostile file raises
            cause = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
            raise UserError(
                f"{folder / STATE} is not the state of a ResNet-50 of {len(self.labels)} labels, read as tensors alone "
                f"({cause[:200]}): {_SOURCE} again, its labels.csv with it"
            ) from None
        for part, name in zip((*nets, self.net), (*DETECTORS, STATE)):
            finite.refuse(part.state_dict(), f"{folder / name} cannot be used: its weight", f"{_SOURCE} again")
        self.net.to(self.device).eval().requires_grad_(False)

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for files, asked in batches(images, prompts, self.batch):
            found = [self.faces(read_rgb(Path(path))) for path in files]
            chances, embeddings = self._look([face for faces in found for face in faces])
            start = 0
            for path, prompt, faces in zip(files, asked, found):
                mine = slice(start, start + len(faces))
                refuse_nan(
                    self.name,
                    [path] * len(faces),
                    zip(chances[mine].sum(axis=-1), embeddings[mine].sum(axis=-1)),
                    f"{_SOURCE} again",
                )
                verdicts.append(self._verdict(prompt, chances[mine], embeddings[mine]))
                start = mine.stop
        return verdicts

    def knows(self, concept: str) -> bool:
        return plain(concept) in self._rows

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

    def _look(self, faces: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
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
        from realera.judges.gcd_net import groups, likeness, together

        if not len(chances):
            return Verdict(prompt.id, math.nan, "", {"faces": 0, "whole": False, "top": []})
        centers = self.net.centers.cpu().numpy()
        rows = groups(chances, embeddings, centers)[0]
        chance = together(chances[rows])
        close = likeness(embeddings[rows], centers[chances[rows].argmax(axis=1)])
        best = chance.argsort()[::-1][:TOP].tolist()
        mine = self._rows.get(plain(prompt.concept), [])
        value = float(chance[mine].sum()) if mine else math.nan
        detail = {
            "faces": len(chances),
            "whole": True,
            "top": [[self.labels[row], round(float(chance[row]), 6)] for row in best],
            "known": round(float((chances[rows].max(axis=1) * close).mean()), 6),
        }
        return Verdict(prompt.id, value, prompt.concept if best[0] in mine else self.labels[best[0]], detail)

    def protocol(self) -> dict[str, Any]:
        """What was asked of which judge."""
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
    """Letters and digits alone, lower case, no accents: "Dr. Dre", "dr_dre" -> "drdre"."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in letters if c.isalnum())


def read_labels(path: Path) -> tuple[str, ...]:
    """Names in the net's order. The file has a line "Tom_Cruise_[m.07r1h],2108" a person under a heading; the net's
    order is the lines', sorted by that name. Raises UserError for a file that is none such."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names = sorted(row[0] for row in list(csv.reader(file))[1:] if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a list of names ({error}): {_SOURCE} again") from None
    if not names:
        raise UserError(f"{path} names nobody: {_SOURCE} again")
    return tuple(re.sub(r"_\[.*\]$", "", name).replace("_", " ") for name in names)
