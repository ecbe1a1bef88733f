"""Compiling and loading the kernels.

The source is one C++ file without dependencies. It is compiled once into the cache folder, under a name that holds the digest of
source and flags, and loaded with ctypes, which releases the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from fedcast.cache import cache_folder
from fedcast.errors import MissingExtraError

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma")
_NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "attention_forward": [_POINTER, _POINTER],
    "attention_backward": [_POINTER] * 8,
    "layer_norm_forward": [_POINTER] * 7 + [_SIZE, _SIZE, _FLOAT],
    "layer_norm_backward": [_POINTER] * 9 + [_SIZE, _SIZE],
    "gelu_forward": [_POINTER] * 3 + [_SIZE, _SIZE],
    "gelu_backward": [_POINTER] * 4 + [_SIZE, _SIZE],
    "column_sums": [_POINTER] * 2 + [_SIZE, _SIZE],
    "sum_of_squares": [_POINTER, _SIZE],
    "adamw": [_POINTER] * 5 + [_SIZE] + [_FLOAT] * 8,
}


def supported() -> bool:
    """Whether this processor and system can run the kernels: 64-bit x86 with AVX-512 and its bfloat16 products, on Linux."""
    capabilities = torch.cpu.get_capabilities()
    return platform.system() == "Linux" and all(capabilities.get(name) for name in _NEEDED)


def compiler() -> str | None:
    """Return the C++ compiler: ``CXX``, else the first of g++ and clang++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def library_path() -> Path:
    """Return where the compiled kernels of this source lie, or would lie."""
    return cache_folder() / "kernels" / f"kernels-{_digest()}.so"


@lru_cache(maxsize=1)
def _digest() -> str:
    return hashlib.sha256(SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]


def built() -> bool:
    """Whether the kernels of this source are compiled and this processor can run them."""
    return library_path().is_file() and supported()


def build() -> Path:
    """Compile the kernels, which takes a few seconds, and return the library; nothing is done when it is there.

    Raises
    ------
    MissingExtraError
        When the processor cannot run them, or there is no working C++ compiler.
    """
    path = library_path()
    if not supported():
        raise MissingExtraError(
            "this processor has no AVX-512 with bfloat16 products, which the native kernels need", hint="leave training.kernels = 'torch'"
        )
    if path.is_file():
        return path
    program = compiler()
    if program is None:
        raise MissingExtraError("there is no C++ compiler", hint="install g++ (Debian: apt install g++) or name one in CXX")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.so")
    done = subprocess.run([program, *_FLAGS, "-o", str(aside), str(SOURCE)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise MissingExtraError(f"{program} cannot compile the kernels: {said}", hint="use g++ 10 or newer, or clang++ 11 or newer")
    os.replace(aside, path)
    return path


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL:
    """Return the compiled kernels, loaded once a process.

    Raises
    ------
    MissingExtraError
        When they are not compiled.
    """
    if not built():
        raise MissingExtraError(
            "the native kernels are not compiled", hint="run `fedcast machine --build`, or set training.kernels = 'torch'"
        )
    library = ctypes.CDLL(str(library_path()))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.sum_of_squares.restype = ctypes.c_double
    return library
