"""A look at the data as they will be trained: texts, tokens, lengths, padding, and how much noise their code stands."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.diffusion.path import readable_band, timestep_of_log_snr
from ds_tokimg.inference.pictures import Frame, draw
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.assemble import Parts
from ds_tokimg.training.forecast import padding_fraction, prepare

# Sizes of batches follow from the settings alone; this machine does everything that the engine's JSON may ask for.
MACHINE = engine_json.Machine(1, "cuda", bf16=True, fp16=True)
READ_SHARES = (0.99, 0.5, 0.01)
# Images whose characters are counted.
DECODED = 200
MOST_NOISE = 999.9  # timestep


def survey(config: TrainConfig, raw: dict, num_texts: int) -> tuple[dict, Parts]:
    """What a run with these settings would train on, as JSON values, and the run's parts.

    `raw`: the engine's JSON. `num_texts`: of the first images whose texts are given.

    Raises UserError for everything that would keep the run from starting.
    """
    run = prepare(config, raw, MACHINE)
    parts, train_set = run.parts, run.parts.train_set
    report = {
        "recipe": run.config.recipe,
        "texts": _texts(parts),
        "tokens": _tokens(parts),
        "lengths": histogram(train_set.corpus.lengths),
        "images": _images(parts) | {"padding_fraction": padding_fraction(parts, run.settings, 1)},
        "noise": noise_figures(parts.layout.codec, train_set.token_counts()),
        "samples": [_sample(train_set, i) for i in range(min(num_texts, len(train_set)))],
        "notes": [*run.notes, *_cuts(run.config, train_set)],
    }
    return report, parts


def pictures(parts: Parts, count: int) -> list[Image.Image]:
    """Pictures of the first images, each with its words, and with its prompt above it."""
    train_set, drawn = parts.train_set, []
    for i in range(min(count, len(train_set))):
        prompt = _decoded(train_set, train_set.prompt_ids(i)).replace("\n", " ")[:100]
        frame = Frame(train_set[i]["clean"], train_set.ids(i).tolist(), title=prompt)
        drawn.append(draw(frame, parts.layout, parts.tokenizer))
    return drawn


def histogram(lengths: np.ndarray) -> list[dict]:
    """How many texts have how many tokens, by powers of two (… 4 to 7, 8 to 15 …), from the shortest to the longest."""
    powers = np.log2(lengths).astype(int)
    counts, first = np.bincount(powers), int(powers.min())
    return [
        {"from": 2**power, "to": 2 ** (power + 1) - 1, "texts": int(n)}
        for power, n in enumerate(counts[first:], start=first)
    ]


def noise_figures(codec: TokenCodec, counts: np.ndarray) -> dict:
    """How much noise tokens of these frequencies stand, as timesteps (0 clean, 1000 noise).

    `read`: where a reader without context reads a share of the tokens right; None where it reads as many in pure noise.
    `band`: what lies between its ends is what has to be learnt (see `readable_band`).
    """
    band = readable_band(codec.radix)
    ends = timestep_of_log_snr(torch.tensor([band.high, band.low], dtype=torch.float64)).tolist()
    read = {f"{share:g}": noise_at(codec, counts, share) for share in READ_SHARES}
    return {"levels": codec.radix, "values_per_token": codec.digits_per_token, "read": read, "band": ends}


def noise_at(codec: TokenCodec, counts: np.ndarray, share: float) -> float | None:
    """The timestep where `read_share` is this share; None where there is none."""
    if read_share(codec, counts, MOST_NOISE) > share:
        return None
    low, high = 0.0, MOST_NOISE
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if read_share(codec, counts, middle) > share else (low, middle)
    return low


def read_share(codec: TokenCodec, counts: np.ndarray, t: float) -> float:
    """The share of tokens that are right when the nearest level of every channel is read at timestep t.

    Neighbouring levels are 2 / (radix - 1) apart, and the noise is sigma / alpha of a level's scale: an inner level is
    read right with the probability of noise within half a step, one at an end with that of noise on one side. The
    channels of a token are independent. counts: int64 [V], how often each token occurs.
    """
    half_step = 1 / (codec.radix - 1)
    inner = math.erf(half_step * (1000 - t) / (t * math.sqrt(2))) if t > 0 else 1.0
    is_end: Tensor = (codec.digit_table == 0) | (codec.digit_table == codec.radix - 1)  # [V, D]
    right = torch.where(is_end, 0.5 + 0.5 * inner, inner).double().prod(-1).numpy()
    return float((right * counts).sum() / counts.sum())


def _texts(parts: Parts) -> dict:
    train_set, eval_set = parts.train_set, parts.eval_set
    lengths = train_set.corpus.lengths
    return {
        "train": train_set.num_documents,
        "held_out": eval_set.num_documents,
        "with_prompts": int(np.count_nonzero(train_set.corpus.prompt_lengths)),
        "bytes": train_set.num_bytes,
        "median_tokens": float(np.median(lengths)),
        "longest_tokens": int(lengths.max()),
    }


def _tokens(parts: Parts) -> dict:
    train_set = parts.train_set
    return {
        "train": train_set.num_tokens,
        "vocab_size": parts.layout.codec.vocab_size,
        "ids_in_use": int(np.count_nonzero(train_set.token_counts())),
        "unigram_entropy": parts.unigram_entropy,
        "bytes_per_token": train_set.num_bytes / train_set.num_tokens,
        "characters_per_token": _characters_per_token(train_set),
    }


def _images(parts: Parts) -> dict:
    train_set, layout = parts.train_set, parts.layout
    capacity = layout.codec.capacity(layout.img_size)
    per_image = train_set.num_tokens / len(train_set)
    return {
        "train": len(train_set),
        "held_out": len(parts.eval_set),
        "img_size": layout.img_size,
        "capacity": capacity,
        "max_tokens": train_set.max_tokens,
        "tokens_per_image": per_image,
        "capacity_used": per_image / capacity,
        "max_tokens_used": per_image / train_set.max_tokens,
    }


def _characters_per_token(train_set: TokenImageDataset) -> float:
    """From images spread evenly over the data."""
    chosen = np.unique(np.linspace(0, len(train_set) - 1, DECODED).round().astype(int))
    texts = [train_set.ids(int(i)) for i in chosen]
    characters = sum(len(train_set.tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts)
    return characters / sum(map(len, texts))


def _sample(train_set: TokenImageDataset, i: int) -> dict:
    """What an image holds, ends of texts and marks of a chat template included."""
    ids, prompt = train_set.ids(i), train_set.prompt_ids(i)
    texts = {"prompt": _decoded(train_set, prompt) if len(prompt) else None, "text": _decoded(train_set, ids)}
    return texts | {"num_tokens": len(ids)}


def _decoded(train_set: TokenImageDataset, ids: np.ndarray) -> str:
    return str(train_set.tokenizer.decode(ids))


def _cuts(config: TrainConfig, train_set: TokenImageDataset) -> list[str]:
    """What becomes of texts that do not fit into an image."""
    lengths, room = train_set.corpus.lengths, train_set.max_tokens
    longer = int(np.count_nonzero(lengths > room))
    if config.packing and not config.enable_condition:
        return [
            "texts are packed: each follows the one before it, and one that an image's end cuts goes on in the next"
        ]
    if not longer:
        return []
    return [f"{longer:,} of {len(lengths):,} texts are longer than max_tokens, {room:,}: they go on in further images"]
