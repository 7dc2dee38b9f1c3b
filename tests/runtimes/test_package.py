"""What `import runtimes` offers, and that the names of the version before still import and run."""

import subprocess
import sys

import pytest

import runtimes
from runtimes.runtime import open_runtime


def test_open_runtime_is_imported_from_the_package() -> None:
    assert runtimes.open_runtime is open_runtime
    with pytest.raises(AttributeError, match="no attribute 'open_everything'"):
        runtimes.open_everything  # noqa: B018


def test_importing_the_package_imports_no_library() -> None:
    code = "import runtimes, sys; print(sorted({'numpy', 'torch', 'onnxruntime'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = code.replace("import runtimes,", "from runtimes import open_runtime; import")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "['numpy']\n"
    )
