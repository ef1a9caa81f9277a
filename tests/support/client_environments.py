"""Environments of their own for real clients, and what runs in them."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parents[1] / "clients"
ROOT = Path(os.environ.get("MOESTRO_CLIENTS_DIR", HERE.parents[1] / ".clients"))
INSTALL_S, RUN_S = 300, 300

# One for each set of versions that cannot live together.
ENVIRONMENTS = {
    "openai2": ["openai==2.54.0"],
    "litellm": ["litellm==1.110.2"],
    "langchain": ["langchain-openai==1.7.4"],
    "lm-eval": ["lm-eval[api]==0.4.13", "accelerate==1.15.0", "peft==0.21.2"],
    "schemathesis": ["schemathesis==4.32.5"],
}
# lm-eval's own Hugging Face backend runs beside our torch and transformers.
BESIDE_OURS = {"lm-eval"}

Run = Callable[..., str]


def run_command(command: list[str], cwd: Path | None = None, **variables: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


def environment(name: str) -> Path:
    """Its python; made where it is missing or its list has changed."""
    folder, wanted = ROOT / name, ENVIRONMENTS[name]
    python, stamp = folder / "bin" / "python", folder / "made-of"
    key = hashlib.sha256(json.dumps([wanted, sys.version]).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == key:
        return python
    venv.create(folder, clear=True, with_pip=True)
    main, beside = ([wanted[0]], wanted[1:]) if name in BESIDE_OURS else (wanted, [])
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run_command([*install, *main])
    if beside:
        run_command([*install, "--no-deps", *beside])
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "zz-ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    stamp.write_text(key)
    return python
