"""Reads GIPHY's det1-3.npy, {layer: {parameter: array}} pickled inside an .npy file. The unpickler here calls only
numpy's own functions that rebuild arrays; np.load(allow_pickle=True) would run any code in the file."""

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
    ("_codecs", "encode"),  # bytes in Python 3's pickles of old protocols
}


class _ArraysOnly(pickle.Unpickler):
    """Allows only names that rebuild an array. Dicts, lists, tuples, strings and numbers need no name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _newer() else module, name)


def read_layers(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{layer: {parameter: array}}. Raises UserError if the file is missing or torn, or contains anything else."""
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
    except Exception as error:  # a torn pickle can raise any exception
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} does not contain only arrays ({cause}): unpack GIPHY's resources again") from None


def _newer() -> bool:
    """Whether numpy is 2 or newer, which renamed numpy.core to numpy._core; older files use the old name."""
    from importlib.util import find_spec

    return find_spec("numpy._core") is not None
