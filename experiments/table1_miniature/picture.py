"""The README's picture, from run folders: picture.py OUT.png NAME=RUN_DIR [NAME=RUN_DIR ...]

One column of images per run, and one for the original model before them; a row per prompt, the same seeds in each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE, EACH, GAP, HEAD, LEFT = 2, 3, 14, 26, 270
WANTED = (("erase", 1), ("near", 2), ("associated", 2), ("unseen", 1), ("keep", 2))  # prompts of each split


def main(out: Path, runs: dict[str, Path]) -> None:
    manifests = {
        name: [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
        for name, folder in runs.items()
    }
    first = next(iter(manifests.values()))
    prompts = []
    for split, count in WANTED:
        texts = list(dict.fromkeys(row["prompt"] for row in first if row["split"] == split))
        prompts += [(split, text) for text in (texts if split != "keep" else texts[2:])[:count]]
    columns = ["original", *runs]
    side = 32 * SCALE
    wide = EACH * side
    sheet = Image.new("RGB", (LEFT + len(columns) * (wide + GAP), HEAD + len(prompts) * (side + 6)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for c, name in enumerate(columns):
        pen.text((LEFT + c * (wide + GAP), 4), name, "black", font)
    for r, (split, text) in enumerate(prompts):
        y = HEAD + r * (side + 6)
        pen.text((6, y + side // 2 - 9), text if len(text) < 36 else f"{text[:34]}…", "black", font)
        for c, name in enumerate(columns):
            of = name if name in runs else next(iter(runs))
            rows = [row for row in manifests[of] if row["split"] == split and row["prompt"] == text][:EACH]
            for i, row in enumerate(rows):
                file = runs[of] / row["file" if name in runs else "original"]
                image = Image.open(file).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(image, (LEFT + c * (wide + GAP) + i * side, y))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(200).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: Path(folder) for name, folder in (word.split("=", 1) for word in sys.argv[2:])})
