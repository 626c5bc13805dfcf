"""The study's look: a colour, a mark and a line for each method, titles, legends, and how a figure is stored."""

import io
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from apbm_core.errors import ConfigError
from apbm_core.files import write_atomically
from apbm_core.study.methods import get_method

# The methods' colours, each in its file, are Okabe and Ito's, which the colour-blind can tell apart, and three more.
OWN_COLOURS = ("#332288", "#882255", "#117733", "#AA4499", "#6699CC", "#661100")  # for those without (Tol's "muted")
OWN_MARKERS = "<>8dH"
_own: dict[str, int] = {}  # methods without a colour or mark, in the order in which they were first drawn
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def colour(method: str) -> str:
    """A method's colour, the same in every figure; one without a colour of its own gets one that is left."""
    method = method.partition("@")[0]  # with other widths it is still the same method
    return _look(method, "colour") or OWN_COLOURS[_own.setdefault(method, len(_own)) % len(OWN_COLOURS)]


def marker(method: str) -> str:
    """A method's mark, likewise; with other widths than the others' a cross of its own."""
    if "@" in method:
        return "H" if method.startswith("apbm@") else "x"
    return _look(method, "marker") or OWN_MARKERS[_own.setdefault(method, len(_own)) % len(OWN_MARKERS)]


def _look(method: str, attribute: str) -> str | None:
    """What the method's file says; None if it says nothing, or is gone since the method was recorded."""
    try:
        return getattr(get_method(method), attribute)
    except ConfigError:
        return None


def use_style() -> None:
    """Apply the study's look to all figures that follow."""
    plt.rcParams.update(STYLE)


def save(figure: Figure, name: str, folder: str | Path, banner: str = "", title: str = "") -> Figure:
    """Write ``folder/figures/<name>.png``, with the banner across the top if there is one; return the figure.

    The file carries ``title``, what the figure says, for whoever lists it or cannot see it.
    """
    if banner:
        figure.suptitle(banner, color="#B00020", fontweight="bold")
    path = Path(folder) / "figures" / f"{name}.png"
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, _with_few_colours(picture, title))
    return figure


def _with_few_colours(picture: io.BytesIO, title: str) -> bytes:
    """The PNG with a palette, a third as large: a figure has few colours but for the shades of its letters' edges.

    It says nothing of the software that wrote it: equal figures, equal files.
    """
    image = Image.open(picture).convert("RGB")
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    facts, smaller = PngInfo(), io.BytesIO()
    if title:
        facts.add_text("Title", title)
    few.save(smaller, format="PNG", optimize=True, dpi=(STYLE["savefig.dpi"],) * 2, pnginfo=facts)
    return smaller.getvalue()


def line_style(method: str) -> str:
    """A method's line: with other widths than the others' it is dashed."""
    return "--" if "@" in method else "-"


def set_title(axis: Axes, words: str, width: int) -> None:
    """What a panel found, in lines of so many characters, for a long one would run into the next panel."""
    axis.set_title(in_lines(words, width), loc="left", fontsize=10)


def in_lines(words: str, width: int) -> str:
    """``words`` in lines of at most ``width`` characters, a number and its percent sign on one of them."""
    return textwrap.fill(words.replace(" %", "\N{NO-BREAK SPACE}%"), width).replace("\N{NO-BREAK SPACE}", " ")


def shared_legend(figure: Figure, axes: Iterable[Axes], title: str | None = None) -> None:
    """One legend for several panels, beside them; what is drawn in several of them is named once."""
    named = {}
    for axis in axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(text, handle)
    figure.legend(named.values(), named.keys(), fontsize=8, title=title, loc="outside right center")
