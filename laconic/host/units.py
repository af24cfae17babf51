"""Sizes, times and numbers in a row as people say them."""


def human_bytes(n: float) -> str:
    """A size in units of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:.2f} {unit}"
        n /= 1000
    return ""


def duration(seconds: float) -> str:
    """A length of time."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def ranges(numbers: list[int]) -> str:
    """3, 7-12 for 3, 7, 8, ... 12."""
    parts: list[str] = []
    start = 0
    for i, number in enumerate(numbers):
        if i + 1 < len(numbers) and numbers[i + 1] == number + 1:
            continue
        parts.append(str(number) if i == start else f"{numbers[start]}-{number}")
        start = i + 1
    return ", ".join(parts)
