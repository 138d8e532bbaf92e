"""Numbers and foreign texts as people read them: three significant digits and a prefix, sizes in powers of 1024."""


def count(value: float | int) -> str:
    """12345678 -> `12.3M`."""
    scaled, prefix = _prefixed(value)
    return f"{scaled}{prefix}"


def flops(value: float | int) -> str:
    """12345678 -> `12.3 MFLOP`."""
    scaled, prefix = _prefixed(value)
    return f"{scaled} {prefix}FLOP"


def size(num_bytes: float | int) -> str:
    """1288490189 -> `1.20 GiB`."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= 0.9995 * limit:
            return f"{_three(num_bytes / limit)} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | int) -> str:
    """95 -> `1m 35s`; below ten seconds with one decimal."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def visible(text: str) -> str:
    """Text safe for a terminal: control characters other than newline and tab become escapes such as `\\x1b`."""
    return "".join(
        char if char in "\n\t" or (char.isprintable() or char == "\u3000") else repr(char)[1:-1]
        for char in text
    )


def _prefixed(value: float | int) -> tuple[str, str]:
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return _three(value / limit), prefix
    return f"{value:.0f}", ""


def _three(value: float | int) -> str:
    """Three significant digits; whole numbers from 100 on."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
