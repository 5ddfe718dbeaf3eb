"""The model card of an export, README.md: what is in it, how to load it, what was measured and what was not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from realera import __version__
from realera.evaluation import attacked
from realera.exporting.description import Description

MEASURED = "Measured"  # the heading of the table
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

Strength 1.0 is the whole erasure. Whoever leaves the LoRA out has the concept back: ship `to=diffusers`
where that matters.""",
    "kohya": """* **A1111**: put `{file}` into `models/Lora`, and `<lora:{stem}:1>` into every prompt.
* **ComfyUI**: put it into `models/loras`, node *Load LoRA*, `strength_model` 1.0 (`strength_clip` has no effect).

Strength 1.0 is the whole erasure. Whoever leaves the LoRA out has the concept back: ship `to=checkpoint`
where that matters.""",
    "map": """```bash
python -m realera.apply map={file} pretrained=YOUR_CHECKPOINT out=FOLDER
```""",
}
CHECK = """Draw a prompt that names the concept, with the same seed in the base model and in this one. Where the
erasure works, the first image shows the concept and the second does not, and other prompts give nearly the same image
in both."""


def plain(words: str) -> str:
    """Words of a run as Markdown shows them: on one line, without HTML, links or emphasis."""
    return re.sub(r"([\\`*_\[\]<>&|~#!])", r"\\\1", " ".join(words.split()))


def text(about: Description, form: str, names: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """The card, with the hub's front matter. names: the blanks of `LOADING`. notes: {heading: sentence} of everything
    that is left out or approximated."""
    from huggingface_hub import ModelCard

    body = [
        f"# {plain(about.title)}",
        _opening(about),
        "## Use",
        LOADING["transformer lora" if form == "lora" and about.transformer else form].format(**names),
        CHECK,
        f"## {MEASURED}",
        _measured(about),
        *(("## Attacks", _attacks(about)) if about.evidence.attacks else ()),
        *(
            ("## Limits of this file", "\n".join(f"* **{plain(key)}**: {plain(value)}" for key, value in notes.items()))
            if notes
            else ()
        ),
        "## Not tested",
        _not_tested(about),
        "## Licence",
        _licence(about),
    ]
    card = ModelCard(f"---\n{_front(about, form).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")
    return str(card)


def is_ours(written: str) -> bool:
    """Whether a README.md is such a card, and not somebody's own."""
    head = written.partition("\n---\n")[0]
    return head.startswith("---") and "\n- concept-erasure\n" in head and "\n- realera\n" in head


def run_of(written: str) -> str:
    """The identity of the run that a card is of; "" if the card is of an earlier version."""
    found = re.search(r"^realera_run: ['\"]?([0-9a-f]+)['\"]?$", written.partition("\n---\n")[0], re.MULTILINE)
    return found[1] if found else ""


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
    if about.identity:
        more |= {"realera_run": about.identity}
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
    """Of the hub's model index. Numbers are in percent, CLIP scores in their own unit."""
    from huggingface_hub import EvalResult

    evidence = about.evidence
    task = str(evidence.protocol.get("task", "concept erasure"))
    found: list[tuple[str, str, float | None, Mapping[str, Any], dict[str, str]]] = [
        (row.key, f"{row.heading}, {row.what}", row.value, {"low": row.low, "high": row.high, "n": row.n}, {})
        for row in evidence.rows()
    ]
    found += [
        ("asr", f"ASR of the attack {name} ↓", numbers["asr"]["value"], numbers["asr"], {"attack": name})
        for name, numbers in evidence.attacks.items()
    ]
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="realera-protocol",
            dataset_name=f"realera's protocol for task={task}",
            metric_type=key,
            metric_name=name,
            metric_value=round(float(value), 2),
            metric_args={**more, **_ends(one), "n": one["n"]},
        )
        for key, name, value, one, more in found
        if value is not None
    ]


def _ends(one: Mapping[str, Any]) -> dict[str, float]:
    return {f"{end}_95": round(float(one[end]), 2) for end in ("low", "high") if one[end] is not None}


def _opening(about: Description) -> str:
    anchors = tuple(dict.fromkeys(about.anchors))
    were = "was" if len(about.concepts) == 1 else "were"
    return (
        f"{_list(about.concepts)} {were} to be erased from {_base(about)} by the method {plain(about.method)} of "
        f"[realera](https://arxiv.org/abs/2410.09140) {__version__}, with {_list(anchors)} as "
        f"{'its anchor' if len(about.concepts) == 1 else 'anchor' if len(anchors) == 1 else 'anchors'}. "
        f"{_success(about)}"
    )


def _success(about: Description) -> str:
    """Where the card says how far the erasure succeeded, and of which concepts it cannot say it."""
    evidence = about.evidence
    if not evidence.metrics:
        return "This erasure was not judged: how far it succeeded is not known."
    lacking = evidence.unscored(about.concepts)
    if len(lacking) >= len(about.concepts):
        one = "this concept" if len(about.concepts) == 1 else "these concepts"
        return f"The judge could not score {one}: how far the erasure succeeded is not known."
    table = f"The table under *{MEASURED}* says how far this succeeded"
    return f"{table}, but the judge could not score {_list(tuple(lacking))}." if lacking else f"{table}."


def _measured(about: Description) -> str:
    evidence = about.evidence
    if not evidence.metrics:
        return "This erasure was not judged."
    rows = [
        f"| {row.heading} | {plain(row.what)} | {_number(row.value)} | {_interval(row.low, row.high)} | "
        f"{_number(row.original)} | {row.images} |"
        for row in evidence.rows()
    ]
    judge = evidence.protocol.get("judge", {})
    said = judge.get("judge") if isinstance(judge, Mapping) else judge
    about_judge = f" The judge is {plain(str(said))}." if said else ""
    lacking = evidence.unscored(about.concepts)
    return "\n".join(
        [
            f"By the protocol of task={plain(str(evidence.protocol.get('task', 'object')))}, with 95% intervals over "
            f"images (↓: lower is better, ↑: higher).{about_judge} The numbers are of the run, before it was exported.",
            *([f"The judge could not score {_list(tuple(lacking))}."] if lacking else []),
            "",
            "| measure | of | value | interval | original model | images |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def _attacks(about: Description) -> str:
    rows, returned = [], []
    for name, numbers in about.evidence.attacks.items():
        asr = numbers["asr"]
        rows.append(
            f"| {plain(name)} | {_number(asr['value'])} | {_interval(asr['low'], asr['high'])} | "
            f"{_number(numbers['pre_asr']['value'])} | {_number(numbers['original']['value'])} | {numbers['prompts']} |"
        )
        if "returned" in numbers:
            returned.append(f"{plain(name)}: {attacked.return_sentence(numbers['returned'])}")
    return "\n".join(
        [
            "Percent of the prompts for which the judge finds the concept. ASR: with the erased model under attack, "
            "with its 95% interval over prompts; a high one means that the attack brings the concept back.",
            "",
            "| attack | ASR | interval | without the attack | original model | prompts |",
            "|---|---|---|---|---|---|",
            *rows,
            *(["", *returned] if returned else []),
        ]
    )


def _not_tested(about: Description) -> str:
    evidence = about.evidence
    left = evidence.not_tried()
    if not evidence.attacks:
        tried = "No attack was tried: neither a search for prompts, nor training the concept back."
    elif left:
        tried = f"Of realera's attacks these were not tried: {', '.join(left)}."
    else:
        tried = "Other attacks than those above were not tried."
    numbers = "The numbers are of this model, these prompts and this judge alone. "
    return f"{tried} {numbers if evidence.metrics or evidence.attacks else ''}An erasure is not a safety filter."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.1f} to {high:.1f}"


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
