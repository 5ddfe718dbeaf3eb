"""A checkpoint's tokenizer read by the tokenizers library alone: no torch, so that prompts are checked before anything
heavy is loaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from realera.backbones.reading import read_json
from realera.contracts import UserError

FILE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # how CLIP parts a text before its merges
TOO_LONG = 64 << 20  # bytes; CLIP's own files have one or two million


def read(folder: Path) -> Any:
    """The tokenizers.Tokenizer of a tokenizer's folder, without cutting and padding; None where there is none.

    Raises UserError naming the file that cannot be read.
    """
    files = [folder / FILE] if (folder / FILE).is_file() else [folder / VOCABULARY, folder / MERGES]
    if not all(file.is_file() for file in files):
        return None
    try:
        known = [file.stat() for file in files]
    except OSError as error:
        raise _damaged(files[0], error) from error
    return _read(tuple(files), tuple((one.st_size, one.st_mtime_ns) for one in known))


def check(folder: Path, rows: int | None) -> None:
    """UserError where a tokenizer's folder cannot be read, puts no begin and end round a text, or knows a token without
    one of the text encoder's `rows` (None: unknown); and where its settings say nonsense."""
    _check_settings(folder)
    if (tokenizer := read(folder)) is None:
        return
    file = folder / (FILE if (folder / FILE).is_file() else VOCABULARY)
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if not plain or whole[1:-1] != plain:
        raise UserError(
            f"The tokenizer {str(file)!r} does not put a begin and an end round a text, as CLIP's does; copy or "
            "download it again."
        )
    word, last = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if rows is not None and last >= rows:
        raise UserError(
            f"The tokenizer {str(file)!r} gives {word[:40]!r} the number {last}, and the text encoder has {rows} rows "
            f"(0 to {rows - 1}); give a tokenizer and a text encoder that belong together."
        )


@lru_cache(maxsize=8)
def _read(files: tuple[Path, ...], known: tuple[tuple[int, int], ...]) -> Any:
    from tokenizers import Tokenizer

    if (large := next((file for file, (size, _) in zip(files, known) if size > TOO_LONG), None)) is not None:
        raise _damaged(large, ValueError(f"it is larger than {TOO_LONG >> 20} MB"))
    try:
        tokenizer = Tokenizer.from_file(str(files[0])) if len(files) == 1 else _of_pair(*files)
    except Exception as error:  # the library raises plain ones
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
    """tokenizer_config.json may say how long a text is and what ends it; UserError where it says nonsense."""
    if not (file := tokenizer / "tokenizer_config.json").is_file():
        return
    said = read_json(file)
    length = said.get("model_max_length", 77)
    if type(length) not in (int, float) or not length >= 3:
        raise UserError(f"The file {str(file)!r} says model_max_length={length!r}, which is no number of 3 or more.")
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if name in said and not isinstance(said[name], str | dict | None):
            raise UserError(f"The file {str(file)!r} says {name}={said[name]!r}, which is no token; download it again.")


def _damaged(file: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    both = f" (with {MERGES})" if file.name == VOCABULARY else ""
    return UserError(f"The tokenizer {str(file)!r}{both} cannot be read ({reason}); copy or download it again.")
