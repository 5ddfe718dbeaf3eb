"""CLIP as MACE and RealEra use it: a class's probability among the task's labels (objects), and 100 cos of an image and
its text (styles, COCO). One pass gives both."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera.contracts import Prompt, UserError, Verdict
from realera.files import finite
from realera.judges.images import bare, batches, check_batch, lengths, read_rgb, refuse_nan
from realera.judges.resources import out_of_reach, torch_device
from realera.setting_types import Batch, Label, Template, TorchDevice

if TYPE_CHECKING:
    from torch import Tensor

_HUB = "https://huggingface.co"


class ClipJudge:
    """value = softmax over `labels` of 100 cos(image, text) at the prompt's concept (0-1); label = the likeliest one.
    A concept that is no label is unscored. detail["score"] = 100 cos(image, the prompt's caption or text); "anchor" =
    whether the anchor of the prompt's concept is likelier than every label.
    Without labels there is only the score: no image has a probability (value NaN), a label ("") or an anchor.

    The protocol's model is OpenAI's ViT-B/32 with one text per label and no ensembling (MACE: "a photo of the
    {class}"); MACE scores styles with the same weights from another hub. OpenAI trained with QuickGELU: open_clip's
    plain "ViT-B-32" computes another function of the same weights, so the activation follows the weights' tag.

    labels: what is chosen among. anchors: {concept: anchor}; anchor_template: the text that stands for one, without
    its article behind "the" or "a"; None = `template`. model, pretrained: open_clip's names, `pretrained` also a
    weights file; a model that is typed as "hf-hub:NAME" or "local-dir:FOLDER" brings its own weights and has no
    `pretrained`. batch: images at once. Raises UserError where the weights cannot be had, or make NaN of any image.
    """

    name = "clip"

    def __init__(
        self,
        labels: Sequence[Label] | None = None,
        template: Template = "a photo of the {}",
        anchors: Mapping[str, Label] | None = None,
        anchor_template: Template | None = None,
        model: Label = "ViT-B-32-quickgelu",
        pretrained: Label = "openai",
        device: TorchDevice = "auto",
        batch: Batch = 64,
    ) -> None:
        of_anchor = template if anchor_template is None else anchor_template
        for key, text in (("template", template), ("anchor_template", of_anchor)):
            if text.count("{}") != 1:
                raise UserError(f"judge.{key}={text!r} must hold {{}} once, where the label goes.")
        self.batch = check_batch(batch)
        import open_clip
        import torch

        self.device = torch.device(torch_device(device))
        self.labels = tuple(labels or ())
        self.template, self.anchor_template, self.model = template, of_anchor, model
        self.anchors = dict(anchors or {}) if self.labels else {}
        self.pretrained = None if ":" in model else pretrained  # open_clip takes no other weights for such a model
        self.clip, self.transform = self._load()
        try:
            self._tokenizer = open_clip.get_tokenizer(model)
            self._check()
        except UserError:
            raise
        except Exception as error:  # a folder's settings may be anything
            raise self._lacking(_first_line(error)) from error
        self._texts = self._encode([template.replace("{}", label) for label in self.labels]) if self.labels else None
        self._captions: dict[str, Tensor] = {}
        own = self._encode([self._anchor_text(anchor) for anchor in self.anchors.values()]) if self.anchors else ()
        self._anchor = {concept.lower(): text for concept, text in zip(self.anchors, own)}

    def _load(self) -> tuple[Any, Any]:
        """The network in eval mode, and its preprocessing."""
        import open_clip

        if ":" not in self.model and open_clip.get_model_config(self.model) is None:
            close = get_close_matches(self.model, open_clip.list_models(), 3)
            raise UserError(
                f"judge.model={self.model} is no model of open_clip: "
                + (f"did you mean {' or '.join(close)}?" if close else "see open_clip.list_models().")
            )
        given = self.pretrained
        tag = (open_clip.get_pretrained_cfg(self.model, given) if given is not None else None) or {}
        place = Path(given or "")
        if given is not None and not tag and place.exists() and not place.is_file():  # a pipe would be waited for
            raise self._lacking(f"{place} is no file")
        if tag.get("hf_hub") and not _cached(tag["hf_hub"]) and out_of_reach(_HUB):
            raise self._lacking("they are not on this disk and the hub does not answer")
        try:
            clip, _, transform = open_clip.create_model_and_transforms(
                self.model, self.pretrained, device=self.device, force_quick_gelu=bool(tag.get("quick_gelu"))
            )
        except Exception as error:  # open_clip raises whatever its downloaders and unpicklers do
            raise self._lacking(_first_line(error)) from error
        finite.refuse(clip.state_dict(), f"CLIP from {self._source()} cannot judge: its weight", "get it again")
        return clip.eval(), transform

    def _check(self) -> None:
        """Finite weights may still make NaN of whatever they are shown. Raises UserError."""
        import torch
        from PIL import Image

        with torch.no_grad():
            pixels = self.transform(Image.new("RGB", (64, 64), "gray"))[None].to(self.device)
            seen, read = self.clip.encode_image(pixels, normalize=True), self._encode(["a photo"])
            made = {"image": lengths(seen), "text": lengths(read)}
        finite.refuse(made, f"CLIP from {self._source()} cannot judge: what it makes of any", "get it again")

    def _source(self) -> str:
        return self.model if self.pretrained is None else self.pretrained

    def _lacking(self, reason: str) -> UserError:
        named = self.model if self.pretrained is None else f"{self.model}/{self.pretrained}"
        return UserError(
            f"CLIP's weights {named} cannot be had ({reason}): connect once to download them, "
            "point HF_HOME at a cache that holds them, or give judge.pretrained=FILE."
        )

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """(B, E), unit length."""
        import torch

        with torch.no_grad():
            states: Tensor = self.clip.encode_text(self._tokenizer(list(texts)).to(self.device), normalize=True)
        return states

    def _anchor_text(self, anchor: str) -> str:
        after_article = re.search(r"\b(an?|the) \{\}", self.anchor_template, re.IGNORECASE)
        return self.anchor_template.replace("{}", bare(anchor) if after_article else anchor)

    def _score_texts(self, prompts: Sequence[Prompt]) -> Tensor:
        """(B, E): each prompt's caption or text. A run draws the same few texts from many seeds: each is read once."""
        import torch

        texts = [prompt.text if prompt.caption is None else prompt.caption for prompt in prompts]
        if new := list(dict.fromkeys(text for text in texts if text not in self._captions)):
            self._captions.update(zip(new, self._encode(new)))
        return torch.stack([self._captions[text] for text in texts])

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        import torch
        from PIL import Image

        verdicts: list[Verdict] = []
        for files, asked in batches(images, prompts, self.batch):
            pixels = torch.stack([self.transform(Image.fromarray(read_rgb(path))) for path in files])
            with torch.no_grad():
                seen = self.clip.encode_image(pixels.to(self.device), normalize=True)
                scores = (100 * (seen * self._score_texts(asked)).sum(dim=-1)).tolist()
                chances = None if self._texts is None else (100 * seen @ self._texts.T).softmax(dim=-1).cpu()
            sums = [1.0] * len(files) if chances is None else chances.sum(dim=-1).tolist()
            refuse_nan(self.name, files, zip(lengths(seen).tolist(), scores, sums), "get its weights again")
            for row, (prompt, score) in enumerate(zip(asked, scores)):
                value, label = math.nan, ""
                detail: dict[str, Any] = {"score": round(score, 4)}
                if chances is not None and self._texts is not None:
                    value, label = self._choice(prompt, chances[row])
                    if (anchor := self._anchor.get(prompt.concept.lower())) is not None:
                        detail["anchor"] = bool(seen[row] @ anchor > (seen[row] @ self._texts.T).max())
                verdicts.append(Verdict(prompt.id, value, label, detail))
        return verdicts

    def knows(self, concept: str) -> bool:
        return any(label.lower() == concept.lower() for label in self.labels)

    def _choice(self, prompt: Prompt, chance: Tensor) -> tuple[float, str]:
        at = next((i for i, label in enumerate(self.labels) if label.lower() == prompt.concept.lower()), None)
        return math.nan if at is None else float(chance[at]), self.labels[int(chance.argmax())]

    def protocol(self) -> dict[str, Any]:
        """What was asked of which judge, among which labels."""
        return {
            "judge": self.name,
            "version": 1,
            "model": self.model,
            "pretrained": self.pretrained,
            "template": self.template,
            "labels": list(self.labels),
            "anchors": {concept: self._anchor_text(anchor) for concept, anchor in self.anchors.items()},
            "score": "100 cos(image, caption)",
        }


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else repr(error)


def _cached(hub: str) -> bool:
    """Whether a hub's weights ("org/name/file" or "org/name/") are on this disk, by any of open_clip's file names."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, file = hub.rpartition("/")
    names = {file, "open_clip_pytorch_model.bin", "open_clip_model.safetensors", "pytorch_model.bin"} - {""}
    names |= {name.rsplit(".", 1)[0] + ".safetensors" for name in names}
    return any(isinstance(try_to_load_from_cache(repo, name), str) for name in names)
