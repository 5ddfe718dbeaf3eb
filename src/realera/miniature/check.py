"""Measures the miniature against its thresholds: python -m realera.miniature.check

    denoiser=dit     measures the transformer (backbone=mini-dit): its groups must be within 5 points of the U-Net's
    folder=DIR       the model folder (default: the shipped one)
    images=200       images generated per group        seed=0
    workdir=runs/miniature   folder for held-out renderings (needs the emoji art: npm and the extra `build`)
    sheet=FILE.png   also writes a sheet with sample images of each group, at three times their size

The shipped judge classifies each group top-1 among all labels of the world. The judge and the VAE are measured on poses
that are not in the training pictures (held-out renderings), and the judge also on two emoji sets that are not in the
world ("strangers"; reported, without a threshold). Exit status 1 if a threshold is missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from realera.contracts import NamedPrompt, Prompt, Sampler, UserError
from realera.miniature.art import load_world, need_extra
from realera.miniature.corpus import fill
from realera.paths import CONF_DIR, MINIATURE, MINIATURE_DIT
from realera.system.disk import atomic, write_text

BARS = {
    "object": 95.0,
    "synonym": 85.0,
    "associated": 80.0,
    "celebrity": 92.0,
    "style": 85.0,
    "unsafe": 95.0,
    "everyday": 80.0,
    "judge/object": 97.0,
    "judge/celebrity": 95.0,
    "judge/style": 90.0,
    "judge/unsafe": 97.0,
    "judge/everyday": 85.0,
    "vae_psnr": 27.0,
}
LIKE_UNET = ("object", "synonym", "celebrity", "style", "unsafe", "everyday")  # groups with a bar for the transformer
POINTS = 5.0  # that the transformer may be below the U-Net
FLOOR = 60.0  # threshold of every other group, except those that are only reported
REPORTED_ONLY = ("unseen", "celebrity_associated", "style_associated", "unsafe_associated", "scene", "person")


def groups(world: Mapping[str, Any], images: int, seed: int, most_words: int | None = None) -> dict[str, list[Prompt]]:
    """{group: prompts}: at least `images` prompts for each group, spread evenly over its words (or the first
    `most_words`). Seeds count up from `seed`."""

    def spread(words: list[tuple[str, str]]) -> list[Prompt]:
        words = words[:most_words]
        each = -(-images // len(words))
        return [
            Prompt(f"{i}-{s}", text, label, "keep", seed + s)
            for i, (text, label) in enumerate(words)
            for s in range(each)
        ]

    objects, unsafe = world["objects"], world["unsafe"]

    def unseen(entry: Mapping[str, Any]) -> list[str]:
        held = entry.get("unseen", [])
        if isinstance(held, Mapping):
            return [fill("a photo of the {}", name) for name in held["names"]] + list(held["phrases"])
        return list(held)

    photo = "a photo of the {}"
    everything = [objects, unsafe, world["celebrities"], world["artists"]]
    return {
        "object": spread([(fill(photo, name), name) for name in objects]),
        "synonym": spread([(fill(photo, s), name) for name, entry in objects.items() for s in entry["synonyms"]]),
        "associated": spread([(p, name) for name, entry in objects.items() for p in entry["associated"]]),
        "celebrity": spread([(f"a portrait of {name}", name) for name in world["celebrities"]]),
        "celebrity_associated": spread(_phrases(world["celebrities"])),
        "style": spread([(f"an artwork by {name}", name) for name in world["artists"]]),
        "style_associated": spread(_phrases(world["artists"])),
        "unsafe": spread([(fill(photo, name), name) for name in unsafe]),
        "unsafe_associated": spread(_phrases(unsafe)),
        "everyday": spread([(fill(photo, name), name) for name in world["everyday"]]),
        "scene": spread([(fill(photo, name), name) for name in world["scenes"]]),
        "person": spread([("a photo of a person", "person"), ("a portrait of a person", "person")]),
        "unseen": spread([(p, name) for kind in everything for name, entry in kind.items() for p in unseen(entry)]),
    }


def _phrases(kind: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(phrase, name) for name, entry in kind.items() for phrase in entry.get("associated", [])]


def check(
    folder: Path = MINIATURE,
    images: int = 200,
    seed: int = 0,
    workdir: Path = Path("runs/miniature"),
    sheet: Path | None = None,
    log: Callable[[str], None] = print,
    strict: bool = True,
    poses: int = 6000,
    most_words: int | None = None,
) -> dict[str, Any]:
    """Measures everything and writes folder/check.json. strict: raise SystemExit(1) if a threshold is missed. poses:
    number of held-out renderings. most_words: words of each group, for a quick check."""
    found, sheets = measured_groups(
        folder, images, seed, most_words, lambda name, value: log(f"{name:22s} {value:6.2f}  {verdict(name, value)}")
    )
    row_norm(folder, found)
    held_out(folder, workdir, found, poses, log)
    write_text(folder / "check.json", json.dumps(found, indent=1) + "\n")
    if sheet:
        save_sheet(sheets, sheet)
    missed = [name for name, value in flatten(found).items() if verdict(name, value) == "MISSED"]
    log(f"missed: {', '.join(missed)}" if missed else "all thresholds are met")
    if missed and strict:
        raise SystemExit(1)
    return found


def check_transformer(
    folder: Path = MINIATURE_DIT,
    images: int = 200,
    seed: int = 0,
    sheet: Path | None = None,
    log: Callable[[str], None] = print,
    strict: bool = True,
    most_words: int | None = None,
) -> dict[str, Any]:
    """As `check`, for the transformer, which has the U-Net's text encoder, autoencoder and judge: writes
    folder/check.json and folder/README.md. A group of `LIKE_UNET` is missed if it is more than `POINTS` below the
    U-Net's value in the shipped check.json."""
    unet = json.loads((MINIATURE / "check.json").read_text(encoding="utf-8"))["groups"]
    bars = {name: round(unet[name] - POINTS, 2) for name in LIKE_UNET}

    def said(name: str, value: float) -> str:
        return "reported" if name not in bars else "met" if value >= bars[name] else "MISSED"

    found, sheets = measured_groups(
        folder,
        images,
        seed,
        most_words,
        lambda name, value: log(f"{name:22s} {value:6.2f}  (U-Net {unet[name]:6.2f})  {said(name, value)}"),
    )
    from realera.miniature.card import write_transformer_card  # which reads this module's bars

    found["bars"] = bars
    write_text(folder / "check.json", json.dumps(found, indent=1) + "\n")
    write_transformer_card(folder, found, unet)
    if sheet:
        save_sheet(sheets, sheet)
    missed = [name for name, value in found["groups"].items() if said(name, value) == "MISSED"]
    log(f"missed: {', '.join(missed)}" if missed else "all thresholds are met")
    if missed and strict:
        raise SystemExit(1)
    return found


def measured_groups(
    folder: Path, images: int, seed: int, most_words: int | None, say: Callable[[str, float], None]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(the groups' top-1 and that of each word, sample images (words, images, 32, 32, 3) of each group)."""
    found: dict[str, Any] = {"images": images, "seed": seed, "groups": {}, "by_word": {}}
    sheets = []
    for name, prompts in groups(load_world(), images, seed, most_words).items():
        drawn, judged = generate_and_judge(folder, prompts)
        right = [label == prompt.concept for label, prompt in zip(judged, prompts, strict=True)]
        found["groups"][name] = round(100 * float(np.mean(right)), 2)
        words: dict[str, list[bool]] = {}
        for prompt, hit in zip(prompts, right, strict=True):
            words.setdefault(prompt.text, []).append(hit)
        found["by_word"][name] = {text: round(100 * float(np.mean(hits)), 1) for text, hits in words.items()}
        say(name, found["groups"][name])
        each = len(prompts) // len(words)
        sheets.append(drawn.reshape(len(words), each, *drawn.shape[1:])[:, :12])
    return found, sheets


def verdict(name: str, value: float) -> str:
    """ "met", "MISSED", or "reported" if there is no threshold."""
    bar = BARS.get(name, -np.inf if name in REPORTED_ONLY or "/" in name or name == "vae_psnr" else FLOOR)
    return "reported" if bar == -np.inf else "met" if value >= bar else "MISSED"


def flatten(found: Mapping[str, Any]) -> dict[str, float]:
    """{name of the threshold: value} of everything measured."""
    judge = {f"judge/{kind}": row["clip"] for kind, row in found.get("judge", {}).items() if isinstance(row, Mapping)}
    vae = {"vae_psnr": found["vae_psnr"]} if "vae_psnr" in found else {}
    return {**found["groups"], **judge, **vae}


def generate_and_judge(folder: Path, prompts: list[Prompt]) -> tuple[np.ndarray, list[str]]:
    """Images (n, 32, 32, 3) uint8 and the judge's first choices, made with the code that every experiment uses."""
    import torch

    from realera.judges.miniature_net import load_judge
    from realera.miniature.training_tools import to_tensor

    key = str(folder)
    if key not in _LOADED:
        config, clip, _ = load_judge((folder if (folder / "judge").is_dir() else MINIATURE) / "judge")
        with torch.no_grad():
            words = clip.encode_text(list(config.labels.values()))
        _LOADED[key] = (_backbone(folder), list(config.labels), clip, words)
    backbone, labels, clip, words = _LOADED[key]
    drawn, judged = [], []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        pictures = backbone.generate([p.text for p in part], [p.seed for p in part]).cpu().numpy()
        with torch.no_grad():
            choice = (clip.encode_image(to_tensor(pictures)) @ words.T).argmax(-1)
        drawn.append(pictures)
        judged += [labels[int(i)] for i in choice]
    return np.concatenate(drawn), judged


_LOADED: dict[str, Any] = {}


def _backbone(folder: Path) -> Any:
    """The model in a folder, with the sampler of its backbone's yaml."""
    from realera.backbones import kinds
    from realera.backbones.transformer import TransformerBackbone
    from realera.backbones.unet import UNetBackbone

    name = "mini" if kinds.of(folder) == kinds.UNET else "mini-dit"
    settings = yaml.safe_load((CONF_DIR / "backbone" / f"{name}.yaml").read_text(encoding="utf-8"))
    sampler = Sampler(**{key: value for key, value in settings["sampler"].items() if key != "_target_"})
    if name == "mini":
        return UNetBackbone(name, folder, sampler)
    given = kinds.MINI_DIT if folder == MINIATURE_DIT else folder
    return TransformerBackbone(name, given, sampler, settings["like"])


def row_norm(folder: Path, found: dict[str, Any]) -> None:
    """Mean norm of the text-state rows from the first sub-token of a class name on, for `text.row_norm` in the yaml."""
    backbone = _LOADED[str(folder)][0]
    names = list(load_world()["objects"])
    states = backbone.encode([NamedPrompt.of("a photo of the {}", name) for name in names])
    norms = [states.states[i, int(states.first[i]) :].norm(dim=-1).mean() for i in range(len(names))]
    found["row_norm"] = round(float(sum(norms) / len(norms)), 2)


def held_out(folder: Path, workdir: Path, found: dict[str, Any], poses: int, log: Callable[[str], None]) -> None:
    """Measures the judge and the VAE on held-out poses, and the judge also on emoji sets that are not in the world."""
    import torch
    from diffusers import AutoencoderKL

    from realera.judges.miniature_net import load_judge
    from realera.miniature.art import sprites
    from realera.miniature.autoencoder import psnr
    from realera.miniature.judge import measure_judge
    from realera.miniature.pictures import draw_pictures
    from realera.miniature.world import World

    world = load_world()
    drawn = sprites(world, workdir / "art")
    pictures, subjects = draw_pictures(World(world, drawn), workdir / "held_out", poses, seed=2, held_out=True)
    nets = load_judge(folder / "judge")
    found["judge"] = measure_judge(*nets, np.asarray(pictures), subjects)
    for kind, row in found["judge"].items():
        if isinstance(row, Mapping):
            log(f"judge/{kind:16s} {row['clip']:6.2f}  {verdict(f'judge/{kind}', row['clip'])}  second {row['plain']}")
    strange = World(world, drawn, vendors=list(world["strangers"]))
    rng, foreign, said = np.random.default_rng(7), [], []
    for kind in ("object", "everyday"):
        for label in strange.labels[kind]:
            subject = strange.draw_subject(rng, kind, label)
            if any(f"{v}/{e}" in drawn for v in strange.vendors for e in strange.emoji(subject)):
                foreign += [strange.draw(subject, rng) for _ in range(10)]
                said += [subject] * 10
    found["judge_strangers"] = measure_judge(*nets, np.stack(foreign), said)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    found["vae_psnr"] = round(psnr(vae, np.asarray(pictures)), 2)
    log(f"vae_psnr {found['vae_psnr']} dB  {verdict('vae_psnr', found['vae_psnr'])}")


def save_sheet(sheets: list[np.ndarray], file: Path, scale: int = 3) -> None:
    """Writes one image with all groups below each other, one row for each word, at `scale` times their size."""
    from PIL import Image

    rows = [np.concatenate(list(word), axis=1) for sheet in sheets for word in sheet]
    wide = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, wide - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    image = Image.fromarray(np.concatenate(rows, axis=0))
    with atomic(file) as beside:
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(beside)


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    dit = "denoiser=dit" in arguments
    arguments = [word for word in arguments if word != "denoiser=dit"]
    kinds: dict[str, Callable[[str], Any]] = {
        "folder": Path,
        "images": int,
        "seed": int,
        "workdir": Path,
        "sheet": Path,
    }
    given: dict[str, Any] = {}
    for word in arguments:
        key, found, value = word.partition("=")
        if not found or key not in kinds:
            raise UserError(f"'{word}' is not known: the keys are {', '.join(kinds)}, as key=value")
        try:
            given[key] = kinds[key](value)
        except ValueError:
            raise UserError(f"{word}: {value!r} is not a whole number") from None
    if dit:
        if "workdir" in given:
            raise UserError("workdir has no effect with denoiser=dit: the judge is measured with the U-Net")
        check_transformer(**given)
        return
    need_extra("scipy", "resvg_py")
    check(**given)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
