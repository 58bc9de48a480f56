"""Exports of tiny models with random weights, as a user would get them from a run."""

from __future__ import annotations

from pathlib import Path

from ds_tokimg.data.text_format import TextFormat
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.tokenizer import fingerprint, train_tokenizer
from tests.support.runs import WORDS
from tests.support.tiny import tiny_model

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_export(
    folder: Path, *, enable_condition=False, use_chat_template=False, tokenizer=None, token_size=1, **shape
) -> Path:
    """An export of a tiny model. `shape`: of `tiny_model`."""
    tokenizer = tokenizer or train_tokenizer([" ".join(WORDS)] * 4, 280)
    if use_chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    model = tiny_model(TokenCodec(len(tokenizer), token_size), **shape).eval()
    text_format = TextFormat(
        max_tokens=64,
        canvas=2 if enable_condition else 0,
        packing=True,
        enable_condition=enable_condition,
        use_chat_template=use_chat_template,
        eos_id=tokenizer.eos_token_id,
        tokenizer=fingerprint(tokenizer),
        data_path=[],
        eval_data_path=None,
        text_key=None,
        document=None,
        skip_bad_records=False,
        streaming=False,
        eval_fraction=0.05,
        objective="ce",
        timesteps="band",
    )
    model.save_pretrained(folder)
    (folder / "text.json").write_text(text_format.description(), encoding="utf-8")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def word_tokenizer(lowercase: bool = False):
    """A tokenizer that loses text: five words are all it has, the others are [UNK]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "<eos>", "▁the", "▁old", "▁house", "▁by", "▁sea"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<eos>")
