"""Runs every claim of this folder that does not train: python -m theory."""

import subprocess
import sys
from pathlib import Path

for name in ("identifiability", "collapse", "optimism", "replacement", "rollouts", "prompt_level",
             "estimators", "direct", "after_the_answer", "drift", "sampling", "generalization"):
    print(f"\n{'=' * 20} theory/{name}.py {'=' * 20}\n", flush=True)
    code = subprocess.run([sys.executable, str(Path(__file__).parent / f"{name}.py")]).returncode
    if code not in (0, 2):  # 2: generalization.py found no trained models, and said so
        sys.exit(code)
