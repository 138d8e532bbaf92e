"""Files that are there whole or not at all."""

import os
import shutil
from contextlib import suppress
from pathlib import Path


class Replaced:
    """`with Replaced(path) as temporary`: a file or folder appears under its name only if the block succeeds.

    A folder takes the place of an empty one only. `durable`: a file's content is on the disk before it
    has its name.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path, self.temporary = path, path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.durable = durable

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self.durable:
                    with self.temporary.open("rb") as file:
                        os.fsync(file.fileno())
                self.temporary.replace(self.path)
        finally:
            with suppress(OSError):
                if self.temporary.is_dir():
                    shutil.rmtree(self.temporary)
                self.temporary.unlink(missing_ok=True)
