"""Numbers as text, with a true minus sign and few digits."""

import math


def finite(value: float | None) -> float | None:
    """Return `None` for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def number(value: float | None) -> str:
    """Format with four significant digits, whole numbers in full."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:,.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "−")


def short(value: float | None) -> str:
    """Format with three significant digits, including trailing zeros, so that adjacent numbers have equal lengths."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")
    return text.replace("-", "−")


def percent(share: float) -> str:
    """Format a share in [0, 1]."""
    return f"{100 * share:.0f}%" if share >= 0.01 or share == 0 else "< 1%"


def duration(seconds: float) -> str:
    """Format with two units: `"4 min 3 s"`."""
    if 0 < seconds < 0.05:
        return "< 0.1 s"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
