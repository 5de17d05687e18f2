"""Colors that people with any vision for colors tell apart, and that differ in a print without them."""

# Okabe, Ito, "Color universal design", 2008, without its yellow, which is too light for lines on white
COLORS = ("#0072b2", "#d55e00", "#009e73", "#8c8c8c", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def style(index: int) -> tuple[str, str]:
    """A color and a marker, of which no two are alike for 56 lines.

    Example:
        >>> len({style(k) for k in range(56)})
        56
    """
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
