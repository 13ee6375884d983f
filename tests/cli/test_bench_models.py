"""`memtier bench models`: every number is there, for each reader, and is of this run."""

from dataclasses import replace

import pytest

from memtier.bench.models import READERS, ModelsOptions, run_models
from memtier.bench.rows import read_rows
from memtier.errors import ConfigError

TINY = ModelsOptions(
    families=("llama",), contexts=(96, 160), width=32, layers=2, heads=2, kv_heads=2, window_tokens=64, span_blocks=1,
    decode_tokens=8, rounds=2,
)  # fmt: skip


def test_speeds_and_bytes_of_each_reader_inside_and_beyond_the_window():
    stages = []
    report = run_models(TINY, lambda stage, done, total: stages.append((stage, done, total)))
    family = report["families"]["llama"]
    assert set(family) == {"parameters", "inside", "96", "160"}
    assert set(family["inside"]) == {"48"}
    for told in (family["inside"]["48"], family["96"], family["160"]):
        assert set(READERS) < set(told)
        for reader in READERS:
            assert all(told[reader][name] > 0 for name in ("prefill_tokens_per_second", "decode_tokens_per_second"))
            assert told[reader]["cache_bytes"] > 0
        assert told["decode_speed_over_full"] > 0
    # 16 tokens were decoded at each stop before
    token_bytes = 2 * 2 * 32 * 4
    assert family["160"]["full"]["cache_bytes"] == (160 + 16) * token_bytes
    assert family["96"]["memtier"]["cache_bytes"] == family["160"]["memtier"]["cache_bytes"]
    assert stages[-1] == ("llama", 160, 160)
    assert report["settings"]["window_tokens"] == 64
    assert report["machine"]["cores"]


def test_each_run_is_added_to_a_file(tmp_path):
    out = tmp_path / "models.csv"
    tiny = replace(TINY, contexts=(64,), rounds=1, out=out)
    run_models(tiny, lambda *_: None)
    report = run_models(tiny, lambda *_: None)
    rows = read_rows(out)
    assert [(row["run"], row["family"], row["tokens"]) for row in rows] == [
        (run, "llama", tokens) for run in "12" for tokens in ("56", "64")
    ]
    told = report["families"]["llama"]["64"]
    assert float(rows[-1]["full_decode"]) == pytest.approx(told["full"]["decode_tokens_per_second"], abs=0.1)
    assert float(rows[-1]["decode_over_full"]) == pytest.approx(told["decode_speed_over_full"], abs=1e-3)
    assert report["settings"]["out"] == str(out)


def test_choices_that_make_no_sense_are_refused():
    for change, reason in (({"families": ("nano",)}, "there are llama"), ({"contexts": (96, 32)}, "must grow")):
        with pytest.raises(ConfigError, match=reason):
            run_models(ModelsOptions(**{**{f: getattr(TINY, f) for f in TINY.__slots__}, **change}), lambda *_: None)
