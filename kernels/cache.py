"""Where things that can be made again are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MOESAIC_CACHE`, else `~/.cache/moesaic`; it need not exist."""
    return Path(os.environ.get("MOESAIC_CACHE") or "~/.cache/moesaic").expanduser()
