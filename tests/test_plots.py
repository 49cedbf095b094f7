"""Pictures stand without a kernel; sliders redraw them where there is one; nothing heavy is imported before it is used."""

import subprocess
import sys

import numpy as np
import pytest

from unify.errors import UnifyError
from unify.plots import Choice, Picture, Slider, canvas, heat, sliders


def square(x, name="a"):
    figure, axes = canvas()
    axes.plot([0, x], [0, x * x], label=name)
    return figure


def test_a_picture_is_a_png_that_says_what_it_shows():
    figure, axes = canvas(2, 1)
    assert len(axes) == 2
    picture = Picture(figure, "two empty panels")
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert picture._repr_png_() == picture._repr_png_()
    assert repr(picture) == "two empty panels"


def test_heat_shows_the_values_it_is_given():
    values = np.array([[0.0, -2.0], [1.0, 0.5]])
    figure, axes = canvas()
    heat(axes, values, "value", signed=True)
    (image,) = axes.images
    assert (image.get_array() == values).all()
    assert image.get_clim() == (-2.0, 2.0)  # white is 0
    assert figure.axes[1].get_ylabel() == "value"
    _, axes = canvas()
    heat(axes, values.clip(0), "value", limit=5.0)
    assert axes.images[0].get_clim() == (0.0, 5.0)


def test_sliders_show_what_is_drawn_at_the_start():
    found = sliders(square, x=Slider(2.0, 0.0, 3.0), name=Choice(["a", "b"]))
    picture = found.view()
    assert repr(picture) == "x = 2.0, name = a"
    assert picture.figure.axes[0].lines[0].get_ydata()[1] == 4.0
    assert found.view(x=3.0).figure.axes[0].lines[0].get_ydata()[1] == 9.0
    assert sliders(lambda x: f"x is {x}", x=Choice(["a", "b"], "b")).view() == "x is b"


def test_a_moved_slider_redraws_the_picture_in_place(monkeypatch):
    import IPython.display as notebook

    shown = []

    class Handle:
        def update(self, what):
            shown[0] = what

    def display(what, display_id=False):
        shown.append(what)
        return Handle() if display_id else None

    monkeypatch.setattr(notebook, "display", display)
    found = sliders(square, x=Slider(1.0, 0.1, 10.0, log=True), name=Choice(["a", "b"]))
    found._ipython_display_()
    assert isinstance(shown[0], Picture)  # the picture is an output of its own, not inside a widget
    assert len(shown) == 2
    found.widgets["x"].value = 10.0
    found.widgets["name"].value = "b"
    assert repr(shown[0]) == "x = 10.0, name = b"


def test_without_widgets_the_picture_stands_alone(monkeypatch):
    import IPython.display as notebook

    shown = []
    monkeypatch.setattr(notebook, "display", lambda what, display_id=False: shown.append(what))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    sliders(square, x=Slider(1.0, 0.0, 2.0))._ipython_display_()
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Slider(2.0, 0.0, 1.0), "start lies outside"),
        (lambda: Slider(0.0, 0.0, 1.0, log=True), "0 < low"),
        (lambda: Choice([]), "nothing to start at"),
        (lambda: Choice(["a"], "b"), "nothing to start at"),
        (lambda: sliders(square, x=3), "no control"),
    ],
)
def test_a_control_that_cannot_be_is_refused(make, says):
    with pytest.raises(UnifyError, match=says):
        make()


def test_plots_import_nothing_heavy(tmp_path):
    code = "import sys, unify.plots; print([x for x in ('matplotlib', 'numpy', 'torch', 'ipywidgets') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
