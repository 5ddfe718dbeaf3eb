"""Libraries that an erasure in closed form does not import: they would cost seconds before the first result."""

from __future__ import annotations

import subprocess
import sys

from realera import paths

# Not here: what torchmetrics, which Lightning imports, finds of its own extras (matplotlib, onnxruntime, ...).
NEVER = [
    "wandb",
    "wandb_workspaces",
    "open_clip",
    "nudenet",
    "tensorboard",
    "optuna",
    "pandas",
    "sklearn",
    "joblib",
    "submitit",
    "ray",
    "IPython",
    "realera.judges.clip",
    "realera.tracking",
    "realera.sweeps",
    "realera.reporting.sweep",
]
SCRIPT = f"""
import sys
import realera
assert "torch" not in sys.modules and "hydra" not in sys.modules, "import realera alone is quick"
erased = realera.erase(realera.miniature_pipeline(), "airplane", method="uce", progress=False)
assert erased.method == "uce"
print([name for name in {NEVER!r} if name in sys.modules])
"""


def test_an_erasure_imports_only_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=paths.CONF_DIR)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
