# SPDX-License-Identifier: Apache-2.0
"""Verilator's own library, compiled once for all models of the same options.

Every model is linked with the same few files of Verilator (``verilated.cpp`` and so on). They take
g++ longer than a small design does, so their objects are kept in ``build/objects`` and put into the
folder of the next model before it is made; make finds them newer than their sources. It must be
called with :func:`keeps`, as the model's own makefile, which is newer still, is a source of theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["keeps", "shared_objects"]

PATTERN = "verilated*.o"
"""What of a model does not depend on the design."""


def keeps(prefix: str) -> list[str]:
    """Arguments of make: nothing is made anew because the model's makefile is new."""
    return ["-o", f"{prefix}.mk"]


@contextlib.contextmanager
def shared_objects(folder: Path, verilator: Path, kept: Path, *options: object) -> Iterator[None]:
    """Around the build of a model whose objects lie in ``folder``.

    Parameters
    ----------
    folder : Path
    verilator : Path
        Folder of the ``verilator`` that is used.
    kept : Path
        Where objects are kept, those of each set of options in a folder of its own.
    options
        All that the compiler's command line comes from.
    """
    program = (verilator / "verilator").stat()
    key = (options, str(verilator), program.st_mtime_ns, program.st_size)
    key += tuple(os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CPPFLAGS", "MAKEFLAGS"))
    here = kept / hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    if here.is_dir():
        for path in here.iterdir():
            shutil.copy(path, folder / path.name)
    yield
    if not here.is_dir():
        # Whole or not at all, whoever else is about to do the same.
        new = here.with_name(f"{here.name}.{os.getpid()}")
        new.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(PATTERN):
            shutil.copy(path, new / path.name)
        try:
            new.rename(here)
        except OSError:
            shutil.rmtree(new)
