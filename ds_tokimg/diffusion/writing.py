"""How a text is written."""

from __future__ import annotations

# Tokens that are drawn one after another, by models that have learnt it: runs of so many, side by side. Longer ones
# gain next to nothing.
RUN = 16
