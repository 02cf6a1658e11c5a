from __future__ import annotations

import numpy as np

from pellucid.core.batch import SAMPLING_DTYPE
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.input_builder import InputBuilder
from pellucid.kvcache.cache_manager import CacheManager
from tests.support.sampling import make_batch
from tests.support.sequences import make_group, make_sequence


def make_builder() -> InputBuilder:
    return InputBuilder(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=320)


def scheduled(cache: CacheManager, sequence: Sequence, num_tokens: int) -> Sequence:
    assert cache.allocate(sequence, num_tokens)
    sequence.num_scheduled_tokens = num_tokens
    return sequence


def computed(sequence: Sequence) -> None:
    sequence.num_computed_tokens += sequence.num_scheduled_tokens


def test_prefill_and_decode_side_by_side() -> None:
    cache, builder = CacheManager(10), make_builder()
    long = make_sequence(range(100, 230))
    computed(scheduled(cache, long, 129))
    short = scheduled(cache, make_sequence(range(7)), 5)
    scheduled(cache, long, 1)
    batch = builder.build([long, short], [long])
    assert batch.input_ids.tolist() == [229, 0, 1, 2, 3, 4]
    assert batch.positions.tolist() == [129, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 1, 6]
    assert batch.kv_lens.tolist() == [130, 5]
    assert batch.logits_rows.tolist() == [0]
    assert batch.block_tables.tolist() == [[[*long.block_tables[0], -1, -1], [*short.block_tables[0], -1, -1, -1, -1]]]
    assert batch.block_tables.flags.c_contiguous


def test_rows_of_block_tables_follow_every_change() -> None:
    cache, builder = CacheManager(10), make_builder()
    sequences = [scheduled(cache, make_sequence([token] * 64), 64) for token in range(3)]
    builder.build(sequences, sequences)
    for sequence in sequences:
        computed(sequence)
        sequence.token_ids.append(9)
        scheduled(cache, sequence, 1)
    for order in (sequences, sequences[1:], sequences[::-1], sequences):
        batch = builder.build(order, order)
        assert batch.block_tables.tolist() == [[[*sequence.block_tables[0], -1, -1, -1] for sequence in order]]
    cache.free(sequences[0])
    fresh = scheduled(cache, make_sequence([1]), 1)
    assert builder.build([fresh], [fresh]).block_tables.tolist() == [[[*fresh.block_tables[0], -1, -1, -1, -1]]]


def test_every_group_has_its_table() -> None:
    """With what a window has left behind given back, in the step that no block is taken too."""
    cache = CacheManager(30, windows=(None, 70, 70))
    builder = InputBuilder(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=320, num_groups=3)
    sequence, other = make_sequence(range(250)), make_sequence(range(5))
    scheduled(cache, other, 5)
    for end in (200, 201, 230):
        scheduled(cache, sequence, end - sequence.num_computed_tokens)
        batch = builder.build([sequence, other], [])
        assert batch.block_tables.shape == (3, 2, 5)
        behind = max(0, sequence.num_computed_tokens - 69) // 64
        for group, table in enumerate(sequence.block_tables):
            assert batch.block_tables[group].tolist() == [[*table, -1], [*other.block_tables[group], -1, -1, -1, -1]]
            assert table.count(-1) == (behind if group else 0)
        computed(sequence)
    assert behind == 2


def test_mutant_stale_stamp_is_caught() -> None:
    """The stamps are what tells the builder of a change: without one, a row stays as it was."""
    cache, builder = CacheManager(10), make_builder()
    sequence = scheduled(cache, make_sequence([1] * 10), 10)
    builder.build([sequence], [sequence])
    sequence.block_tables = [[7]]
    assert builder.build([sequence], [sequence]).block_tables[0, 0, 0] != 7
    sequence.table_stamp += 1
    assert builder.build([sequence], [sequence]).block_tables[0, 0, 0] == 7


def test_a_group_yet_to_fork_asks_for_one_row_each() -> None:
    cache, builder = CacheManager(10), make_builder()
    group = make_group([1, 2, 3], SamplingParams(n=3))
    scheduled(cache, group.sequences[0], 3)
    batch = builder.build([group.sequences[0]], group.sequences)
    assert batch.logits_rows.tolist() == [2, 2, 2]
    sampling = builder.build_sampling(group.sequences)
    assert sampling.rows["sequence_index"].tolist() == [0, 1, 2]
    assert sampling.rows["position"].tolist() == [3, 3, 3]


def test_one_token_each_but_not_all_chosen_from() -> None:
    """As many tokens, sequences and rows as in a step of decoding, which this is not."""
    cache, builder = CacheManager(10), make_builder()
    group, long = make_group([1, 2, 3], SamplingParams(n=2)), make_sequence(range(100, 130))
    computed(scheduled(cache, group.sequences[0], 2))
    computed(scheduled(cache, long, 5))
    sequences = [scheduled(cache, sequence, 1) for sequence in (group.sequences[0], long)]
    for _ in range(2):
        batch = builder.build(sequences, group.sequences)
        assert batch.input_ids.tolist() == [3, 105]
        assert batch.positions.tolist() == [2, 5]
        assert batch.kv_lens.tolist() == [3, 6]
        assert batch.logits_rows.tolist() == [0, 0]
        decoding = scheduled(cache, make_sequence([8]), 1)
        assert builder.build([decoding, decoding], [decoding, decoding]).logits_rows.tolist() == [0, 1]


def test_sampling() -> None:
    builder = make_builder()
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, logprobs=0)
    left = make_group([1, 2], params, seed=2**64 - 1).sequences[0]
    right = make_group([1], SamplingParams(n=2), seed=1).sequences[1]
    wanted = make_batch(2).rows
    for name, values in {
        "temperature": (0.5, 1.0),
        "top_k": (3, 0),
        "top_p": (0.25, 1.0),
        "min_p": (0.125, 0.0),
        "num_prompt_tokens": (2, 1),
        "num_logprobs": (0, -1),
        "sequence_index": (0, 1),
        "position": (2, 1),
        "seed": (2**64 - 1, 1),
    }.items():
        wanted[name] = values
    for _ in range(2):
        assert builder.build_sampling([left, right]).rows.tolist() == wanted.tolist()
    left.token_ids.append(5)
    assert builder.build_sampling([left, right]).rows["position"].tolist() == [3, 1]
    assert builder.build_sampling([right]).rows["seed"].tolist() == [1]


def test_every_column_of_the_record_is_a_parameter_or_of_the_sequence() -> None:
    others = {"sequence_index", "position", "num_prompt_tokens", "num_logprobs", "processed_logprobs", "mirostat_mu"}
    assert SAMPLING_DTYPE.names is not None
    assert {name for name in SAMPLING_DTYPE.names if name not in SamplingParams.__slots__} == others


def test_what_only_some_rows_need_is_there_for_them_alone() -> None:
    builder = make_builder()
    plain = make_sequence([1, 2])
    penalized = make_group([1, 2, 3], SamplingParams(repetition_penalty=1.5)).sequences[0]
    biased = make_group([4], SamplingParams(logit_bias={7: 1.5, 3: -2}, mirostat=2, mirostat_tau=4)).sequences[0]
    batch = builder.build_sampling([plain])
    assert (batch.tokens, batch.bias, batch.masks, batch.dry_breakers) == (None, None, None, None)
    assert builder.build_sampling([plain]) is batch
    rows = [plain, penalized, biased]
    batch = builder.build_sampling(rows)
    assert batch.tokens is not None
    assert [None if tokens is None else tokens.tolist() for tokens in batch.tokens] == [None, [1, 2, 3], None]
    assert batch.bias is not None
    assert batch.bias[:2] == [None, None]
    assert batch.bias[2] is not None
    assert [array.tolist() for array in batch.bias[2]] == [[3, 7], [-2.0, 1.5]]
    assert batch.rows["mirostat_mu"][2] == 8.0
    penalized.token_ids.append(9)
    biased.mirostat_mu = 6.5
    batch = builder.build_sampling(rows)
    assert batch.tokens is not None
    assert batch.tokens[1] is not None
    assert batch.tokens[1].tolist() == [1, 2, 3, 9]
    assert batch.rows["mirostat_mu"][2] == 6.5
    batch = builder.build_sampling([plain])
    assert (batch.tokens, batch.bias) == (None, None)


def test_token_array_follows_the_tokens() -> None:
    sequence = make_sequence(range(5))
    assert sequence.token_array().tolist() == [0, 1, 2, 3, 4]
    for token in range(5, 40):
        assert sequence.token_array([100, 101]).tolist() == [*range(token), 100, 101]
        sequence.token_ids.append(token)
    assert sequence.token_array().tolist() == list(range(40))
    assert sequence.token_array().dtype == np.int32
    del sequence.token_ids[10:]
    assert sequence.token_array().tolist() == list(range(10))
    sequence.token_ids[:2] = [8, 9]
    sequence.num_buffered_tokens = 0
    assert sequence.token_array().tolist() == [8, 9, *range(2, 10)]
