"""Random files as texts: records, or one UserError that names the file."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_tokimg.data.records import ReadOptions, Tally, parts_of
from ds_tokimg.data.sources import find
from ds_tokimg.errors import UserError

BOUNDED = settings(deadline=None, derandomize=True, max_examples=60)
SUFFIXES = [".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt.gz", ".jsonl.zst", ".json.xz"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["text", "prompt", "answer", "messages", "role", "content"]) | st.text(max_size=3)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
LINES = st.lists(JSON.map(json.dumps) | st.text(max_size=10), max_size=5).map("\n".join)
CONTENTS = (
    st.binary(max_size=80)
    | JSON.map(json.dumps).map(str.encode)
    | LINES.map(lambda text: text.encode("utf-8", "surrogatepass"))
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@BOUNDED
@given(data=CONTENTS, skip=st.booleans(), document=st.sampled_from([None, "line", "paragraph", "file"]))
def test_any_file_is_records_or_a_user_error(suffix, data, skip, document, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"texts{suffix}"
    path.write_bytes(data)
    tally = Tally(skip_bad=skip)
    try:
        source = find(path, ReadOptions(document=document, skip_bad_records=skip))
        records = [record for group in range(len(source.groups)) for record in source.read(group, tally)]
    except UserError as error:
        assert str(path) in str(error)
        return
    for record in records:
        prompt, scored = parts_of(record)
        assert scored.strip() and (prompt + scored).encode("utf-8")
