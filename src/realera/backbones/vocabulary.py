"""Reads a checkpoint's tokenizer with the tokenizers library alone, without torch, so that prompts are checked before
anything heavy is loaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from realera.backbones.configs import NEVER
from realera.contracts import UserError
from realera.files.headers import read_json

FILE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}  # {role: CLIP's token}
T5_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
FAR = 10**9  # tokens: no limit
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # CLIP's split of a text before the merges
TOO_LONG = 64 << 20  # bytes; CLIP's own files have one or two million


def read(folder: Path) -> Any:
    """The tokenizers.Tokenizer in a folder, without truncation and padding; None if the folder has no tokenizer.

    Raises UserError, with its name, for a file that cannot be read.
    """
    files = [folder / FILE] if (folder / FILE).is_file() else [folder / VOCABULARY, folder / MERGES]
    if not all(file.is_file() for file in files):
        return None
    try:
        known = [file.stat() for file in files]
    except OSError as error:
        raise _damaged(files[0], error) from error
    return _read(tuple(files), tuple((one.st_size, one.st_mtime_ns) for one in known))


def special(folder: Path) -> dict[str, str]:
    """{role: token} of the begin, end, padding and unknown-word tokens.

    They are read as transformers does: from tokenizer_config.json and, if that has the older layout, also from
    special_tokens_map.json, which takes precedence. Stable Diffusion 2's padding "!" is only in the latter.
    """
    said: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := folder / name).is_file() and "added_tokens_decoder" not in said:
            said |= read_json(file)
    found = {role: said.get(role, usual) for role, usual in SPECIAL.items()}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in found.items()}


def longest(folder: Path) -> int:
    """The token limit in tokenizer_config.json, or `FAR` if it gives none."""
    file = folder / "tokenizer_config.json"
    return int(min(read_json(file).get("model_max_length", FAR) if file.is_file() else FAR, FAR))


def check(folder: Path, rows: int | None, t5: bool = False) -> None:
    """Raises UserError if a tokenizer cannot be read, does not put begin and end tokens around a text, or has a token
    id beyond the text encoder's `rows` (None = unknown); and for invalid settings. t5: T5's, without a begin token."""
    _check_settings(folder)
    if (tokenizer := read(folder)) is None:
        return
    file = folder / (FILE if (folder / FILE).is_file() else VOCABULARY)
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if not plain or (whole[:-1] if t5 else whole[1:-1]) != plain or len(whole) == len(plain):
        around = "an end token after a text, as T5's" if t5 else "begin and end tokens around a text, as CLIP's"
        raise UserError(f"The tokenizer {str(file)!r} does not put {around} does; copy or download it again.")
    for role, token in T5_SPECIAL.items() if t5 else special(folder).items():
        if tokenizer.token_to_id(token) is None:
            raise UserError(
                f"The tokenizer {str(file)!r} does not have the token {token[:40]!r}, which its settings use as "
                f"{role}; copy or download it again."
            )
    word, last = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if rows is not None and last >= rows:
        raise UserError(
            f"The tokenizer {str(file)!r} gives {word[:40]!r} the id {last}, but the text encoder has only {rows} rows "
            f"(0 to {rows - 1}); give a tokenizer and a text encoder that fit together."
        )


@lru_cache(maxsize=8)
def _read(files: tuple[Path, ...], known: tuple[tuple[int, int], ...]) -> Any:
    from tokenizers import Tokenizer

    if (large := next((file for file, (size, _) in zip(files, known) if size > TOO_LONG), None)) is not None:
        raise _damaged(large, ValueError(f"it is larger than {TOO_LONG >> 20} MB"))
    try:
        tokenizer = Tokenizer.from_file(str(files[0])) if len(files) == 1 else _of_pair(*files)
    except Exception as error:  # the library raises plain Exceptions
        raise _damaged(files[0], error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _of_pair(vocabulary: Path, merges: Path) -> Any:
    """CLIP's tokenizer from the older layout of two files, as transformers builds it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words, pairs = models.BPE.read_file(str(vocabulary), str(merges))
    if lacking := next((token for token in (BEGIN, END) if token not in words), None):
        raise ValueError(f"{lacking} is not in it")
    tokenizer = Tokenizer(
        models.BPE(words, pairs, unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, words[BEGIN]), (END, words[END])]
    )
    return tokenizer


def _check_settings(tokenizer: Path) -> None:
    """Raises UserError for invalid values in tokenizer_config.json (token limit, special tokens) and
    special_tokens_map.json (special tokens)."""
    for file in (tokenizer / "tokenizer_config.json", tokenizer / "special_tokens_map.json"):
        said = read_json(file) if file.is_file() else {}
        if found := next((key for key in NEVER if said.get(key) is not None), None):
            raise UserError(f"The file {str(file)!r} sets {found}, which is not allowed in a checkpoint; remove it.")
        length = said.get("model_max_length", 77)
        if type(length) not in (int, float) or not length >= 3:
            raise UserError(
                f"The file {str(file)!r} says model_max_length={length!r}, which is not a number of 3 or more."
            )
        for name in (name for name in SPECIAL if name in said):
            token = said[name].get("content") if isinstance(said[name], dict) else said[name]
            if not isinstance(token, str):
                raise UserError(
                    f"The file {str(file)!r} says {name}={str(said[name])[:60]}, which is not a token; download it "
                    "again."
                )


def _damaged(file: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    both = f" (with {MERGES})" if file.name == VOCABULARY else ""
    return UserError(f"The tokenizer {str(file)!r}{both} cannot be read ({reason}); copy or download it again.")
