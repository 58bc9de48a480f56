"""What a run is made of, put together before anything is written: tokenizer, data, codec, model, engine settings."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ds_tokimg.console import Work
from ds_tokimg.data import corpus
from ds_tokimg.data.batch import BatchMaker, BatchPacker, Draws
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.order import steps_per_epoch
from ds_tokimg.data.records import ReadOptions
from ds_tokimg.data.sources import find_all
from ds_tokimg.data.stream import Sampled, TextStream, stream_of
from ds_tokimg.data.text_format import TextFormat, dataset_of
from ds_tokimg.data.tokenise import Settings
from ds_tokimg.errors import UserError, raise_problems
from ds_tokimg.inference.loading import TrainedModel, load_trained, tokenizer_folder
from ds_tokimg.model.config import JiTConfig, config_of_name
from ds_tokimg.model.files import codec_of
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings import formats
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.start import start_of
from ds_tokimg.tokens import tokenizer as tokenizers
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.layout import PatchLayout
from ds_tokimg.tokens.palette import semantic_palette
from ds_tokimg.training.objective import TrainingLoss


@dataclass
class Parts:
    """Everything of a run but the engine."""

    tokenizer: tokenizers.Tokenizer
    text_format: TextFormat
    layout: PatchLayout
    train_set: TokenImageDataset
    eval_set: TokenImageDataset
    module: TrainingLoss
    batch_maker: BatchMaker
    stream: TextStream | None = None  # then `train_set` is a sample of what is trained on

    @property
    def images(self) -> int:
        """Training images of an epoch; of a stream, about."""
        return self.stream.images if self.stream else len(self.train_set)

    def steps_per_epoch(self, train_batch_size: int) -> int:
        """Optimiser steps of an epoch; of a stream, about."""
        return steps_per_epoch(self.images, train_batch_size)

    @property
    def notes(self) -> list[str]:
        """What a person should know about the texts, each once."""
        streamed = self.stream.notes if self.stream else []
        return list(
            dict.fromkeys([*streamed, *self.train_set.notes, *self.eval_set.notes, *self._trained_and_held_out()])
        )

    def _trained_and_held_out(self) -> list[str]:
        """Says how many validation texts are also trained on, where validation has texts of its own."""
        held_out = self.eval_set.hashes
        if not len(held_out) or not (self.eval_set.own.any() or self.text_format.eval_data_path):
            return []
        common = np.intersect1d(held_out, self.train_set.hashes)
        count = int(np.isin(held_out, common).sum())
        more = "also trained on: the validation is better than on new texts"
        return [f"{count:,} of {len(held_out):,} validation texts are {more}"] if count else []

    def not_as_asked(self, config: TrainConfig) -> list[str]:
        """What is to be said where the texts do not give what was asked for: conditions, tokens."""
        notes = []
        if config.enable_condition and not self.train_set.prompt_lengths.any():
            notes.append("--enable_condition has no effect: no training text has a prompt")
        size = tokenizers.vocab_size(self.tokenizer)
        if not (config.tokenizer_path or config.init_from or config.resume) and size < config.vocab_size:
            notes.append(
                f"the tokenizer has {size:,} tokens and not {config.vocab_size:,} (--vocab_size): the texts are too "
                "short for more"
            )
        return notes

    @cached_property
    def unigram_entropy(self) -> float:
        """Bits per token of the training tokens, each alone: what a model without context could reach."""
        counts = self.train_set.token_counts().astype(float)
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log2(share)).sum())


def assemble(config: TrainConfig, dist, resumed: Path | None, start: TrainedModel | None = None) -> Parts:
    """Loads and checks all parts.

    Args:
        resumed: the checkpoint folder that the run goes on from.
        start: the model that a new run starts from, see `load_start`.

    Raises UserError for what the user has to change.
    """
    tokenizer = dist.on_first_rank(lambda: choose_tokenizer(config, resumed, start))
    text_format = TextFormat.of_run(config, tokenizer, canvas=0)
    layout = PatchLayout(_codec(config, tokenizer, start), config.img_size, config.patch_size, config.layout)
    where = {"load": Sampled()} if config.streaming else {"cache_dir": config.cache_dir}
    train_set, eval_set = _data_sets(config, text_format, layout, tokenizer, where)
    if config.palette == "semantic" and layout.codec.palette is None:
        layout = _with_palette(layout, train_set, dist, resumed)
        train_set, eval_set = _data_sets(config, text_format, layout, tokenizer, where)
    if config.enable_condition:
        answers = train_set.lengths[train_set.prompt_lengths > 0]
        canvas = int(layout.num_patches([answers.max(initial=1)])[0])
        text_format = TextFormat.of_run(config, tokenizer, canvas)
    module = _module(config, layout.codec, start, dist.device)
    packer = BatchPacker(layout, module.model.writing.block_size)
    draws = draws_of(config, module.model, text_format)
    maker = BatchMaker(packer, module.timesteps, config.seed, draws)
    stream = _stream(config, train_set, tokenizer) if config.streaming else None
    return Parts(tokenizer, text_format, layout, train_set, eval_set, module, maker, stream)


def load_start(config: TrainConfig) -> TrainedModel | None:
    """The model of --init_from. One UserError names every setting, and the tokenizer, that it decides otherwise."""
    if config.init_from is None:
        return None
    start, taken = load_trained(config.init_from), start_of(config.init_from)
    problems = [
        f"--{name} is {getattr(config, name)!r}, the model has {value!r}"
        for name, value in (taken.shape if taken else {}).items()
        if getattr(config, name) != value
    ]
    if config.tokenizer_path:
        given = tokenizers.load_tokenizer(config.tokenizer_path)
        if tokenizers.fingerprint(given) != tokenizers.fingerprint(start.tokenizer):
            problems.append(f"--tokenizer_path {config.tokenizer_path} is not the model's tokenizer")
    raise_problems(f"--init_from {config.init_from} decides these: leave the flags out, or start a new model", problems)
    return start


def choose_tokenizer(config: TrainConfig, resumed: Path | None, start):
    """The run's own when it goes on, the given one, that of --init_from, or one trained on the corpus."""
    given = tokenizers.load_tokenizer(config.tokenizer_path) if config.tokenizer_path else None
    own, source = None, None
    if resumed is not None:
        source = tokenizer_folder(resumed)
        own = tokenizers.tokenizer_in(source)
    elif start is not None:
        own, source = start.tokenizer, config.init_from
    if own is None:
        with Work("training the tokenizer"):
            return given or tokenizers.train_tokenizer(_texts_of(config), config.vocab_size)
    if given is not None and tokenizers.fingerprint(given) != tokenizers.fingerprint(own):
        raise UserError(
            f"--tokenizer_path {config.tokenizer_path} is not the tokenizer that {source} was trained with: "
            "leave the flag out, or start a new run"
        )
    return own


def _texts_of(config: TrainConfig):
    """The training texts as strings."""
    return corpus.read_texts(find_all(config.data_path, config.part(ReadOptions)))


def _codec(config: TrainConfig, tokenizer, start) -> TokenCodec:
    if start is not None:
        return start.layout.codec
    try:
        return TokenCodec(tokenizers.vocab_size(tokenizer), config.token_size, config.radix)
    except ValueError as error:
        raise UserError(str(error)) from None


def _stream(config: TrainConfig, train_set: TokenImageDataset, tokenizer) -> TextStream:
    settings = config.part(Settings)
    return stream_of(train_set, find_all(config.data_path, config.part(ReadOptions)), tokenizer, settings, config.seed)


def _data_sets(config: TrainConfig, text_format: TextFormat, layout: PatchLayout, tokenizer, where: dict):
    """Training and validation texts. Without --eval_data_path some documents of the training data are held out.

    where: what makes their corpora, see `dataset_of`."""

    def texts(path, split: str):
        return dataset_of(text_format, layout, tokenizer, path, split, **where)

    if config.eval_data_path:
        train_set, eval_set = texts(config.data_path, "all"), texts(config.eval_data_path, "all")
    else:
        train_set, eval_set = texts(config.data_path, "train"), texts(config.data_path, "eval")
    if not len(train_set):
        raise UserError(
            f"{' '.join(config.data_path)}: no text is left to train on (--eval_fraction "
            f"{config.eval_fraction} holds all of it out): give more data, or --eval_data_path"
        )
    return train_set, eval_set


def _with_palette(layout: PatchLayout, train_set, dist, resumed: Path | None) -> PatchLayout:
    codec = layout.codec
    if resumed is not None:
        palette = _palette_of(resumed)
    else:
        with Work("learning the palette"):
            palette = dist.on_first_rank(
                lambda: semantic_palette(train_set.token_stream(), codec.vocab_size, codec.radix, codec.token_size)
            )
    codec = TokenCodec(codec.vocab_size, codec.token_size, codec.radix, palette)
    return PatchLayout(codec, layout.img_size, layout.patch_size, layout.layout)


def _palette_of(checkpoint: Path) -> torch.Tensor | None:
    paths = formats.files_of(checkpoint, formats.MODEL, may_have=[formats.TEXT])
    model = formats.read_together(paths).files[formats.MODEL]
    return codec_of(model, paths[formats.MODEL]).palette


def _module(config: TrainConfig, codec: TokenCodec, start, device: torch.device) -> TrainingLoss:
    """Model and objective with the run's initial weights, the same on every rank."""
    torch.manual_seed(config.seed)
    try:
        size = config_of_name(config.model)
        in_turn = None if config.in_turn is None else config.in_turn > 0
        shape = {"depth": size.depth, "width": size.width, "heads": size.heads, "patch_size": size.patch_size}
        model = JiT(codec, config.part(JiTConfig, in_turn=in_turn, **shape), config.block_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if start is not None:
        _load_initial(model, start, config.init_from)
    if config.compile:
        _compile(model, device)
    return TrainingLoss(model, config.objective, config.timesteps)


def draws_of(config: TrainConfig, model: JiT, text_format: TextFormat) -> Draws:
    """What is drawn of every sample."""
    own = {"in_turn": in_turn_share(config, model), "canvas": text_format.answers}
    if not config.enable_condition:
        own["condition_drop"] = None
    return config.part(Draws, **own)


def in_turn_share(config: TrainConfig, model: JiT) -> float:
    """The share of samples whose tokens are predicted in turn."""
    if not model.config.in_turn or config.in_turn is not None:
        return config.in_turn or 0.0
    # Patches alone are never drawn otherwise; but the log's bits are those of many small steps (see `TrainingLoss`).
    return 1.0 if model.writing.block_size == 1 and config.timesteps == "noisy" else 0.75


def _compile(model: JiT, device: torch.device) -> None:
    """Each layer on its own, when it is first called: they share one piece of code, whatever their number. It is made
    for all batch sizes and lengths, as batches are formed by length."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile needs a C++ compiler on a CPU, and there is no {compiler}: install it or set CXX")
    for layer in model.layers:
        layer.compile(dynamic=True)


def _load_initial(model: JiT, start, source: str) -> None:
    theirs, ours = start.model.state_dict(), model.state_dict()
    wrong = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]
    if wrong or set(theirs) - set(ours):
        raise UserError(
            f"--init_from {source} holds another model ({wrong[0] if wrong else 'more weights'} differs): "
            "use the same --model, --head, --posterior, --noisy_depth and --local_window"
        )
    if not next(model.parameters()).is_meta:  # else only its size is asked for
        model.load_state_dict(theirs)
