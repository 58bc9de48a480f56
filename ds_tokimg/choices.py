"""The words that a setting can be one of, each list stated once: settings offer them, the code that knows them checks
them. No import, so that the help lists them at once."""

from __future__ import annotations

DOCUMENTS = ("line", "paragraph", "file")
LAYOUTS = ("patch", "raster")  # the order in which cells fill an image
PALETTES = ("id", "semantic")  # which token gets which colour
HEADS = ("posterior", "linear")  # what the network's output is
POSTERIORS = ("auto", "tokens", "digits", "tree")  # what the posterior head is over
OBJECTIVES = ("ce", "elbo", "mse")
SAMPLERS = ("ancestral", "euler", "heun")
WEIGHTS = ("ema", "trained")  # averaged ones, or those of the last step
TIMESTEPS = ("band", "uniform", "entropic", "noisy")  # where noise levels are drawn in training

# Of the transformer: depth, width, heads.
SIZES = {
    "XS": (6, 192, 6),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "H": (32, 1280, 16),
}
