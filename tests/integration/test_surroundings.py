"""Programs in poor surroundings: no home, no name, no UTF-8, ranks without a launcher, files that one rank lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distributed import free_port
from tests.support.exports import write_export
from tests.support.runs import ROOT, small_flags, write_corpus


def program(*argv, before=(), **variables) -> subprocess.Popen:
    """A command in an environment of these variables alone."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    words = [*before, sys.executable, "-m", "ds_tokimg", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "surrogateescape"}
    return subprocess.Popen(words, env=variables | {"DS_ACCELERATOR": "cpu"}, cwd="/", **pipes)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = write_export(tmp_path_factory.mktemp("export") / "exported")
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755)
    return folder


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_texts_are_printed_where_not_all_characters_can_be(variables, exported, tmp_path):
    """An untrained model writes any bytes; what is kept is UTF-8 whatever the locale is."""
    flags = ["--num_samples", "3", "--num_inference_steps", "1", "--json", tmp_path / "texts.json"]
    code, out, err = ended(program("generate", "--checkpoint", exported, *flags, **variables))
    assert code == 0, err
    texts = [text["text"] for text in json.loads((tmp_path / "texts.json").read_bytes().decode("utf-8"))]
    assert any(not text.isascii() for text in texts)
    assert (out.isascii() and "\\u" in out) or "\\x" in out


@pytest.mark.slow
def test_a_user_without_home_and_name_trains(tmp_path):
    """A user whom no list of users names, as in a container that was started with `--user 12345`."""
    nameless = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*nameless, "true"], capture_output=True).returncode:
        pytest.skip("this machine has no user namespaces")
    flags = small_flags(write_corpus(tmp_path), tmp_path / "run", "--max_steps", 1, "--num_samples", 1)
    code, _, err = ended(program("train", *flags, before=nameless, TMPDIR=str(tmp_path)))
    assert code == 0, err
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()
    assert (tmp_path / "ds_tokimg-12345").is_dir()
    assert not Path("/~").exists()  # what libraries make of a home that is not there


@pytest.mark.slow
def test_a_mistake_that_one_rank_sees_is_told_and_ends_all(tmp_path):
    """Rank 1 cannot write where its texts would be cached."""
    corpus = write_corpus(tmp_path)
    flags = small_flags(corpus, tmp_path / "run")
    cache = tmp_path / "cache"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    caches = {0: str(cache), 1: "/proc/none"}
    processes = [
        program("train", *flags, RANK=str(rank), HOME=str(tmp_path), HF_DATASETS_CACHE=caches[rank], **address)
        for rank in range(2)
    ]
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [2, 2], results
    told = results[0][2] + results[1][2]
    assert told.count("error: ") == 1 and "Traceback" not in told
    assert "cannot write the tokenised corpus to /proc/none" in told and "[rank 1, on " in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_that_all_ranks_see_is_told_once_and_ranks_need_no_launcher(tmp_path):
    """By hand, without LOCAL_RANK: first a path that is not there, then a run."""
    corpus = write_corpus(tmp_path)

    def started(data, port: int) -> list[tuple[int, str, str]]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "HOME": str(tmp_path)}
        flags = small_flags(data, tmp_path / "run", "--max_steps", 1)
        return [ended(process) for process in [program("train", *flags, RANK=str(i), **address) for i in range(2)]]

    results = started(tmp_path / "none.txt", free_port())
    assert [code for code, _, _ in results] == [2, 2], results
    assert (results[0][2] + results[1][2]).count("error: ") == 1
    results = started(corpus, free_port())
    assert [code for code, _, _ in results] == [0, 0], results
    assert "2 rank(s)" in results[0][1] and results[1][1] == ""


def test_a_latest_that_is_no_text_gives_way_to_what_is_whole(tmp_path):
    from ds_tokimg.engine import checkpoint as checkpoints

    root = tmp_path / "checkpoints"
    whole = root / "step_00000002"
    whole.mkdir(parents=True)
    (whole / "manifest.json").write_text('{"files": {}}')
    (root / "latest").write_bytes(b"step_\xff\xfe\x00\n")
    assert checkpoints.find(tmp_path, "latest") == whole
