"""Reads GIPHY's det1-3.npy, {layer: {parameter: array}} pickled inside an .npy file, without running what a pickle may
call: nothing but numpy's own rebuilding of arrays is let through. np.load(allow_pickle=True) would run anything."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera.contracts import UserError

if TYPE_CHECKING:
    import numpy as np

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),  # before numpy 2
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # bytes, as Python 3 writes them in the old form
}


class _ArraysOnly(pickle.Unpickler):
    """Dicts, lists, tuples, strings and numbers need no name; of names, only those that rebuild an array are known."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _newer() else module, name)


def read_layers(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{layer: {parameter: array}}. Raises UserError for a file that is missing, torn, or holds anything else."""
    import numpy as np

    try:
        data = io.BytesIO(path.read_bytes())
        version = np.lib.format.read_magic(data)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        read(data)
        layers = _ArraysOnly(data, encoding="latin1").load().item()  # latin1: written by Python 2
        return {
            str(layer): {str(name): np.asarray(array, dtype=np.float32) for name, array in parameters.items()}
            for layer, parameters in layers.items()
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): unpack GIPHY's resources again") from None
    except Exception as error:  # a torn pickle raises anything
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is no file of arrays ({cause}): unpack GIPHY's resources again") from None


def _newer() -> bool:
    """numpy 2 moved its core; files written before name the old place."""
    from importlib.util import find_spec

    return find_spec("numpy._core") is not None
