"""Puts the app and the demo model into wheels; everything else is in pyproject.toml.

Both are outside the package. A wheel has them in ``lsq_core/bundled``, in the layout that they
have in the repository; ``lsq_core/paths.py`` finds them there.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUNDLED = [
    "app.py",
    "pages/*.py",
    ".streamlit/config.toml",
    "data/demo_model/README.md",
    "data/demo_model/*.json",
    "data/demo_model/*.safetensors",
    "data/measured/*.parquet",
]


class BuildWithApp(build_py):
    """The package, and unless it is installed editable, ``BUNDLED``."""

    def run(self) -> None:
        """Build into ``build_lib``."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib, "lsq_core")
        # An earlier build may have left modules there that are gone since.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for pattern in BUNDLED:
            sources = sorted(ROOT.glob(pattern))
            if not sources:
                raise FileNotFoundError(f"{ROOT / pattern} is missing, so no wheel can be built.")
            for source in sources:
                target = package / "bundled" / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithApp})
