"""PEFT's own tests of its methods, with SAN's cases in their tables.

They come with PEFT's source distribution, of which nothing stands here. `PEFT_SOURCE` names its archive or the unpacked
folder:

    pip download --no-deps --no-binary :all: peft==VERSION
    PEFT_SOURCE=peft-VERSION.tar.gz pytest tests/integrations/test_peft_suite.py -m slow
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import pytest

HERE = Path(__file__).parent
COMMAND = f"pip download --no-deps --no-binary :all: peft=={peft.__version__}"


@pytest.fixture
def suite(tmp_path) -> Path:
    """A folder with PEFT's tests as a package, and no settings of PEFT's."""
    source = Path(os.environ.get("PEFT_SOURCE", f"peft-{peft.__version__}.tar.gz"))
    if not source.exists():
        pytest.skip(f"needs PEFT's source: {COMMAND}, and PEFT_SOURCE=its archive")
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(tmp_path / "source", filter="data")
        source = next((tmp_path / "source").iterdir())
    assert source.name == f"peft-{peft.__version__}", (
        f"{source.name} is not the PEFT {peft.__version__} that is installed"
    )
    shutil.copytree(source / "tests", tmp_path / "suite" / "peft_tests")
    (tmp_path / "suite" / "peft_tests" / "__init__.py").touch()
    (tmp_path / "suite" / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return tmp_path / "suite"


@pytest.mark.slow
def test_custom_models(suite):
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = "SanConfig or Alone or Same or Different"
    arguments = ["-p", "peft_cases", "peft_tests/test_custom_models.py", "-q", "-p", "no:cacheprovider", "-k", chosen]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=suite,
        env={**os.environ, "PYTHONPATH": paths, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    passed = int(run.stdout.rpartition(" passed")[0].split()[-1])
    assert passed > 900
