"""Bits per token and per byte of a 4-gram model of each corpus of the learning tables: what counting alone reaches.

    python -m benchmarks.ngram

On the training and held-out images of the recipe `at-once`, all of them counted once. `benchmarks.tables` holds the
figures as constants, as it does the unigram entropies.
"""

import tempfile

from benchmarks.learning import corpus_settings
from ds_tokimg.engine.ranks import OnlyRank
from ds_tokimg.settings.command_line import recipe_values
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training import ngram
from ds_tokimg.training.assemble import assemble


def main() -> None:
    for corpus in ("web_narrative", "python"):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(**recipe_values("at-once") | corpus_settings(corpus, folder))
            config.validate()
            parts = assemble(config, OnlyRank(), None)
            figure = ngram.measure(parts.train_set, parts.eval_set, most_tokens=parts.train_set.num_tokens)
        assert figure is not None
        per_byte = figure.bits_per_token * parts.eval_set.num_tokens / parts.eval_set.num_bytes
        print(f"{corpus}: {figure} bits per token, {per_byte:.3f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
