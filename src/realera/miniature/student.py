"""The student: a small causal CLIPTextModel, initialised and trained to imitate a sentence encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 32  # token rows of a prompt
WIDTH = 256  # width of a row
TEMPERATURE = 0.1  # for the divergence between cosine matrices


class Student(nn.Module):
    """The text model, and a head that maps its end-of-text state (256) to the teacher's vector (384), for training."""

    def __init__(self, model: CLIPTextModel, head: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def end_states(self, ids: Tensor, last: Tensor) -> Tensor:
        """States (B, 256) of the rows `last` (B,), after the final norm. Ids (B, T) after an end token have no effect,
        because the model is causal."""
        states: Tensor = self.model(input_ids=ids).last_hidden_state
        return states[torch.arange(len(ids)), last]

    @torch.no_grad()
    def vectors(self, ids: Sequence[Sequence[int]], headed: bool = True, batch: int = 250) -> Tensor:
        """Unit vectors of N texts: the head's (N, 384), or the end states themselves (N, 256)."""
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        out = torch.zeros(len(ids), self.head.out_features if headed else WIDTH)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            states = self.end_states(*padded([ids[row] for row in rows], self.model.config.eos_token_id)).float()
            out[rows] = F.normalize(self.head(states) if headed else states, dim=-1)
        return out


def new_student(tokenizer: CLIPTokenizer, vectors: np.ndarray, seed: int) -> Student:
    """A student that already resembles the teacher before training.

    vectors (V, 384): the teacher's vector of each token's string, zero for tokens without a string. Their 256 leading
    right singular directions, rotated at random so that every unit has about the same variance, are the coordinates of
    the token embeddings and the columns of the head. The first layer's value and output matrices start at the identity,
    so that the end token's state starts as an average of the words' vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModel(config)
    model.set_attn_implementation("eager")  # on a CPU, with rows this short, faster than the fused kernel
    inner = getattr(model, "text_model", model)  # transformers 5 has no text_model between
    table = torch.from_numpy(vectors.astype(np.float32))
    _, _, basis = torch.linalg.svd(table, full_matrices=False)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    basis = rotation @ basis[:WIDTH]  # (256, 384), orthonormal rows
    head = nn.Linear(WIDTH, table.shape[1])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        # 0.15 per unit: large compared with the noise, small enough for the optimiser to change it.
        inner.embeddings.token_embedding.weight += 0.15 * math.sqrt(WIDTH) * table @ basis.T
        inner.embeddings.position_embedding.weight *= 0.5
        attention = inner.encoder.layers[0].self_attn
        attention.v_proj.weight += torch.eye(WIDTH)
        attention.out_proj.weight += torch.eye(WIDTH)
        head.weight.copy_(basis.T)
        head.bias.zero_()
    return Student(model, head)


def padded(ids: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded with `fill` to the longest, and the row (B,) of each text's last id."""
    longest = max(map(len, ids))
    rows = [[*row, *[fill] * (longest - len(row))] for row in ids]
    return torch.tensor(rows), torch.tensor([len(row) - 1 for row in ids])


def distance(states: Tensor, pointed: Tensor, target: Tensor) -> Tensor:
    """The loss of a batch: (1 - cosine) + 4 * squared difference + 0.5 * divergence.

    cosine: of the head's output `pointed` (B, 384) and the teacher's unit vectors `target` (B, 384). The other two
    terms compare the cosine matrices, off the diagonal, of the states (B, 256) and of the target: the U-Net reads the
    states, so the states themselves must have the teacher's geometry, not only the head's output. divergence: KL of
    each row's softmax at TEMPERATURE, which emphasises the nearest neighbours.
    """
    away = 1 - F.cosine_similarity(pointed, target, dim=-1).mean()
    unit = F.normalize(states, dim=-1)
    apart = ~torch.eye(len(unit), dtype=torch.bool)
    mine, theirs = ((side @ side.T)[apart].view(len(unit), -1) for side in (unit, target))
    divergence = F.kl_div(
        (mine / TEMPERATURE).log_softmax(-1),
        (theirs / TEMPERATURE).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return away + 4 * (mine - theirs).square().mean() + 0.5 * divergence


def save_model(model: CLIPTextModel, folder: Path) -> None:
    """Writes the text model as float16 safetensors with its config; an existing `folder` is replaced at the end.

    The keys have the prefix "text_model.", which every release of transformers reads (transformers 5 writes none).
    """
    fresh, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    for left in (fresh, old):
        rmtree(left, ignore_errors=True)
    half = CLIPTextModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(fresh)
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in half.state_dict().items()}
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    with suppress(FileNotFoundError):
        folder.rename(old)
    fresh.rename(folder)
    rmtree(old, ignore_errors=True)
