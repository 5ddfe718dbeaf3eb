"""A network's own weights, of the denoiser or of the text encoders: which were changed, and their original values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from realera.contracts import KEYS, VALUES, Edit, UserError
from realera.files import finite


class BaseWeights:
    """Changes parameters in place and keeps the original value of each (`first`), so that the teacher needs no second
    U-Net.

    Names and parameters are read once, before any adapter is added. peft moves a layer to "<path>.base_layer" but keeps
    the same object, so the plain names stay valid. named: gives a parameter its name here, from its path.
    """

    def __init__(
        self, network: nn.Module, backbone: str, reader: str | None = None, named: Callable[[str], str] = str
    ) -> None:
        """reader: the name of the one layer that all text rows pass; None = the layers of cross-attention."""
        self.backbone = backbone
        self.parameters = {named(name): parameter for name, parameter in network.named_parameters()}
        self.readers = {  # the layers that project text states
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and (name == reader if reader else name.endswith((KEYS, VALUES)))
        }
        self.first: dict[str, Tensor] = {}

    @staticmethod
    def takes(name: str, projections: Sequence[str]) -> bool:
        """Whether a layer is one of these projections. A layer that is read for keys and values alike is."""
        return name.endswith(tuple(projections)) or not name.endswith((KEYS, VALUES))

    def apply(self, edit: Edit) -> None:
        """Applies an edit to the current weights: W = W @ map in float64 on the edit's projections of every layer that
        projects text states, or the given weights."""
        if edit.map is not None and edit.weights:
            raise ValueError("an Edit is a map or weights, not both")
        layers = self.readers
        if unknown := [name for name in edit.weights if name not in layers]:
            raise UserError(
                f"The edit changes the layer {unknown[0]!r}, which backbone {self.backbone} does not have; it has: "
                f"{', '.join(list(layers)[:4])}, ... ({len(layers)} in all)."
            )
        new = dict(edit.weights)
        if edit.map is not None:
            width = next(iter(layers.values())).in_features
            if tuple(edit.map.shape) != (width, width):
                raise UserError(
                    f"The map has shape {tuple(edit.map.shape)} but backbone {self.backbone} has text states of width "
                    f"{width}; use a map that was made with the same text encoder."
                )
            taking = {n: layer for n, layer in layers.items() if self.takes(n, edit.projections)}
            new = {n: self._edited(layer.weight, edit) for n, layer in taking.items()}
        self.set({f"{name}.weight": weight for name, weight in new.items()}, owned=edit.map is not None)

    def _edited(self, weight: Tensor, edit: Edit) -> Tensor:
        """W @ map: in float64, or with the map's factors in float32, where only the change is rounded."""
        weight = weight.detach()
        if edit.factors is not None:
            single = weight.float()
            left, right = (factor.to(single) for factor in edit.factors)
            return torch.addmm(single, single @ left, right)
        assert edit.map is not None
        double = weight.double()
        return double @ edit.map.to(double)

    def _put(self, name: str, value: Tensor) -> None:
        """Sets a parameter to a tensor that no other code holds. The original value is kept, without a copy if
        possible."""
        parameter = self.parameters[name]
        if name in self.first or value.device != parameter.device or value.stride() != parameter.stride():
            self.keep(name)
            parameter.data.copy_(value)
        else:
            self.first[name], parameter.data = parameter.data, value

    def set(self, values: Mapping[str, Tensor], owned: bool = False) -> None:
        """Sets named parameters, all or none. owned: no other code holds these tensors, so they are not copied.

        Raises UserError for an unknown name, a wrong shape, NaN or infinity, and values too large for the dtype.
        """
        for name, value in values.items():
            if name not in self.parameters:
                raise UserError(f"Backbone {self.backbone} has no weight {name!r}; use the backbone it was made with.")
            if (shape := self.parameters[name].shape) != value.shape:
                raise UserError(
                    f"The weight {name} has shape {tuple(value.shape)} in the edit and {tuple(shape)} in backbone "
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
            self._put(name, value if name in narrowed or owned else value.clone())

    def merge(self, deltas: Mapping[str, Tensor]) -> None:
        """Adds {layer: change of its weight}, in float64."""
        self.set({f"{n}.weight": self.parameters[f"{n}.weight"].double() + d.double() for n, d in deltas.items()})

    def keep(self, name: str) -> nn.Parameter:
        """The parameter, after a copy of its original value; call this before any change."""
        parameter = self.parameters[name]
        if name not in self.first:
            self.first[name] = parameter.detach().clone()
        return parameter

    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]:
        """Makes parameters trainable and returns them in the network's order.

        targets: whole parts of a parameter's path, "attn2.to_k" or "attn2"; * stands for any letters, as in "norm*". A
        target with a minus, "-attn2", excludes parameters. "all", or only targets with a minus: everything that is not
        excluded.

        Raises UserError if a target matches nothing, and for weights in half precision: most update steps of 1e-5 would
        be rounded away, and the loss would not show it.
        """
        if (dtype := self.dtype) != torch.float32:
            raise UserError(
                f"backbone.dtype={str(dtype).removeprefix('torch.')} cannot hold the small steps of a method that "
                "trains the network's own weights: set backbone.dtype=float32, with trainer.precision=bf16-mixed for "
                "speed."
            )
        wanted = [target for target in targets if not target.startswith("-") and target != "all"]
        excluded = [target.removeprefix("-") for target in targets if target.startswith("-")]

        def has_any(name: str, parts: Sequence[str]) -> bool:
            return any(fnmatchcase(f".{name}.", f"*.{part}.*") for part in parts)

        for target in (*wanted, *excluded):
            if not any(has_any(name, [target]) for name in self.parameters):
                heads = (name.split(".")[name.startswith("text_encoder")] for name in self.parameters)
                parts = ", ".join(dict.fromkeys(heads))
                raise UserError(
                    f"The target {target!r} matched 0 weights of backbone {self.backbone}; its parts are: {parts}."
                )
        names = [n for n in self.parameters if (not wanted or has_any(n, wanted)) and not has_any(n, excluded)]
        return [self.keep(name).requires_grad_(True) for name in names]  # type: ignore[misc]  # typed as Tensor

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def refuse_adapting_float16(self) -> None:
        """Raises UserError if the weights are float16. On bfloat16 weights an adapter trains well, because the adapter
        itself is float32."""
        if self.dtype == torch.float16:
            raise UserError(
                "backbone.dtype=float16 generates images but cannot be trained, because its gradients underflow: set "
                "backbone.dtype=bfloat16, or float32 with trainer.precision=bf16-mixed."
            )

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Uses the original values inside this context. Only pointers are swapped; nothing is copied.

        A forward pass recorded before keeps its version counters, so its backward pass afterwards is still correct.
        """
        current = {name: self.parameters[name].data for name in self.first}
        try:
            for name in current:
                parameter = self.parameters[name]
                self.first[name] = self.first[name].to(parameter.device)  # a trainer may have moved the network
                parameter.data = self.first[name]
            yield
        finally:
            for name, data in current.items():
                self.parameters[name].data = data

    def changed(self) -> dict[str, Tensor]:
        """{parameter name: value} of the parameters that differ from their original values, as copies on the CPU."""
        now = {name: self.parameters[name].detach() for name in self.first}
        return {
            n: value.cpu().clone() for n, value in now.items() if not torch.equal(value, self.first[n].to(value.device))
        }

    def restore(self) -> None:
        """Restores the original values and forgets the copies."""
        for name, first in self.first.items():
            self.parameters[name].data.copy_(first)
            self.parameters[name].requires_grad_(False)
        self.first = {}
