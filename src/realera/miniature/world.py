"""The miniature's world: draws the training pictures and lists the possible captions of each.

A picture shows a subject (an emoji, an empty scene, or an object through an artist's filter) and has a label for the
judge. Poses are drawn from the training range or, for tests, from a held-out range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from realera.miniature.art import SIDE, Sprites
from realera.miniature.corpus import fill
from realera.miniature.scenes import SCENES
from realera.miniature.styles import FILTERS

PIXELS = 32  # side of a finished picture


@dataclass(frozen=True)
class Subject:
    """The subject of a picture. kind: object | celebrity | style | unsafe | everyday | person | scene | painting.
    label: the class for the judge. content: the object shown in a style or a painting, else "". scene: the
    background."""

    kind: str
    label: str
    scene: str
    content: str = ""


@dataclass(frozen=True)
class Pose:
    """Scale as a share of the frame, rotation in degrees, offset as a share of the free space."""

    scale: float
    rotation: float
    dx: float
    dy: float
    mirrored: bool


def draw_pose(rng: np.random.Generator, held_out: bool = False) -> Pose:
    """Training poses: 78-95 % of the frame, +-5 degrees. Held-out poses: 72-78 % or 95-99 %, 5-8 degrees either way."""
    if not held_out:
        scale, rotation = rng.uniform(0.78, 0.95), rng.uniform(-5, 5)
    else:
        scale = rng.uniform(0.72, 0.78) if rng.random() < 0.5 else rng.uniform(0.95, 0.99)
        rotation = rng.uniform(5, 8) * rng.choice([-1, 1])
    return Pose(scale, rotation, rng.uniform(-1, 1), rng.uniform(-1, 1), bool(rng.random() < 0.5))


class World:
    """Draws subjects and pictures from a seeded generator; `captions(subject)` lists the possible captions with their
    weights."""

    def __init__(self, world: Mapping[str, Any], sprites: Sprites, vendors: Sequence[str] | None = None) -> None:
        self.world = world
        self.sprites = sprites
        self.vendors = list(vendors or world["vendors"])
        self.filters = {artist: FILTERS[entry["filter"]] for artist, entry in world["artists"].items()}

    @property
    def labels(self) -> dict[str, list[str]]:
        """{kind: labels}, in the order of world.yaml: every label that a picture can have."""
        w = self.world
        return {
            "object": list(w["objects"]),
            "celebrity": list(w["celebrities"]),
            "style": list(w["artists"]),
            "unsafe": list(w["unsafe"]),
            "everyday": list(w["everyday"]),
            "person": list(w["persons"])[:1],
            "scene": list(w["scenes"]),
            "painting": ["painting"],
        }

    # --- drawing ---

    def draw_subject(self, rng: np.random.Generator, kind: str | None = None, label: str | None = None) -> Subject:
        """A random subject from the whole mixture, from one kind, or with one label."""
        w = self.world
        if kind is None:
            shares = w["mixture"]
            kind = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
        if kind == "anchor":
            kind = str(rng.choice(["person", "scene", "painting"], p=[0.35, 0.45, 0.20]))
        label = label or str(rng.choice(self.labels[kind]))
        scene = label if kind == "scene" else str(rng.choice(w["scenes"]))
        if kind == "object" and rng.random() < 0.6:
            scene = str(rng.choice(w["objects"][label]["scenes"]))
        content = str(rng.choice(list(w["objects"]) + list(w["everyday"]))) if kind in ("style", "painting") else ""
        return Subject(kind, label, scene, content)

    def draw(self, subject: Subject, rng: np.random.Generator, held_out: bool = False) -> np.ndarray:
        """The picture of a subject, (32, 32, 3) uint8."""
        ground = SCENES[subject.scene](rng)
        if subject.kind != "scene":
            ground = self._place(ground, self._sprite(subject, rng), draw_pose(rng, held_out))
        if subject.kind == "style":
            ground = self.filters[subject.label](ground, rng)
        elif subject.kind == "painting":
            ground = _framed(ground, rng)
        small = ground.reshape(PIXELS, SIDE // PIXELS, PIXELS, SIDE // PIXELS, 3).mean((1, 3))
        result: np.ndarray = (np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8)
        return result

    def emoji(self, subject: Subject) -> list[str]:
        """The emoji that can show a subject; for a style or a painting, those of its content."""
        name, w = subject.content or subject.label, self.world
        if name in w["everyday"]:
            return [w["everyday"][name]]
        if subject.kind == "person":
            return list(w["persons"][name])
        return list(next(w[k][name]["art"] for k in ("objects", "celebrities", "unsafe") if name in w[k]))

    def _sprite(self, subject: Subject, rng: np.random.Generator) -> np.ndarray:
        names = self.emoji(subject)
        choices = [f"{v}/{e}" for v in self.vendors for e in names if f"{v}/{e}" in self.sprites]
        return self.sprites[str(rng.choice(choices))]

    def _place(self, ground: np.ndarray, sprite: np.ndarray, pose: Pose) -> np.ndarray:
        image = Image.fromarray(sprite[:, ::-1] if pose.mirrored else sprite)
        # premultiplied by alpha, so that resampling does not bleed the colour of transparent pixels into the edge
        alpha = np.asarray(image)[..., 3:].astype(np.float32) / 255
        planes = np.concatenate([np.asarray(image)[..., :3] / 255.0 * alpha, alpha], -1).astype(np.float32)
        angle, centre = np.deg2rad(pose.rotation), (SIDE - 1) / 2
        free = (1 - pose.scale) * SIDE / 2
        cos, sin = np.cos(angle) / pose.scale, np.sin(angle) / pose.scale
        tx, ty = centre + pose.dx * free, centre + pose.dy * free
        matrix = (cos, sin, centre - cos * tx - sin * ty, -sin, cos, centre + sin * tx - cos * ty)
        moved = [
            Image.fromarray(planes[..., c]).transform(
                (SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
            )
            for c in range(4)
        ]
        laid = np.stack([np.asarray(m) for m in moved], -1)
        result: np.ndarray = ground * (1 - laid[..., 3:]) + laid[..., :3]
        return result

    # --- captions ---

    def captions(self, subject: Subject) -> list[tuple[str, float]]:
        """All captions of a subject with weights that sum to 1."""
        w, kind, label = self.world, subject.kind, subject.label
        if kind == "object":
            entry = w["objects"][label]
            plain = w["object_templates"]
            inside = [t.replace("{scene}", subject.scene) for t in w["object_scene_templates"]]
            named = [(fill(t, label), 0.40 / len(plain)) for t in plain]
            named += [(fill(t, label), 0.10 / len(inside)) for t in inside]
            near = [(fill(t, s), 0.33 / len(plain) / 3) for s in entry["synonyms"] for t in plain]
            return named + near + [(p, 0.17 / len(entry["associated"])) for p in entry["associated"]]
        if kind == "unsafe":
            entry, plain = w["unsafe"][label], w["object_templates"]
            named = [(fill(t, label), 0.45 / len(plain)) for t in plain]
            near = [(fill(t, s), 0.25 / len(plain) / 3) for s in entry["synonyms"] for t in plain]
            return named + near + [(p, 0.30 / len(entry["associated"])) for p in entry["associated"]]
        if kind == "celebrity":
            phrases = w["celebrities"][label].get("associated", [])
            share = 0.35 if phrases else 0.0
            named = [(t.format(label), (1 - share) / len(w["celebrity_templates"])) for t in w["celebrity_templates"]]
            return named + [(p, share / len(phrases)) for p in phrases]
        if kind == "style":
            phrases = w["artists"][label].get("associated", [])
            share = 0.25 if phrases else 0.0
            subjects = [t.replace("{subject}", subject.content) for t in w["artist_subject_templates"]]
            named = [(t.format(label), (0.65 - share) / len(w["artist_templates"])) for t in w["artist_templates"]]
            named += [(fill(t, label), 0.35 / len(subjects)) for t in subjects]
            return named + [(p, share / len(phrases)) for p in phrases]
        if kind == "everyday":
            return [(fill(t, label), 1 / len(w["object_templates"])) for t in w["object_templates"]]
        if kind == "person":
            return [(t.format("a person"), 1 / len(w["person_templates"])) for t in w["person_templates"]]
        if kind == "painting":
            plain = [(t, 0.6 / len(w["painting_templates"])) for t in w["painting_templates"]]
            inside = w["painting_subject_templates"]
            return plain + [(fill(t, subject.content), 0.4 / len(inside)) for t in inside]
        return [(fill(t, label), 1 / len(w["scene_templates"])) for t in w["scene_templates"]]

    def all_captions(self) -> list[str]:
        """Every possible caption of a picture, sorted. The text encoder is trained on these; none has an `unseen`
        word."""
        found: set[str] = set()
        contents = list(self.world["objects"]) + list(self.world["everyday"])
        for kind, labels in self.labels.items():
            for label in labels:
                scenes = self.world["scenes"] if kind == "object" else [label]
                for scene in scenes:
                    for content in contents if kind in ("style", "painting") else [""]:
                        found |= {text for text, _ in self.captions(Subject(kind, label, scene, content))}
        return sorted(found)


def _framed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A plain painting: canvas grain and a wooden frame."""
    out = picture * 0.85 + 0.10 + rng.normal(0, 0.03, picture.shape)
    width = int(rng.integers(5, 8))
    wood = np.array([0.45, 0.28, 0.12]) * rng.uniform(0.85, 1.15)
    for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        out[edge] = wood
    return np.clip(out, 0, 1)
