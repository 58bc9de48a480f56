"""What learning rate, train batch and epochs are where nobody says."""

import dataclasses

import pytest

from ds_tokimg.data.order import steps_per_epoch
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.training import automatic


def config_of(*argv: str):
    return train_config(["--data_path", "x", *argv])


def decided(*argv: str, raw: dict | None = None, images: int = 2000, world_size: int = 1, resumed: int | None = None):
    return automatic.decide(config_of(*argv), raw or {}, images, world_size, resumed)


def test_the_learning_rate_is_that_of_the_recipe_and_halves_as_the_width_doubles():
    assert decided()[0].lr == 6e-3
    assert decided("--recipe", "left-to-right")[0].lr == 3e-3
    assert decided("--model", "JiT-S/2")[0].lr == 3e-3
    assert decided("--model", "JiT-B/2")[0].lr == 1.5e-3


def test_fine_tuning_takes_half_of_it():
    config, words = decided("--init_from", "a run")
    assert config.lr == 3e-3
    assert words[0] == "lr 0.003 for JiT-XS/2 from trained weights"


def test_the_train_batch_grows_with_the_square_root_of_the_corpus():
    sizes = [decided(images=images)[0].train_batch_size for images in (10, 2143, 16_000, 100_000, 10_000_000)]
    assert sizes == [4, 4, 8, 16, 64]
    assert decided("--recipe", "left-to-right", images=8000)[0].train_batch_size == 4


def test_epochs_give_the_wanted_steps_within_a_bound():
    for images in (50, 500, 2000, 5000, 100_000):
        config = decided(images=images)[0]
        steps = config.epochs * steps_per_epoch(images, config.train_batch_size)
        assert 1 <= config.epochs <= config.most_epochs
        assert steps >= config.wanted_steps or config.epochs == config.most_epochs
        assert config.epochs == 1 or steps - steps / config.epochs < config.wanted_steps


def test_what_is_given_stays():
    argv = ["--lr", "0.1", "--train_batch_size", "3", "--epochs", "2"]
    assert decided(*argv) == (config_of(*argv), [])
    raw = {"optimizer": {"params": {"lr": 0.1}}, "train_batch_size": 10}
    config, lines = decided(raw=raw, images=1000)
    assert (config.lr, config.train_batch_size, config.epochs) == (None, None, 8)
    assert lines == ["8 epoch(s) for 800 steps"]


def test_a_micro_batch_fixes_the_train_batch_too():
    config = decided("--batch_size", "5", images=1000, world_size=2)[0]
    assert (config.train_batch_size, config.epochs) == (None, 8)


def test_a_resumed_run_keeps_its_train_batch():
    config = decided(images=64_000, resumed=50)[0]
    assert (config.train_batch_size, config.epochs) == (None, 1)


def test_words_say_what_was_decided_and_why():
    expected = ["lr 0.006 for JiT-XS/2", "train batch 4 for 2,000 images", "2 epoch(s) for 1,000 steps"]
    assert decided()[1] == expected


@pytest.mark.parametrize("world_size", [2, 3, 8, 1000])
def test_ranks_change_nothing(world_size):
    assert decided(world_size=world_size) == decided()


def test_what_was_decided_is_left_open_again_and_what_was_said_is_not():
    open_, images = config_of(), 5000
    assert automatic.left_open(automatic.decide(open_, {}, images, 1)[0], images) == open_
    said = config_of("--lr", "0.1", "--train_batch_size", "64", "--epochs", "50")
    assert automatic.left_open(said, images) == said


def test_short_schedules_are_said_aloud():
    config = dataclasses.replace(config_of(), epochs=1, train_batch_size=32)
    (line,) = automatic.short_schedule(8, config)
    for word in ("only 8 optimiser steps", "--epochs above 1", "--train_batch_size smaller than 32", "more text"):
        assert word in line
    assert automatic.short_schedule(200, config) == []
