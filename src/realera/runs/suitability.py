"""Whether a method or an attack can be meant for a kind of model. Its classes state what they need (the facts of
`contracts.Method` and `attack_contract.Attack`), so that neither the model's weights nor torch are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from realera.backbones import fitting, folder, kinds
from realera.backbones.kinds import Kind
from realera.contracts import UserError
from realera.settings.run_settings import AttackSettings, BackboneSettings, MethodSettings
from realera.settings.source_code import fact

OTHERS = "choose a method such as realera, esd-x or uce"


def check(method: MethodSettings, backbone: BackboneSettings) -> None:
    """Raises UserError, with the reason, for a method or a setting that means nothing on the backbone's kind of
    model."""
    if not has_joint_attention(backbone):
        return
    align = method.align
    if align.steps and fact(str(align.target), "reads_attention"):
        alone = "; for its closed form alone, set method.align=null and method.finish=null" if method.edit else ""
        raise UserError(
            f"method {method.name} reads cross-attention maps, and backbone {backbone.name} has none, because text and "
            f"image attend to each other in one softmax: {OTHERS}{alone}."
        )
    acting = method.node if align.steps else {part: method.part(part) for part in ("edit", "finish")}
    learning = [part for part, settings in parts(acting) if _learns_vectors(settings)]
    if learning and kind_of(backbone) in kinds.SEVERAL_SPLITS:
        without = "set method.edit.search=null, or " if learning == ["edit.search"] else ""
        raise UserError(
            f"method {method.name} puts learned vectors in place of a name's tokens, and the text encoders of backbone "
            f"{backbone.name} split a name into different numbers of tokens: {without}{OTHERS}."
        )
    if align.steps and align.detach_bos:
        raise UserError(
            f"method.align.detach_bos has no meaning with backbone {backbone.name}, where the first row of the text is "
            "mixed with the others: set it to false."
        )
    if backbone.t5 is False:
        fitting.refuse_t5(kind_of(backbone), False, there=True)


def check_attack(attack: AttackSettings, backbone: BackboneSettings) -> None:
    """Raises UserError, with the reason, for an attack that means nothing on the backbone's kind of model, or cannot
    train weights of its precision."""
    said = f"attack {attack.name}"
    check_trained_dtype(attack, backbone)
    if not has_joint_attention(backbone):
        return
    if _learns_vectors(attack.node) and kind_of(backbone) in kinds.SEVERAL_SPLITS:
        raise UserError(
            f"{said} searches vectors in place of tokens, and the text encoders of backbone {backbone.name} split a "
            "text into different numbers of tokens: choose an attack such as closed-form, ring-a-bell or relearn."
        )
    if fact(str(attack.target), "needs_ddim"):
        raise UserError(
            f"{said} changes the noise that DDIM adds in each step, and backbone {backbone.name} draws by flow "
            "matching, which adds none: choose an attack such as complete or inpaint."
        )


def check_trained_dtype(attack: AttackSettings, backbone: BackboneSettings) -> None:
    whole = fact(str(attack.target), "trains_weights_where", {})
    if found := [f"attack.{key}={whole[key]}" for key in whole if attack.node.get(key) == whole[key]]:
        if backbone.dtype != "float32":
            raise UserError(
                f"attack {attack.name} with {found[0]} trains the network's weights, and backbone.dtype="
                f"{backbone.dtype} would round its small steps away: attack a run with backbone.dtype=float32."
            )
        if backbone.offload == "sequential":
            raise UserError(
                f"attack {attack.name} with {found[0]} trains the network's weights, and backbone.offload=sequential "
                "keeps them in the CPU's memory, where they cannot be trained: attack a run with backbone.offload=none."
            )
    elif backbone.dtype == "float16" and fact(str(attack.target), "trains_adapters"):
        raise UserError(
            f"attack {attack.name} trains, and backbone.dtype=float16 is only for drawing images: attack "
            "a run with backbone.dtype=bfloat16 or float32."
        )


def has_joint_attention(backbone: BackboneSettings) -> bool | None:
    """Whether text and image attend to each other in one softmax, as the backbone's class states; None: it does not."""
    found: bool | None = fact(backbone.target, "joint_attention") if backbone.target else None
    return found


def kind_of(backbone: BackboneSettings, model: Path | None = None) -> Kind | None:
    """The kind of a backbone's model: by its files if they are on this machine, else by the backbone's settings. None:
    a class that is not one of ours. model: the folder of the files, if it is known."""
    if (place := model or folder.on_disk(backbone.pretrained)) is not None:
        return kinds.of(place)
    if not (joint := has_joint_attention(backbone)):
        return None if joint is None else kinds.UNET
    if kinds.FLUX in backbone.like:
        return kinds.FLUX
    return kinds.SD3 if backbone.names_t5 else kinds.ONE_CLIP


def parts(node: Any, at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted name, settings) of everything in the settings that is built from a class, at any depth."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        here = f"{at}.{key}" if at else str(key)
        if isinstance(value, Mapping) and value.get("_target_"):
            yield here, value
        yield from parts(value, here)


def _learns_vectors(settings: Mapping[str, Any]) -> bool:
    target = str(settings["_target_"])
    idle = fact(target, "idle_where", {})
    return bool(fact(target, "learns_vectors")) and not any(settings.get(key) == idle[key] for key in idle)
