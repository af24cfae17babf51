"""stub"""

from pathlib import Path
from typing import Any


def run_demo(out: Path, samples: int, progress: Any) -> dict[str, Any]:
    return {}
