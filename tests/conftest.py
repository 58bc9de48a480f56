"""Options and fixtures of all tests."""

import os
import signal
from pathlib import Path

import pytest

# Ranks and tests share few cores; DeepSpeed looks for an accelerator otherwise.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A suite that runs in the background ignores SIGINT, and would hand that on to the programs that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run pytest with --all"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Tokenised texts are kept in a folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpus(cache, tmp_path_factory) -> Path:
    """A file of 400 different lines."""
    from tests.support.runs import write_corpus  # torch, once the environment is set

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def shared_tokenizers() -> Path:
    """A folder with real tokenizers, `qwen3` and `smollm2`; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("DS_TOKIMG_TOKENIZERS", ROOT.parent / "shared" / "tokenizers"))
    if not folder.is_dir():
        pytest.skip(f"no tokenizers in {folder} (set DS_TOKIMG_TOKENIZERS)")
    return folder
