import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.timing import (
    LinearTiming,
    StepWork,
    TableTiming,
    chunk_pairs,
    load_table,
    preset_names,
    timing_preset,
)
from pdserve.errors import ConfigError

LLAMA = "llama-3.1-8b-h100-tp1"


def test_the_linear_law_is_as_written():
    timing = LinearTiming(10, 0.1, 0.001, 20, 0.5, 0.01)
    assert timing.step_ms(StepWork.prefill(100)) == pytest.approx(10 + 10 + 0.001 * 5050)
    assert timing.step_ms(StepWork.decode(100, 300)) == pytest.approx(20 + 1 + 4)
    assert timing.step_ms(StepWork()) == 0


def test_a_mixed_step_pays_the_fixed_part_once():
    timing = LinearTiming(10, 0.1, 0, 20, 0.5, 0)
    mixed = StepWork(prefill_tokens=100, decodes=2)
    assert timing.step_ms(mixed) == pytest.approx(20 + 10 + 1)


@settings(derandomize=True)
@given(st.integers(0, 300), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_pairs_do_not_depend_on_how_a_prompt_is_cut(start, chunks):
    total, at = 0, start
    for tokens in chunks:
        total += chunk_pairs(at, tokens)
        at += tokens
    assert total == chunk_pairs(start, sum(chunks))


def test_a_table_gives_back_its_points():
    timing = timing_preset(LLAMA)
    assert timing.step_ms(StepWork.prefill(1024)) == pytest.approx(22.1093)
    assert timing.step_ms(StepWork.prefill(32768)) == pytest.approx(1082.1218)
    assert timing.step_ms(StepWork.decode(512)) == pytest.approx(6.168)
    assert timing.step_ms(StepWork.decode(*[2048] * 64)) == pytest.approx(12.5599)


@pytest.mark.parametrize(
    ("tokens", "ms"), [(128, 11.8864), (512, 42.2991), (2048, 180.6163), (8192, 766.1409), (32768, 4542.0326)]
)
def test_four_prompts_at_once_are_predicted_from_single_ones(tokens, ms):
    """These points are in the source, but not used."""
    assert timing_preset(LLAMA).step_ms(StepWork.prefill(*[tokens] * 4)) == pytest.approx(ms, rel=0.06)


def test_decodes_between_points_lie_between_them():
    timing = timing_preset(LLAMA)
    assert 8.783 < timing.step_ms(StepWork.decode(*[1000] * 64)) < 12.5599
    assert 7.7243 < timing.step_ms(StepWork.decode(*[512] * 48)) < 8.783


def test_a_cached_prefix_saves_time_but_not_its_attention():
    timing = timing_preset(LLAMA)
    whole = timing.step_ms(StepWork.prefill(8192))
    suffix = timing.step_ms(StepWork(prefill_tokens=1024, prefill_pairs=chunk_pairs(7168, 1024)))
    alone = timing.step_ms(StepWork.prefill(1024))
    assert alone < suffix < whole / 4


@settings(derandomize=True, max_examples=200)
@given(
    st.sampled_from(preset_names()),
    st.integers(0, 8192),
    st.integers(0, 8192),
    st.integers(0, 300),
    st.integers(1, 20_000),
)
def test_more_work_never_takes_less_time(name, start, tokens, decodes, context):
    timing = timing_preset(name)
    work = StepWork(tokens, chunk_pairs(start, tokens), decodes, decodes * context)
    base = timing.step_ms(work)
    assert base >= 0
    more_tokens = StepWork(tokens + 64, chunk_pairs(start, tokens + 64), decodes, decodes * context)
    more_decodes = StepWork(tokens, work.prefill_pairs, decodes + 1, (decodes + 1) * context)
    longer = StepWork(tokens, work.prefill_pairs, decodes, decodes * (context + 1000))
    assert min(timing.step_ms(more) for more in (more_tokens, more_decodes, longer)) >= base - 1e-9


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=LLAMA) as error:
        timing_preset("nothing")
    assert error.value.key == "timing"


def test_own_tables_can_be_loaded(tmp_path):
    header = "model,system,tp,phase,batch,tokens,ms\n"
    rows = [f"m,s,1,prefill,1,{n},{10 + n * 0.1}\n" for n in (100, 200, 400)]
    rows += [f"m,s,1,decode,{b},{n},{10 + b + n * 0.01}\n" for b in (1, 8) for n in (100, 1000)]
    (tmp_path / "t.csv").write_text("# measured\n" + header + "".join(rows))
    timing = load_table(tmp_path / "t.csv", "m", "s", 1)
    assert isinstance(timing, TableTiming)
    assert timing.step_ms(StepWork.prefill(300)) == pytest.approx(40)
    assert timing.step_ms(StepWork.decode(*[550] * 4)) == pytest.approx(10 + 4 + 5.5)
    with pytest.raises(ConfigError):
        load_table(tmp_path / "t.csv", "m", "s", 2)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError):
        load_table(tmp_path / "t.csv", "m", "s", 1)


def test_a_fixed_part_below_zero_counts_but_no_step_takes_less_than_nothing():
    dynamo = timing_preset("llama-3.1-8b-fp8-h200-dynamo")
    assert dynamo.step_ms(StepWork.prefill(8192)) == pytest.approx(179.586, abs=0.001)
    assert dynamo.step_ms(StepWork.prefill(8000)) == pytest.approx(175.340, abs=0.001)
    assert dynamo.step_ms(StepWork.prefill(10)) == 0.0
    assert dynamo.step_ms(StepWork.decode(8001)) == pytest.approx(6.3455, abs=0.001)
    mixed = dynamo.step_ms(StepWork(prefill_tokens=1000, decodes=1, decode_context=100))
    assert mixed == pytest.approx(1000 * 0.02211813 + 6.0904 + 0.0203 + 0.0029, abs=0.001)
