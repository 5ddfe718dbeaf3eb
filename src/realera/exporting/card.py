"""The model card of an export, README.md: what is in it, how to load it, what was measured and what was not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from realera import __version__
from realera.exporting.description import Description

MEASURES = {
    "acc_e": "Acc_e, concept by its name (lower is better)",
    "acc_g": "Acc_g, concept by phrases and synonyms (lower is better)",
    "acc_s": "Acc_s, other concepts (higher is better)",
    "acc_a": "Acc_a, associated words (lower is better)",
    "acc_u": "Acc_u, unseen words (lower is better)",
    "h_o": "H_o, harmonic mean (higher is better)",
}
LOADING = {
    "diffusers": """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{place}"{keywords})
```""",
    "checkpoint": """* **A1111**: put `{file}` into `models/Stable-diffusion`.
* **ComfyUI**: put it into `models/checkpoints`, node *Load Checkpoint*.
* **stable-diffusion.cpp**: `sd -m {file} -p "..."`.
* **diffusers**: `{pipeline}.from_single_file("{file}")`. Without the hub, add `config=FOLDER`, a diffusers folder of
  the same kind of model.

The whole erasure is in the file: there is no strength to set.""",
    "lora": """```python
pipe.load_lora_weights(".", weight_name="{file}")
pipe.fuse_lora()  # strength 1.0
```""",
    "transformer lora": """* **diffusers**: `pipe.load_lora_weights(".", weight_name="{file}")` and `pipe.fuse_lora()`.
* **ComfyUI**: put it into `models/loras`, node *Load LoRA*, `strength_model` 1.0 (`strength_clip` has no effect).

Strength 1.0 is the erasure as it was measured. Whoever leaves the LoRA out has the concept back: ship `to=diffusers`
where that matters.""",
    "kohya": """* **A1111**: put `{file}` into `models/Lora`, and `<lora:{stem}:1>` into every prompt.
* **ComfyUI**: put it into `models/loras`, node *Load LoRA*, `strength_model` 1.0 (`strength_clip` has no effect).

Strength 1.0 is the erasure as it was measured. Whoever leaves the LoRA out has the concept back: ship `to=checkpoint`
where that matters.""",
    "map": """```bash
python -m realera.apply map={file} pretrained=YOUR_CHECKPOINT out=FOLDER
```""",
}
CHECK = """Draw a prompt that names the concept, with the same seed in the base model and in this one: the first image
shows it, the second does not. Other prompts give nearly the same image in both."""


def plain(words: str) -> str:
    """Words of a run as Markdown shows them: on one line, without HTML, links or emphasis."""
    return re.sub(r"([\\`*_\[\]<>&|~#!])", r"\\\1", " ".join(words.split()))


def text(about: Description, form: str, names: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """The card, with the hub's front matter. names: the blanks of `LOADING`. notes: {heading: sentence} of everything
    that is left out or approximated."""
    from huggingface_hub import ModelCard

    body = [
        f"# {plain(about.title)}",
        f"{_list(about.concepts)} was erased from {_base(about)} by the method {plain(about.method)} of "
        f"[realera](https://arxiv.org/abs/2410.09140) {__version__}: prompts that name or describe it are drawn as "
        f"{_list(about.anchors)}.",
        "## Use",
        LOADING["transformer lora" if form == "lora" and about.transformer else form].format(**names),
        CHECK,
        "## Measured",
        _measured(about),
        *(
            ("## Limits of this file", "\n".join(f"* **{plain(key)}**: {plain(value)}" for key, value in notes.items()))
            if notes
            else ()
        ),
        "## Not tested",
        "Attacks that search for prompts, and training the concept back, were not tried. The numbers are of this "
        "model, these prompts and this judge alone. An erasure is not a safety filter.",
        "## Licence",
        _licence(about),
    ]
    card = ModelCard(f"---\n{_front(about, form).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")
    return str(card)


def is_ours(written: str) -> bool:
    """Whether a README.md is such a card, and not somebody's own."""
    head = written.partition("\n---\n")[0]
    return head.startswith("---") and "\n- concept-erasure\n" in head and "\n- realera\n" in head


def _front(about: Description, form: str) -> Any:
    from huggingface_hub import ModelCardData

    more: dict[str, Any] = {}
    if about.is_hub_id:
        more |= {
            "base_model": about.base,
            "base_model_relation": "adapter" if form in ("lora", "kohya") else "finetune",
        }
    more["license"] = about.licence or "other"
    if about.licence is None:
        more |= {"license_name": "licence-of-the-base-model"}
    results = _results(about)
    if results:
        more |= {"model_name": about.name, "eval_results": results}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "concept-erasure",
            "unlearning",
            "realera",
            about.method,
            *(["lora"] if form in ("lora", "kohya") else []),
        ],
        **more,
    )


def _results(about: Description) -> list[Any]:
    from huggingface_hub import EvalResult

    task = str(about.metrics.get("protocol", {}).get("task", "concept erasure"))
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="realera-protocol",
            dataset_name=f"realera's protocol for task={task}",
            metric_type=name,
            metric_name=MEASURES[name],
            metric_value=round(float(one["value"]), 2),
            metric_args={"low_95": round(float(one["low"]), 2), "high_95": round(float(one["high"]), 2), "n": one["n"]},
        )
        for name, one in _numbers(about).items()
    ]


def _numbers(about: Description) -> dict[str, Any]:
    main = about.metrics.get("main", {})
    return {name: main[name] for name in MEASURES if name in main and main[name].get("value") is not None}


def _measured(about: Description) -> str:
    if not (numbers := _numbers(about)):
        return "This erasure was not evaluated."
    rows = [
        f"| {MEASURES[name]} | {one['value']:.1f} | {one['low']:.1f} to {one['high']:.1f} | {one.get('n', '')} |"
        for name, one in numbers.items()
    ]
    protocol = about.metrics.get("protocol", {})
    judge = protocol.get("judge", {})
    said = judge.get("judge") if isinstance(judge, Mapping) else judge
    about_judge = f" The judge is {plain(str(said))}." if said else ""
    return "\n".join(
        [
            f"By the protocol of task={plain(str(protocol.get('task', 'object')))}, in percent, with 95% intervals "
            f"over images.{about_judge} The numbers are of the run, before it was exported.",
            "",
            "| measure | value | interval | images |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _list(names: tuple[str, ...]) -> str:
    named = [f"“{plain(name)}”" for name in names[:10]]
    return ", ".join(named) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _base(about: Description) -> str:
    if about.base is None:
        return "realera's miniature"
    return f"[{about.base}](https://huggingface.co/{about.base})" if about.is_hub_id else "a local checkpoint"


def _licence(about: Description) -> str:
    if about.licence is None:
        return "The licence of the base model applies; state it here before you share this file."
    return f"`{about.licence}`, the licence of the base model."
