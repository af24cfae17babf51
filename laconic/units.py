"""Sizes as people say them."""


def human_bytes(n: float) -> str:
    """A size in units of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:.2f} {unit}"
        n /= 1000
    return ""
