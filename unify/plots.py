"""Pictures in one style, and controls that redraw them: what a notebook needs beside the library's own views.

    figure, (left, right) = canvas(2)               # axes with the house's colours, legible on a slide
    sliders(draw, alpha=Slider(0.9, 0.5, 1.0))      # the last line of a cell: draw(alpha=0.9), and a slider below it

A `Picture` is an ordinary PNG output: it is there whether or not a kernel runs. Only what lies below it needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from .draw import FACE, PALETTE
from .errors import UnifyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GREY", "PALETTE", "Choice", "Picture", "Slider", "Sliders", "canvas", "heat", "sliders"]

GREY = "0.45"
PANEL = (4.6, 3.5)  # inches of one panel
DPI = 110


def canvas(columns: int = 1, rows: int = 1, panel: tuple[float, float] = PANEL, **options) -> tuple[Figure, Any]:
    """A figure and its axes, as matplotlib's `subplots` gives them.

    panel: width and height of one panel, inches. options: more of `subplots` (sharey, width_ratios ...).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.family": FACE, "font.size": 9.5, "axes.titlesize": 11, "axes.prop_cycle": _cycle()}
    with rc_context(style):
        figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
        axes = figure.subplots(rows, columns, **options)
        for one in figure.axes:
            one.grid(color="0.92")
            one.set_axisbelow(True)
            one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _cycle():
    from cycler import cycler

    return cycler(color=PALETTE)


def heat(axes: Axes, values, label: str, *, signed: bool = False, limit: float | None = None, **options) -> None:
    """A matrix [rows, columns] as a heat map with its colour bar.

    label: of the bar, with the unit. signed: blue below 0, orange above, white at 0. limit: the largest value shown.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    values = np.asarray(values, dtype=float)
    top = float(np.abs(values).max()) if limit is None else limit
    stops = (PALETTE[0], "#ffffff", PALETTE[1]) if signed else ("#ffffff", PALETTE[0], "#001a33")
    colours = LinearSegmentedColormap.from_list("house", stops)
    options = {"aspect": "auto", "interpolation": "nearest", "origin": "lower", **options}
    low = -top if signed else min(0.0, float(values.min()))
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=top or 1.0, **options)
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, pad=0.02).set_label(label)


@dataclass(frozen=True)
class Picture:
    """A figure as a notebook shows it without a kernel: a PNG, and a sentence where no picture can be."""

    figure: Figure
    text: str = "a picture"

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()

    def __repr__(self):
        return self.text


# --- controls ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slider:
    """A number between low and high; log: spaced by factors. It starts at `start`."""

    start: float
    low: float
    high: float
    label: str = ""
    log: bool = False

    def __post_init__(self):
        given = f"Slider({self.start}, {self.low}, {self.high})"
        if not self.low <= self.start <= self.high or (self.log and self.low <= 0):
            works = "use 0 < low <= start <= high" if self.log else "use low <= start <= high"
            raise UnifyError(given, "its start lies outside, or its logarithm is not finite", works)

    def widget(self, name: str):
        """The control in ipywidgets."""
        import ipywidgets
        from numpy import log10

        rest = {"description": self.label or name, "continuous_update": False, "style": {"description_width": "8em"}}
        if self.log:
            rest |= {"min": log10(self.low), "max": log10(self.high), "step": (log10(self.high / self.low)) / 60}
            return ipywidgets.FloatLogSlider(value=self.start, **rest)
        return ipywidgets.FloatSlider(
            value=self.start, min=self.low, max=self.high, step=(self.high - self.low) / 100, **rest
        )


@dataclass(frozen=True)
class Choice:
    """One of several names; it starts at the first unless `start` says otherwise."""

    options: Sequence[str]
    start: str = ""
    label: str = ""

    def __post_init__(self):
        object.__setattr__(self, "options", tuple(self.options))
        if not self.options or (self.start and self.start not in self.options):
            raise UnifyError(
                f"Choice({self.options!r}, {self.start!r})", "nothing to start at", "name one of the options"
            )
        object.__setattr__(self, "start", self.start or self.options[0])

    def widget(self, name: str):
        """The control in ipywidgets."""
        import ipywidgets

        rest = {"description": self.label or name, "style": {"description_width": "8em"}}
        return ipywidgets.Dropdown(options=self.options, value=self.start, **rest)


@dataclass
class Sliders:
    """What `sliders` returns: shown as a picture with controls below it. widgets: the controls by name, once shown."""

    draw: Callable[..., Any]
    controls: dict[str, Slider | Choice]
    text: str = ""
    widgets: dict[str, Any] = field(default_factory=dict)

    def view(self, **values) -> Any:
        """What is shown for these values, the others at their start."""
        given = {name: control.start for name, control in self.controls.items()} | values
        made = self.draw(**given)
        if not hasattr(made, "savefig"):
            return made
        return Picture(made, self.text or ", ".join(f"{name} = {x}" for name, x in given.items()))

    def _ipython_display_(self):
        from IPython.display import display

        handle = display(self.view(), display_id=True)
        try:
            import ipywidgets
        except ImportError:  # the picture stands by itself
            return
        self.widgets = {name: control.widget(name) for name, control in self.controls.items()}

        def moved(_) -> None:
            handle.update(self.view(**{name: x.value for name, x in self.widgets.items()}))

        for x in self.widgets.values():
            x.observe(moved, "value")
        display(ipywidgets.VBox(list(self.widgets.values())))


def sliders(draw: Callable[..., Any], text: str = "", **controls: Slider | Choice) -> Sliders:
    """draw(**values) as an ordinary output, and controls below it that redraw it while a kernel runs.

    draw: one keyword argument for each control -> a matplotlib figure, or anything else that a notebook shows.
    text: a sentence for who cannot see the picture. Without a kernel, or without ipywidgets, what is drawn at the start
    stays. Raises UnifyError where a control is neither a `Slider` nor a `Choice`.
    """
    for name, control in controls.items():
        if not isinstance(control, Slider | Choice):
            raise UnifyError(f"{name}={control!r}", "this is no control", "pass a Slider or a Choice")
    return Sliders(draw, controls, text)
