from __future__ import annotations

import numpy as np

from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.input_builder import InputBuilder
from pellucid.kvcache.cache_manager import CacheManager
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
    assert sampling.sequence_index.tolist() == [0, 1, 2]
    assert sampling.position.tolist() == [3, 3, 3]


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
    left, right = make_group([1, 2], params).sequences[0], make_group([1], SamplingParams()).sequences[0]
    left.group.seed, right.group.seed = 2**64 - 1, 1
    for _ in range(2):
        sampling = builder.build_sampling([left, right])
        assert sampling.temperature.tolist() == [0.5, 1.0]
        assert sampling.top_k.tolist() == [3, 0]
        assert sampling.top_p.tolist() == [0.25, 1.0]
        assert sampling.min_p.tolist() == [0.125, 0.0]
        assert sampling.seed.tolist() == [2**64 - 1, 1]
        assert sampling.seed.dtype == np.uint64
        assert sampling.num_logprobs.tolist() == [0, -1]
    assert sampling.position.tolist() == [2, 1]
    left.token_ids.append(5)
    assert builder.build_sampling([left, right]).position.tolist() == [3, 1]
    assert builder.build_sampling([right]).seed.tolist() == [1]
