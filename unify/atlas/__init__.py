"""The atlas: a static site of the map, every model and every edge, made of what the library derives, proves and measures.

    from unify.atlas import write
    write("atlas")      # atlas/index.html opens in a browser, without a server and without a network

Nothing on a page is typed here but words: what a model's page shows is what `unify show` prints, what an edge's page
shows is what `unify prove` proves and `unify.measured` measures, when the site is written.
"""

from .site import Atlas, write

__all__ = ["Atlas", "write"]
