"""The environment variables of a launch: completed where some are left out, refused where they make no sense."""

import pytest

from ds_tokimg.engine.environment import complete, world_size
from ds_tokimg.errors import UserError

ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def completed(devices: int = 0, **given: str) -> dict[str, str]:
    variables = dict(given)
    complete(devices, variables)
    return variables


def test_a_plain_process_is_the_only_rank():
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    assert completed() == alone
    assert completed(WORLD_SIZE="1") == alone  # some platforms set it for every process
    assert completed(RANK="0") == completed(RANK="0", WORLD_SIZE="1") == alone
    assert completed(RANK="", WORLD_SIZE=" ") == completed(RANK="0", WORLD_SIZE="") == alone
    assert completed(RANK="0", WORLD_SIZE="1", **ADDRESS) == alone | ADDRESS


@pytest.mark.parametrize(
    ("given", "devices", "local"),
    [
        ({"RANK": "3"}, 1, "0"),  # Kubernetes: a pod a rank, each with a device of its own
        ({"RANK": "3"}, 0, "0"),
        ({"RANK": "5"}, 4, "1"),  # by hand: as many ranks a host as it has devices
        ({"RANK": "5", "LOCAL_RANK": "2"}, 4, "2"),
        ({"RANK": "5", "SLURM_LOCALID": "3"}, 4, "3"),
        ({"RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 4, "0"),
    ],
)
def test_the_local_rank_is_found(given, devices, local):
    variables = completed(devices, WORLD_SIZE="8", **given, **ADDRESS)
    assert variables["LOCAL_RANK"] == local and variables["RANK"] == given["RANK"]


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"WORLD_SIZE": "4", **ADDRESS}, ["RANK is not set: each process needs its own, from 0 to 3"]),
        ({"WORLD_SIZE": "4", "RANK": "4", **ADDRESS}, ["RANK is 4 and WORLD_SIZE is 4"]),
        ({"RANK": "1"}, ["RANK is 1 and WORLD_SIZE is 1"]),
        ({"WORLD_SIZE": "4", "RANK": "1"}, ["MASTER_ADDR is not set", "MASTER_PORT is not set"]),
        ({"WORLD_SIZE": "four", "RANK": "1"}, ["WORLD_SIZE is 'four'"]),
        ({"WORLD_SIZE": "4", "RANK": "-1"}, ["RANK is '-1'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'"]),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "x", **ADDRESS}, ["LOCAL_RANK is 'x'"]),
    ],
)
def test_what_makes_no_sense_is_one_message(given, problems):
    with pytest.raises(UserError) as caught:
        completed(**given)
    assert all(problem in str(caught.value) for problem in problems)


def test_world_size():
    assert [world_size({"WORLD_SIZE": text}) for text in ("8", "", "1")] == [8, 1, 1] and world_size({}) == 1
