"""Names of curves, and texts that TensorBoard shows as they stand."""

import html
import re

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from ds_tokimg.training.dashboard import GROUP_OF, as_markdown, layout_of, scalars, table


def test_curves_are_in_four_groups_under_their_own_names():
    row = {"step": 3, "loss": 1, "lr": 2, "tokens_seen": 3, "step_seconds": 4, "val_loss": 5, "val_bits_per_token": 6}
    row |= {"bits_per_token": 7.5, "val_token_accuracy": {"t0-100": 0.5}, "note": None, "another": 8}
    assert dict(scalars(row, {})) == {
        "train/loss": 1.0,
        "train/lr": 2.0,
        "train/bits_per_token": 7.5,
        "train/another": 8.0,
        "val/loss": 5.0,
        "val/bits_per_token": 6.0,
        "val/token_accuracy/t0-100": 0.5,
        "data/tokens_seen": 3.0,
        "perf/step_seconds": 4.0,
    }
    assert dict(scalars({"val_loss": 5}, {"val_loss": "val/loss_on_path"})) == {"val/loss_on_path": 5.0}


def test_the_layout_begins_with_bits_beside_the_unigram_entropy():
    layout = layout_of({"val_loss": "val/loss_on_path"})
    charts = next(iter(layout.values()))
    assert next(iter(charts.values()))[1][:2] == ["^val/bits_per_token$", "^val/unigram_entropy$"]
    curves = [curve for section in layout.values() for _, tags in section.values() for curve in tags]
    shown = {"val_loss_by_noise": {"t0-100": 1}, "val_bits_by_noise": {"drawn": 1}, "val_token_accuracy": {"t0-100": 1}}
    shown |= dict.fromkeys(["val_bits_per_token", "val_bits_per_byte", "val_unigram_entropy", "loss", "lr"], 1)
    shown |= dict.fromkeys(["bits_per_token", "grad_norm", "valid_tokens_per_second", "data_wait"], 1)
    shown |= {"val_loss": 1, "peak_memory_bytes": 1}
    tags = [tag for tag, _ in scalars(shown, {"val_loss": "val/loss_on_path"})]
    assert all(any(re.match(curve, tag) for curve in curves) for tag in tags)  # nothing is left out,
    assert all(any(re.match(curve, tag) for tag in tags) for curve in curves)  # and no chart is empty
    assert set(GROUP_OF.values()) == {"data", "perf"}


@pytest.mark.parametrize(
    "text",
    [
        "*a* _b_ `c` # d\n# e\n\n\n- f\n1. g\n    h | i \\ <script>alert(1)</script> &amp; [j](k) ![l](m) ~~n~~",
        "  two\n\tthree\n---\n===\n> quoted\n```\ncode\n```\n| a | b |\n|---|---|\n",
        "ä€𝄞 \ufffd «»\r\nnext",
    ],
)
def test_a_text_is_shown_as_it_stands(text):
    """In a cell of a table, as TensorBoard makes HTML of it."""
    page = markdown_to_safe_html(table(("from", "text"), [("x", as_markdown(text))]))
    cell = re.search(r"<td>x</td>\s*<td>(.*?)</td>", page, re.S).group(1)
    shown = html.unescape(re.sub(r"<br\s*/?>", "\n", cell)).replace("\xa0", " ")
    assert shown.rstrip() == text.replace("\r\n", "\n").replace("\t", "    ").rstrip()
