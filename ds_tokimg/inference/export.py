"""A trained model as a folder that needs neither DeepSpeed nor the run, for oneself and for others."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from pathlib import Path

from ds_tokimg import recipes
from ds_tokimg.data.text_format import TextFormat, without_places
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.errors import UserError
from ds_tokimg.inference.card import Origin, card
from ds_tokimg.inference.loading import TOKENIZER, TrainedModel, is_checkpoint
from ds_tokimg.settings import formats
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.files import runs_around
from ds_tokimg.settings.manifest import checksums, files_in, write_manifest

CARD = "README.md"


def export(trained: TrainedModel, output: Path, origin: Origin, name: str, licence: str | None = None) -> None:
    """Writes the folder whole or not at all; no file in it says where the model or its texts lay.

    Args:
        origin: of `origin_of`. name: what the card calls the model. licence: as the hub names it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}-{secrets.token_hex(8)}")
    staging.mkdir()
    trained = dataclasses.replace(trained, format=_public_format(trained.format))
    try:
        trained.model.save_pretrained(staging)
        (staging / formats.TEXT).write_text(trained.format.description() + "\n", encoding="utf-8")
        trained.tokenizer.save_pretrained(staging / TOKENIZER)
        if origin.settings is not None:
            _public_settings(origin.settings, trained.format).save(staging / formats.CONFIG)
        write_manifest(staging, checksums(staging, files_in(staging)))
        # Not among the checksums: it is there to be edited.
        (staging / CARD).write_text(card(trained, origin, name, licence), encoding="utf-8")
        if output.is_dir():
            output.rmdir()
        os.replace(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def origin_of(folder: Path, weights: str) -> Origin:
    """What the folder of a model, and the run around it, tell of its training."""
    places = [folder / formats.CONFIG, *(run / formats.CONFIG for run in runs_around(folder))]
    settings = next((TrainConfig.load(place) for place in places if place.is_file()), None)
    if not is_checkpoint(folder):
        return Origin(settings)
    state = checkpoints.read_state(folder)
    best, best_step = state.get("best"), state.get("best_step")
    return Origin(
        settings,
        state["step"],
        weights if state["engine"]["ema_decay"] else "trained",
        state.get("figures"),
        None if best is None or best_step is None else (best, best_step),
    )


def push_to_hub(folder: Path, name: str) -> str:
    """Puts an export on the Hugging Face hub as the user who is logged in there, and returns its address.

    A repository that is not there is made, a private one. Raises UserError with the hub's reason.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="ds_tokimg export")
    except Exception as error:  # the library raises whatever the network raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--push_to_hub {name}: {reason} (the export itself is whole, in {folder})") from None
    return str(repository)


def _public_format(text_format: TextFormat) -> TextFormat:
    """Of the texts' paths only the names."""
    held_out = text_format.eval_data_path
    return dataclasses.replace(
        text_format,
        data_path=without_places(text_format.data_path),
        eval_data_path=held_out and without_places([held_out])[0],
    )


def _public_settings(settings: TrainConfig, text_format: TextFormat) -> TrainConfig:
    """The run's settings without paths: what a fine-tuned model takes over, and what the method was."""
    defaults = TrainConfig()
    names = ("cache_dir", "tokenizer_path", "output_dir", "resume", "init_from", "deepspeed_config")
    return dataclasses.replace(
        settings,
        **{name: getattr(defaults, name) for name in names},
        data_path=text_format.data_path or ["unknown"],
        eval_data_path=text_format.eval_data_path,
        recipe=settings.recipe if settings.recipe in recipes.names() else None,
    )
