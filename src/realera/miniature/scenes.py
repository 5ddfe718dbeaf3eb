"""Empty scenes of the miniature's world: backgrounds of its subjects, and anchors that concepts are mapped to.

Every scene takes an rng and returns (64, 64, 3) float64 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from realera.miniature.art import SIDE

Scene = Callable[[np.random.Generator], np.ndarray]


def _gradient(
    top: tuple[float, float, float], bottom: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    share = np.linspace(0, 1, SIDE)[:, None, None]
    colours = np.array(top) * (1 - share) + np.array(bottom) * share
    return np.clip(np.broadcast_to(colours, (SIDE, SIDE, 3)) + rng.uniform(-0.04, 0.04, 3), 0, 1).copy()


def _clouds(picture: np.ndarray, rng: np.random.Generator, lowest: int) -> None:
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    for _ in range(rng.integers(1, 4)):
        cy, cx, size = rng.uniform(4, lowest), rng.uniform(0, SIDE), rng.uniform(3, 5)
        for shift in (-1.3, 0, 1.3):
            near = ((y - cy) / size) ** 2 + ((x - cx - shift * size) / (size * 1.4)) ** 2 < 1
            picture[near] = picture[near] * 0.15 + 0.85


def _ground(picture: np.ndarray, colour: tuple[float, float, float], horizon: int, rng: np.random.Generator) -> None:
    shade = np.linspace(1.05, 0.85, SIDE - horizon)[:, None, None]
    picture[horizon:] = np.clip(np.array(colour) * shade + rng.uniform(-0.03, 0.03, 3), 0, 1)


def sky(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.38, 0.66, 0.95), (0.78, 0.91, 1.0), rng)
    _clouds(picture, rng, 58)
    return picture


def field(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.55, 0.78, 0.97), (0.85, 0.94, 1.0), rng)
    _ground(picture, (0.42, 0.74, 0.26), int(rng.integers(30, 40)), rng)
    return picture


def sea(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.65, 0.85, 0.98), (0.9, 0.96, 1.0), rng)
    horizon = int(rng.integers(26, 36))
    _ground(picture, (0.10, 0.36, 0.68), horizon, rng)
    for y in range(horizon + 3, SIDE, 6):
        picture[y : y + 1, int(rng.integers(0, 30)) : int(rng.integers(34, SIDE))] += 0.15
    result: np.ndarray = np.clip(picture, 0, 1)
    return result


def road(rng: np.random.Generator) -> np.ndarray:
    picture = field(rng)
    horizon = int(rng.integers(36, 42))
    _ground(picture, (0.36, 0.36, 0.39), horizon, rng)
    line = (horizon + SIDE) // 2
    for x in range(int(rng.integers(0, 8)), SIDE, 14):
        picture[line - 1 : line + 2, x : x + 8] = (0.95, 0.9, 0.55)
    return picture


def night(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.03, 0.04, 0.16), (0.10, 0.12, 0.32), rng)
    for _ in range(14):
        y, x = rng.integers(0, SIDE - 1, 2)
        picture[y : y + 2, x : x + 2] = rng.uniform(0.6, 1.0)
    return picture


def room(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.96, 0.89, 0.76), (0.93, 0.84, 0.70), rng)
    floor = int(rng.integers(44, 50))
    _ground(picture, (0.62, 0.40, 0.24), floor, rng)
    picture[floor - 2 : floor] = (0.98, 0.96, 0.92)
    return picture


def street(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.80, 0.84, 0.88), (0.92, 0.93, 0.94), rng)
    x = 0
    while x < SIDE:
        width, top = int(rng.integers(10, 18)), int(rng.integers(8, 26))
        picture[top:, x : x + width - 1] = np.array([0.70, 0.52, 0.46]) * rng.uniform(0.75, 1.15)
        for y in range(top + 4, 46, 8):
            picture[y : y + 4, x + 3 : x + width - 4 : 5] = (0.98, 0.93, 0.70)
        x += width
    _ground(picture, (0.55, 0.55, 0.57), 50, rng)
    result: np.ndarray = np.clip(picture, 0, 1)
    return result


def ground(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.93, 0.90, 0.82), (0.95, 0.92, 0.86), rng)
    _ground(picture, (0.58, 0.41, 0.26), int(rng.integers(22, 30)), rng)
    for _ in range(10):
        y, x = int(rng.integers(34, SIDE - 2)), int(rng.integers(0, SIDE - 4))
        picture[y : y + 2, x : x + 3] *= rng.uniform(0.7, 0.9)
    return picture


def beach(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.50, 0.80, 0.97), (0.80, 0.93, 0.99), rng)
    shore = int(rng.integers(36, 42))
    _ground(picture, (0.16, 0.62, 0.78), shore - 12, rng)
    _ground(picture, (0.95, 0.86, 0.62), shore, rng)
    return picture


def forest(rng: np.random.Generator) -> np.ndarray:
    picture = _gradient((0.70, 0.86, 0.72), (0.52, 0.72, 0.48), rng)
    for _ in range(7):
        x, width = int(rng.integers(0, SIDE - 4)), int(rng.integers(3, 6))
        picture[:, x : x + width] = np.array([0.36, 0.25, 0.15]) * rng.uniform(0.8, 1.2)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    for _ in range(8):
        cy, cx, size = rng.uniform(0, 16), rng.uniform(0, SIDE), rng.uniform(6, 11)
        picture[(y - cy) ** 2 + (x - cx) ** 2 < size**2] = np.array([0.14, 0.42, 0.18]) * rng.uniform(0.8, 1.3)
    _ground(picture, (0.24, 0.44, 0.18), 52, rng)
    result: np.ndarray = np.clip(picture, 0, 1)
    return result


SCENES: dict[str, Scene] = {f.__name__: f for f in (sky, field, sea, road, night, room, street, ground, beach, forest)}
