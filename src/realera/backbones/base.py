"""The U-Net's own weights: which were changed, and their first values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from realera.contracts import Edit, UserError
from realera.files import finite


class BaseWeights:
    """Changes parameters in place and keeps a copy of each one's first value, so that the teacher needs no second
    U-Net.

    Names and parameters are read once, before any adapter: peft moves a layer to "<path>.base_layer" but keeps the
    object, so the plain names stay true.
    """

    def __init__(self, unet: nn.Module, backbone: str) -> None:
        self.backbone = backbone
        self.parameters = dict(unet.named_parameters())
        self.cross_attention = {
            name: module
            for name, module in unet.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(("attn2.to_k", "attn2.to_v"))
        }
        self.first: dict[str, Tensor] = {}

    def apply(self, edit: Edit) -> None:
        """W = W @ map in float64 on the edit's projections of every cross-attention layer, or the given weights; on top
        of what is there now."""
        if edit.map is not None and edit.weights:
            raise ValueError("an Edit is a map or weights, not both")
        layers = self.cross_attention
        if unknown := [name for name in edit.weights if name not in layers]:
            raise UserError(
                f"The edit names the layer {unknown[0]!r}, which backbone {self.backbone} has not; it has: "
                f"{', '.join(list(layers)[:4])}, ... ({len(layers)} in all)."
            )
        new = dict(edit.weights)
        if edit.map is not None:
            width = next(iter(layers.values())).in_features
            if tuple(edit.map.shape) != (width, width):
                raise UserError(
                    f"The map is {tuple(edit.map.shape)} but backbone {self.backbone} has text states of width "
                    f"{width}; use a map made with the same text encoder."
                )
            taking = tuple(edit.projections)
            new = {n: self._edited(layer.weight, edit) for n, layer in layers.items() if n.endswith(taking)}
        self.set({f"{name}.weight": weight for name, weight in new.items()}, made=edit.map is not None)

    def _edited(self, weight: Tensor, edit: Edit) -> Tensor:
        """W @ map: in float64, or by its factors in float32, which round the change alone."""
        weight = weight.detach()
        if edit.factors is not None:
            single = weight.float()
            left, right = (factor.to(single) for factor in edit.factors)
            return torch.addmm(single, single @ left, right)
        assert edit.map is not None
        double = weight.double()
        return double @ edit.map.to(double)

    def _put(self, name: str, value: Tensor) -> None:
        """Gives a parameter a tensor that is nobody else's; its first value stays where it is, uncopied."""
        parameter = self.parameters[name]
        if name in self.first or value.device != parameter.device or value.stride() != parameter.stride():
            self.keep(name)
            parameter.data.copy_(value)
        else:
            self.first[name], parameter.data = parameter.data, value

    def set(self, values: Mapping[str, Tensor], made: bool = False) -> None:
        """Puts values onto named parameters, all or none. made: they are nobody else's, and need not be copied.

        Raises UserError for an unknown name, another shape, NaN or infinity, and for what their dtype cannot hold.
        """
        for name, value in values.items():
            if name not in self.parameters:
                raise UserError(
                    f"The weight {name!r} is not in backbone {self.backbone}; use the backbone it was made with."
                )
            if (shape := self.parameters[name].shape) != value.shape:
                raise UserError(
                    f"The weight {name} is {tuple(value.shape)} in the edit and {tuple(shape)} in backbone "
                    f"{self.backbone}; use the backbone it was made with."
                )
        rounded = {name: value.to(self.parameters[name].dtype) for name, value in values.items()}
        finite.refuse(values, "The edited weight", "give a larger ridge, or train with a lower method.align.lr")
        narrowed = {name: value for name, value in rounded.items() if value is not values[name]}
        if (large := finite.first_bad(narrowed)) is not None:
            raise finite.NotFinite(
                f"The edited weight {large} is too large for backbone.dtype={str(self.dtype).removeprefix('torch.')}: "
                "set backbone.dtype=bfloat16 or float32."
            )
        for name, value in rounded.items():
            self._put(name, value if name in narrowed or made else value.clone())

    def keep(self, name: str) -> nn.Parameter:
        """The parameter, its first value now safe; call before anything changes it."""
        parameter = self.parameters[name]
        if name not in self.first:
            self.first[name] = parameter.detach().clone()
        return parameter

    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]:
        """Trainable parameters, in U-Net order, whose path holds one of `targets` ("attn2.to_k", "attn2") as whole
        parts, and none of those written with a minus ("-attn2"). "all", or only minuses: everything but those.

        Raises UserError where a target matches nothing, and for weights in half precision: most of their steps of 1e-5
        would be rounded away, and the loss would look no different for it.
        """
        if (dtype := self.dtype) != torch.float32:
            raise UserError(
                f"backbone.dtype={str(dtype).removeprefix('torch.')} cannot hold the small steps of a method that "
                "trains the U-Net's own weights: set backbone.dtype=float32, with trainer.precision=bf16-mixed for "
                "speed."
            )
        wanted = [target for target in targets if not target.startswith("-") and target != "all"]
        spared = [target.removeprefix("-") for target in targets if target.startswith("-")]

        def holds(name: str, parts: Sequence[str]) -> bool:
            return any(f".{part}." in f".{name}." for part in parts)

        for target in (*wanted, *spared):
            if not any(holds(name, [target]) for name in self.parameters):
                parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in self.parameters))
                raise UserError(
                    f"The target {target!r} matched 0 weights of backbone {self.backbone}; its parts are: {parts}."
                )
        names = [n for n in self.parameters if (not wanted or holds(n, wanted)) and not holds(n, spared)]
        return [self.keep(name).requires_grad_(True) for name in names]  # type: ignore[misc]  # torch says Tensor

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def refuse_adapting_float16(self) -> None:
        """UserError where the weights are float16. An adapter on bfloat16 is trained well: it is in float32 itself."""
        if self.dtype == torch.float16:
            raise UserError(
                "backbone.dtype=float16 draws images but cannot be trained, because its gradients fall below the "
                "smallest number: set backbone.dtype=bfloat16, or float32 with trainer.precision=bf16-mixed."
            )

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """First values in place of the current ones: pointers move, nothing is copied.

        A forward recorded before keeps its version counters, so its backward afterwards is still right.
        """
        current = {name: self.parameters[name].data for name in self.first}
        try:
            for name in current:
                parameter = self.parameters[name]
                self.first[name] = self.first[name].to(parameter.device)  # a trainer may have moved the U-Net by itself
                parameter.data = self.first[name]
            yield
        finally:
            for name, data in current.items():
                self.parameters[name].data = data

    def changed(self) -> dict[str, Tensor]:
        """{parameter name: value} of those that differ from their first value, as copies on the CPU."""
        now = {name: self.parameters[name].detach() for name in self.first}
        return {
            n: value.cpu().clone() for n, value in now.items() if not torch.equal(value, self.first[n].to(value.device))
        }

    def restore(self) -> None:
        """Back to the first values, for good."""
        for name, first in self.first.items():
            self.parameters[name].data.copy_(first)
            self.parameters[name].requires_grad_(False)
        self.first = {}
