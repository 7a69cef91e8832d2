"""Numbers and lists in words: one way to write each, all over the report."""

from collections.abc import Sequence
from datetime import datetime

from agnews_lora.serving.stats import accuracy_interval

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def percent(share: float, decimals: int = 2) -> str:
    """A share in percent."""
    return f"{share:.{decimals}%}"


def points(share: float, signed: bool = False) -> str:
    """A difference of shares in percentage points."""
    value = f"{100 * share:{'+' if signed else ''}.2f}".replace("-", "−")
    return f"{value} percentage points"


def whole(number: float) -> str:
    """A count, with a comma between thousands."""
    return f"{int(number):,}"


def number(value: float) -> str:
    """Three digits, as a reader writes them: 0.00356, and 2 × 10⁻⁵ rather than 2e-05."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{float(mantissa):g} × 10{power}"


def as_word(count: int) -> str:
    """Small numbers as words."""
    return _WORDS[count] if count < len(_WORDS) else f"{count:,}"


def counted(count: int, singular: str) -> str:
    """`one trial`, `twelve trials`, `48 trials`."""
    return f"{as_word(count)} {singular}{'' if count == 1 else 's'}"


def capital(text: str) -> str:
    """With a capital letter first; a symbol of one letter (r) stays as it is."""
    return text if len(text) == 1 else text[:1].upper() + text[1:]


def listed(items: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}" if items else ""


def interval(low: float, high: float) -> str:
    """Two shares as a range in percent."""
    return f"{low:.2%} to {high:.2%}".replace("-", "−")


def accuracy_range(accuracy: float, num_rows: int) -> str:
    """Wilson's 95% interval of an accuracy, in percent."""
    return interval(*accuracy_interval(round(accuracy * num_rows), num_rows))


def p_value(value: float) -> str:
    """`p = 0.031`, or `p < 0.001`: never divided between two lines."""
    words = "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def seconds(value: float) -> str:
    """A duration in its two largest units."""
    total = round(value)
    if total < 60:
        return f"{value:.1f} s" if value < 10 else f"{total} s"
    minutes, rest = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def mebibytes(value: float) -> str:
    """A number of bytes."""
    return f"{value / 2**20:,.0f} MiB"


def day(moment: datetime) -> str:
    """`1 March 2026`."""
    return f"{moment.day} {moment:%B %Y}"


def one_line(value: object, longest: int = 300) -> str:
    """A text from data on one line, cut where it is too long to show."""
    line = " ".join(str(value).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
