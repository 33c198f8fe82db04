"""The C++ compiler for tests that build the extension: as CXX, ``python compiler.py FOLDER ISAS``.

An object that was compiled before from the same source with the same flags is taken from FOLDER, and only kernels of
ISAS, separated by commas, are instrumented by sanitizers.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

kept, isas, arguments = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
definition = next((a for a in arguments if a.startswith("-DFLOWKERN_ISA=")), "")
if definition and definition.split("=")[1] not in isas:
    arguments = [a for a in arguments if not a.startswith(("-fsanitize", "-fno-sanitize"))]
command = [shutil.which("c++") or "g++", *arguments]
if "-c" not in arguments:
    sys.exit(subprocess.run(command).returncode)
output = Path(arguments[arguments.index("-o") + 1])
# Headers of pybind11 lie in another folder in each of pip's isolated builds, and objects in another than before.
same = [a for a in arguments if not a.startswith(("-I", str(output)))]
found = kept / hashlib.sha256(" ".join(same).encode()).hexdigest()
if not found.exists():
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(output, found)
shutil.copy(found, output)
