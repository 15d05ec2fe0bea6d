"""Fuzz one target, a function of bytes in a file of this folder, with atheris, until it fails or is stopped.

python -m pip install atheris
python -m tests.fuzz.long_run FILE TARGET [options of libFuzzer, such as -max_total_time=600, and corpus folders]
"""

import importlib
import sys
import tempfile
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit((__doc__ or "").rstrip())
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed: python -m pip install atheris") from None
    file, name, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["vfio_vmbus"]):
        module = importlib.import_module(f"tests.fuzz.{file}")
    seeds = Path(tempfile.mkdtemp(prefix="seeds-"))
    for index, seed in enumerate(getattr(module, "SEEDS", [])):
        (seeds / str(index)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(seeds)], getattr(module, name))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
