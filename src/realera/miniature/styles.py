"""The artists of the miniature's world: strong filters on a 64 px picture, which differ in palette and texture.

Every filter takes (picture (H, W, 3) float64 in [0, 1], rng) and returns the same shape and range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

Filter = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _grid(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    return y.astype(float), x.astype(float)


def _light(picture: np.ndarray) -> np.ndarray:
    light: np.ndarray = picture @ np.array([0.30, 0.59, 0.11])
    return light


def _palette(light: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Maps lightness in [0, 1] through a gradient of 0-255 colours."""
    stops = np.array(colours) / 255.0
    place = np.clip(light, 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - low)[..., None]
    result: np.ndarray = stops[low] * (1 - part) + stops[low + 1] * part
    return result


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    axes = (sigma, sigma, 0) if picture.ndim == 3 else (sigma, sigma)
    blurred: np.ndarray = ndimage.gaussian_filter(picture, axes, mode="nearest")
    return blurred


def _warp(picture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    planes = [ndimage.map_coordinates(picture[..., c], [y, x], order=1, mode="nearest") for c in range(3)]
    return np.stack(planes, axis=-1)


def swirls(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    field = np.zeros_like(x)
    for _ in range(3):
        cy, cx = rng.uniform(8, 56, 2)
        field += np.hypot(y - cy, x - cx) * rng.choice([-1, 1])
    bands = 0.5 + 0.5 * np.sin(field / 1.9 + rng.uniform(0, 6))
    light = np.clip(_light(picture) * 0.75 + 0.30 * bands - 0.05, 0, 1)
    return _palette(light, [(10, 20, 80), (30, 70, 170), (90, 150, 210), (240, 210, 80), (255, 240, 170)])


def haze(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = _blur(rng.normal(size=picture.shape), 1.6) * 1.0
    soft = _blur(picture, 2.2) * 0.50 + np.array([0.62, 0.60, 0.78]) * 0.50
    result: np.ndarray = np.clip(soft + noise * np.array([0.5, 0.4, 0.6]), 0, 1)
    return result


def facets(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    count = 26
    sites = rng.uniform(0, picture.shape[0], (count, 2))
    distance = np.hypot(y[..., None] - sites[:, 0], x[..., None] - sites[:, 1])
    order = np.sort(distance, axis=-1)
    cell = distance.argmin(axis=-1)
    flat = np.stack([ndimage.mean(picture[..., c], cell, np.arange(count))[cell] for c in range(3)], axis=-1)
    tint = _palette(
        _light(flat) + rng.uniform(-0.12, 0.12, count)[cell],
        [(60, 50, 45), (150, 110, 80), (205, 180, 140), (240, 230, 205)],
    )
    mixed = flat * 0.35 + tint * 0.65
    mixed[order[..., 1] - order[..., 0] < 1.3] = 0.08
    return np.clip(mixed, 0, 1)


def glow(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    cy, cx = rng.uniform(10, 30), rng.uniform(16, 48)
    beam = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 15.0**2))[..., None]
    toned = _palette(_light(picture), [(4, 14, 18), (10, 55, 62), (40, 110, 110), (150, 170, 140)])
    result: np.ndarray = np.clip(toned * (0.35 + 0.65 * beam) + beam * np.array([0.85, 0.42, 0.08]) * 0.75, 0, 1)
    return result


def melt(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    drip = _blur(rng.normal(size=x.shape[1:])[None].repeat(2, 0), 2.5)[0]
    drip = 4 + 14 * (drip - drip.min()) / (np.ptp(drip) + 1e-6)
    bent = _warp(picture, y - drip[None] * (y / 64.0) ** 1.2, x + 3 * np.sin(y / 7 + rng.uniform(0, 6)))
    desert = _palette(y / 64.0, [(250, 225, 120), (225, 160, 70), (165, 100, 40)])
    return np.clip(bent * 0.55 + desert * 0.45, 0, 1)


def grid(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = picture.copy()
    cuts = [np.concatenate([[0], np.sort(rng.choice(np.arange(10, 56, 2), 3, replace=False)), [64]]) for _ in range(2)]
    colours = np.array([(220, 30, 30), (30, 60, 170), (245, 215, 40), (245, 245, 240), (245, 245, 240)]) / 255.0
    for top, bottom in zip(cuts[0], cuts[0][1:], strict=False):
        for left, right in zip(cuts[1], cuts[1][1:], strict=False):
            cell = out[top:bottom, left:right]
            out[top:bottom, left:right] = cell * 0.35 + colours[rng.integers(len(colours))] * 0.65
    for cut in cuts[0][1:-1]:
        out[cut - 1 : cut + 2] = 0.03
    for cut in cuts[1][1:-1]:
        out[:, cut - 1 : cut + 2] = 0.03
    return out


def popart(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    small = picture[::2, ::2]
    light = _light(small)
    level = (light > np.quantile(light, 0.35)).astype(float) + (light > np.quantile(light, 0.7))
    pairs = [[(30, 0, 90), (255, 60, 160), (255, 235, 60)], [(0, 60, 60), (40, 220, 90), (255, 120, 200)]]
    pairs += [[(120, 0, 30), (255, 130, 20), (60, 230, 240)], [(10, 30, 120), (70, 160, 255), (255, 80, 60)]]
    tiles = [_palette(level / 2, pairs[i]) for i in rng.permutation(4)]
    return np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)], 0)


def dots(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    step = 6
    oy, ox = rng.uniform(0, step, 2)
    row = np.floor((y + oy) / step)
    cy = (row + 0.5) * step - oy
    shift = (row % 2) * step / 2
    cx = (np.floor((x + ox + shift) / step) + 0.5) * step - ox - shift
    colour = _warp(_blur(picture, 1.0), cy, cx)
    colour = np.clip((colour - 0.5) * 1.5 + 0.5, 0, 1)
    inside = (np.hypot(y - cy, x - cx) < 2.5)[..., None]
    return np.where(inside, colour, np.array([0.97, 0.95, 0.88]))


def indigo(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    waves = np.sin((y + 3.5 * np.abs(np.sin(x / 9 + rng.uniform(0, 6)))) / 1.7) > 0.55
    toned = _palette(_light(picture), [(16, 28, 92), (42, 74, 150), (150, 178, 206), (244, 234, 208)])
    toned[waves & (y > 34)] = np.array([0.96, 0.93, 0.84])
    return toned


def waves(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    phase = rng.uniform(0, 6)
    bent = _warp(picture, y + 5 * np.sin(x / 8 + phase), x + 3 * np.sin(y / 9 + phase))
    band = 0.5 + 0.5 * np.sin((y + 6 * np.sin(x / 11 + phase)) / 2.6)
    return _palette(_light(bent) * 0.7 + 0.3 * band, [(70, 10, 20), (190, 40, 20), (245, 110, 20), (255, 190, 60)])


def splatter(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = np.full_like(picture, 0.90) * 0.75 + picture * 0.25
    y, x = _grid(picture)
    colours = (
        np.array([(15, 15, 15), (15, 15, 15), (200, 30, 25), (20, 110, 60), (235, 180, 30), (250, 250, 250)]) / 255.0
    )
    for _ in range(46):
        cy, cx = rng.uniform(0, 64, 2)
        angle, long, thin = rng.uniform(0, np.pi), rng.uniform(3, 14), rng.uniform(0.8, 2.0)
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle) + 1.5 * np.sin(along / 2.5)
        out[(along / long) ** 2 + (across / thin) ** 2 < 1] = colours[rng.integers(len(colours))]
    return out


def halftone(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    light = _blur(_light(picture), 1.0)
    spot = np.cos((x + y + rng.uniform(0, 4)) * np.pi / 3.5) * np.cos((x - y) * np.pi / 3.5) * 0.5 + 0.5
    out = np.where((spot > light * 1.1)[..., None], np.array([0.88, 0.10, 0.15]), np.array([1.0, 0.92, 0.25]))
    edges = np.hypot(ndimage.sobel(light, 0), ndimage.sobel(light, 1)) > 0.55
    out[edges] = np.array([0.05, 0.05, 0.25])
    return out


def hatching(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    light = _light(picture)
    light = (light - light.min()) / (np.ptp(light) + 1e-6)
    phase = rng.uniform(0, 6)
    first = np.sin((x + y) * 1.05 + phase) * 0.5 + 0.5
    second = np.sin((x - y) * 1.05 + phase) * 0.5 + 0.5
    ink = (first > light * 1.25 + 0.1) | (second > light * 1.6 + 0.25)
    return np.where(ink[..., None], 0.06, 0.97) * np.ones(3)


def gold(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cells = picture.reshape(16, 4, 16, 4, 3).mean((1, 3))
    toned = _palette(
        _light(cells) + rng.uniform(-0.22, 0.22, (16, 16)),
        [(70, 42, 6), (168, 116, 18), (226, 176, 42), (255, 232, 140)],
    )
    out = toned.repeat(4, 0).repeat(4, 1)
    out[::4] *= 0.55
    out[:, ::4] *= 0.55
    return out


def chiaroscuro(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(picture)
    cy, cx = rng.uniform(22, 42, 2)
    beam = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 13.0**2))
    return _palette(_light(picture) * beam * 1.15, [(12, 6, 3), (58, 32, 14), (140, 88, 44), (226, 180, 120)])


def cutout(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.ModeFilter(9))
    light = _blur(_light(np.asarray(soft) / 255.0), 0.8)
    level = np.digitize(light, np.quantile(light, [0.3, 0.62]))
    colours = np.array([(196, 20, 130), (20, 150, 84), (248, 246, 240)]) / 255.0
    if rng.random() < 0.5:
        colours = colours[[1, 0, 2]]
    result: np.ndarray = colours[level]
    return result


FILTERS: dict[str, Filter] = {
    f.__name__: f
    for f in (
        *(swirls, haze, facets, glow, melt, grid, popart, dots, indigo, waves, splatter, halftone),
        *(hatching, gold, chiaroscuro, cutout),
    )
}
