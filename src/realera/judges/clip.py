"""CLIP as in MACE and RealEra: the probability of a class among the task's labels (objects), and 100 cos of an image
and its text (styles, COCO). One forward pass gives both."""

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
from realera.judges.resources import torch_device, unreachable
from realera.setting_types import Batch, Label, Template, TorchDevice

if TYPE_CHECKING:
    from torch import Tensor

_HUB = "https://huggingface.co"


class ClipJudge:
    """value = softmax over `labels` of 100 cos(image, text) at the prompt's concept (0-1); label = the likeliest one.
    An image is unscored if its concept is not a label. detail["score"] = 100 cos(image, the prompt's caption or text);
    "anchor" = whether the anchor of the prompt's concept is likelier than every label.
    Without labels there is only the score: value is NaN, label is "", and there is no "anchor".

    The protocol's model is OpenAI's ViT-B/32 with one text per label and no ensembling (MACE: "a photo of the
    {class}"); MACE scores styles with the same weights from another hub. OpenAI trained with QuickGELU, and open_clip's
    plain "ViT-B-32" uses GELU with the same weights. So the activation follows the weights' tag.

    labels: the classes of the softmax. anchors: {concept: anchor}. anchor_template: the text of an anchor, whose own
    article is dropped after "the" or "a"; None = `template`. model, pretrained: open_clip's names; `pretrained` may
    also be a weights file. "hf-hub:NAME" and "local-dir:FOLDER" as `model` have their own weights and ignore
    `pretrained`. batch: images at once. Raises UserError if the weights cannot be loaded, or give NaN for every image.
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
                raise UserError(f"judge.{key}={text!r} must contain {{}} once, where the label goes.")
        self.batch = check_batch(batch)
        import open_clip
        import torch

        self.device = torch.device(torch_device(device))
        self.labels = tuple(labels or ())
        self.template, self.anchor_template, self.model = template, of_anchor, model
        self.anchors = dict(anchors or {}) if self.labels else {}
        self.pretrained = None if ":" in model else pretrained  # open_clip accepts no other weights for these models
        self.clip, self.transform = self._load()
        try:
            self._tokenizer = open_clip.get_tokenizer(model)
            self._check()
        except UserError:
            raise
        except Exception as error:  # invalid settings in a folder can raise any exception
            raise self._unavailable(_first_line(error)) from error
        self._label_states = (
            self._encode([template.replace("{}", label) for label in self.labels]) if self.labels else None
        )
        self._caption_states: dict[str, Tensor] = {}
        own = self._encode([self._anchor_text(anchor) for anchor in self.anchors.values()]) if self.anchors else ()
        self._anchor_states = {concept.lower(): text for concept, text in zip(self.anchors, own)}

    def _load(self) -> tuple[Any, Any]:
        """The network in eval mode, and its preprocessing."""
        import open_clip

        if ":" not in self.model and open_clip.get_model_config(self.model) is None:
            close = get_close_matches(self.model, open_clip.list_models(), 3)
            raise UserError(
                f"judge.model={self.model} is not a model of open_clip: "
                + (f"did you mean {' or '.join(close)}?" if close else "see open_clip.list_models().")
            )
        given = self.pretrained
        tag = (open_clip.get_pretrained_cfg(self.model, given) if given is not None else None) or {}
        place = Path(given or "")
        if given is not None and not tag and place.exists() and not place.is_file():  # reading a pipe would block
            raise self._unavailable(f"{place} is not a file")
        if tag.get("hf_hub") and not _cached(tag["hf_hub"]) and unreachable(_HUB):
            raise self._unavailable("they are not on this disk, and the hub does not answer")
        try:
            clip, _, transform = open_clip.create_model_and_transforms(
                self.model, self.pretrained, device=self.device, force_quick_gelu=bool(tag.get("quick_gelu"))
            )
        except Exception as error:  # downloads and unpickling can raise any exception
            raise self._unavailable(_first_line(error)) from error
        finite.refuse(clip.state_dict(), f"CLIP from {self._source()} cannot judge: its weight", "get it again")
        return clip.eval(), transform

    def _check(self) -> None:
        """Raises UserError if the network gives NaN for a grey image or a short text. Finite weights can still do
        so."""
        import torch
        from PIL import Image

        with torch.no_grad():
            pixels = self.transform(Image.new("RGB", (64, 64), "gray"))[None].to(self.device)
            seen, read = self.clip.encode_image(pixels, normalize=True), self._encode(["a photo"])
            made = {"image": lengths(seen), "text": lengths(read)}
        finite.refuse(made, f"CLIP from {self._source()} cannot judge: its output for any", "get it again")

    def _source(self) -> str:
        return self.model if self.pretrained is None else self.pretrained

    def _unavailable(self, reason: str) -> UserError:
        named = self.model if self.pretrained is None else f"{self.model}/{self.pretrained}"
        return UserError(
            f"CLIP's weights {named} cannot be loaded ({reason}): connect once to download them, "
            "set HF_HOME to a cache that has them, or give judge.pretrained=FILE."
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
        """(B, E), of each prompt's caption or text. Each text is encoded once: a run has few texts and many seeds."""
        import torch

        texts = [prompt.text if prompt.caption is None else prompt.caption for prompt in prompts]
        if new := list(dict.fromkeys(text for text in texts if text not in self._caption_states)):
            self._caption_states.update(zip(new, self._encode(new)))
        return torch.stack([self._caption_states[text] for text in texts])

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        import torch
        from PIL import Image

        verdicts: list[Verdict] = []
        for files, asked in batches(images, prompts, self.batch):
            pixels = torch.stack([self.transform(Image.fromarray(read_rgb(path))) for path in files])
            with torch.no_grad():
                seen = self.clip.encode_image(pixels.to(self.device), normalize=True)
                scores = (100 * (seen * self._score_texts(asked)).sum(dim=-1)).tolist()
                chances = (
                    None if self._label_states is None else (100 * seen @ self._label_states.T).softmax(dim=-1).cpu()
                )
            sums = [1.0] * len(files) if chances is None else chances.sum(dim=-1).tolist()
            refuse_nan(self.name, files, zip(lengths(seen).tolist(), scores, sums), "get its weights again")
            for row, (prompt, score) in enumerate(zip(asked, scores)):
                value, label = math.nan, ""
                detail: dict[str, Any] = {"score": round(score, 4)}
                if chances is not None and self._label_states is not None:
                    value, label = self._choice(prompt, chances[row])
                    if (anchor := self._anchor_states.get(prompt.concept.lower())) is not None:
                        detail["anchor"] = bool(seen[row] @ anchor > (seen[row] @ self._label_states.T).max())
                verdicts.append(Verdict(prompt.id, value, label, detail))
        return verdicts

    def knows(self, concept: str) -> bool:
        return any(label.lower() == concept.lower() for label in self.labels)

    def _choice(self, prompt: Prompt, chance: Tensor) -> tuple[float, str]:
        at = next((i for i, label in enumerate(self.labels) if label.lower() == prompt.concept.lower()), None)
        return math.nan if at is None else float(chance[at]), self.labels[int(chance.argmax())]

    def protocol(self) -> dict[str, Any]:
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
    """Whether the weights of a hub id ("org/name/file" or "org/name/") are on this disk, under any file name that
    open_clip uses."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, file = hub.rpartition("/")
    names = {file, "open_clip_pytorch_model.bin", "open_clip_model.safetensors", "pytorch_model.bin"} - {""}
    names |= {name.rsplit(".", 1)[0] + ".safetensors" for name in names}
    return any(isinstance(try_to_load_from_cache(repo, name), str) for name in names)
