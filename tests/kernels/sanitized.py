"""Run the random and edge tests of the native kernels against another build of them: ``python sanitized.py FOLDER``.

``make test-sanitize`` calls this with a build that has AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "foveal.kernels.native._native"
TESTS = (
    "random_calls or edges or block_masks_on or few_rows or lists_of_keys or groups or entropy or demand or strides or see_nothing "
    "or huge or nan or bitwise or many_threads or corrupt or door or any_rows or bounds or made_in_place or padding or across"
)
FILES = ("test_native.py", "test_across.py", "test_native_rows.py", "test_linear_native.py")

if __name__ == "__main__":
    (library,) = Path(sys.argv[1]).glob("_native*.so")
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    sys.exit(pytest.main([*files, "-k", TESTS, "-p", "no:cacheprovider"]))
