"""Starts that follow a failure by themselves."""

import pytest

from ds_tokimg.errors import UserError
from ds_tokimg.training import restarts


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*restarts.NUMBER, "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", restarts.NUMBER)
def test_a_restart_goes_on_from_the_newest_checkpoint(name, environment):
    given = ["--lr", "1"]
    assert restarts.flags(given) == given
    environment.setenv(name, "0")
    assert restarts.flags(given) == given
    environment.setenv(name, "2")
    assert restarts.flags(given) == [*given, "--resume", "auto"]
    assert restarts.flags(["--resume", "latest"])[-2:] == ["--resume", "auto"]
    for chosen in (["--resume", "best"], ["--resume=runs/a/checkpoints/step_00000004"]):
        assert restarts.flags(chosen) == chosen


def test_a_restart_that_would_gain_nothing_is_given_up(environment, tmp_path):
    restarts.note_start(tmp_path, 0)
    assert not list(tmp_path.iterdir())  # nobody would start it again
    for number, step in enumerate((0, 40, 60)):
        environment.setenv(restarts.NUMBER[0], str(number))
        restarts.note_start(tmp_path, step)
    environment.setenv(restarts.NUMBER[0], "3")
    with pytest.raises(UserError, match="restart 3 would go on from step 60 like the start before it"):
        restarts.note_start(tmp_path, 60)
    environment.setenv(restarts.NUMBER[0], "0")  # by hand
    restarts.note_start(tmp_path, 60)


def test_torchrun_says_whether_it_starts_again(environment):
    assert not restarts.may_follow()
    environment.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert not restarts.may_follow()
    environment.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert restarts.may_follow()
