"""More than fits here: 512 ranks and 10^12 tokens through the arithmetic of rows, and the table of docs/scale.md."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from hf_myllm.checkpoint import OptimizerFiles
from hf_myllm.data import sampler
from hf_myllm.data.corpus import TokenStream
from hf_myllm.data.packing import StridedRows
from hf_myllm.data.sampler import Sampler, micro_batches, shuffle
from hf_myllm.models import FAMILIES, export
from hf_myllm.optim import build_optimizer, optimizer_tensors
from hf_myllm.reporting.flops import memory_per_rank

sys.path.append(str(ROOT / "benchmarks"))
import scale

LENGTH, BATCH = 4096, 4096
RANKS = ((512, 4, 2), (384, 4, 3), (7, 64, 10))  # ranks, rows of a micro-batch, micro-batches


class Shard:
    """A file of token ids that is not there: the id at a position of the corpus is the position."""

    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.count)
        return np.arange(self.first + start, self.first + max(start, stop), dtype=np.int64)


@pytest.fixture(scope="module")
def rows():
    """10^12 tokens in 1,000 shards of uneven sizes, as rows."""
    edges = np.linspace(0, 10**12, 1001).astype(np.int64) + np.arange(1001) ** 2
    shards = [Shard(int(first), int(end - first)) for first, end in zip(edges, edges[1:], strict=False)]
    return StridedRows(TokenStream(shards, "", 0), LENGTH, LENGTH, "the corpus")


def unshuffle(positions, size, seed, epoch):
    """Invert `shuffle`: go back through the rounds of the network, until the index is inside."""
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(sampler.derive_seed(seed, epoch, "order", i)) for i in range(sampler._FEISTEL_ROUNDS)]
    values, outside = positions.astype(np.uint64), np.ones(len(positions), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for key in reversed(keys):
            left, right = right ^ (sampler._mix(left ^ key) & mask), left
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def read_by_ranks(sampler, step, ranks, size, accumulation):
    """Return the rows that all ranks read at a step, in the order of their offsets."""
    step_rows = sampler.rows_of_step(step)
    shares = [share for rank in range(ranks) for share in micro_batches(step_rows, size, rank, ranks, accumulation)]
    return np.concatenate([rows for _, rows in sorted(shares, key=lambda share: share[0])])


def test_the_order_of_rows_is_a_permutation_at_full_size(rows):
    """Its inverse, written here, leads back from a sample in both directions; at a small size the whole is checked."""
    indices = np.random.default_rng(0).integers(len(rows), size=100_000)
    for epoch in (0, 1):
        shuffled = shuffle(indices, len(rows), 0, epoch)
        assert (shuffled < len(rows)).all()
        assert (unshuffle(shuffled, len(rows), 0, epoch) == indices).all()
        assert (shuffle(unshuffle(indices, len(rows), 0, epoch), len(rows), 0, epoch) == indices).all()
    assert (np.bincount(shuffle(np.arange(50_001), 50_001, 0, 0), minlength=50_001) == 1).all()


def test_512_ranks_share_each_step_of_an_epoch(rows):
    epoch = Sampler(len(rows), BATCH, 0, total_rows=len(rows))
    num_steps = -(-len(rows) // BATCH)
    first_step, last_step = epoch.rows_of_step(0), epoch.rows_of_step(num_steps - 1)
    assert len(first_step) * (num_steps - 1) + len(last_step) == len(rows)
    assert len(epoch.rows_of_step(num_steps)) == 0
    for step in (0, 1, num_steps // 2, num_steps - 2, num_steps - 1):
        positions = np.arange(step * BATCH, min(len(rows), (step + 1) * BATCH))
        assert (epoch.rows_of_step(step) == shuffle(positions, len(rows), 0, 0)).all()
        for ranks, size, accumulation in RANKS:
            assert (read_by_ranks(epoch, step, ranks, size, accumulation) == epoch.rows_of_step(step)).all()


def test_a_run_that_goes_on_with_other_numbers_of_ranks_reads_each_row_once():
    num_rows = 50_001
    epoch, counts = Sampler(num_rows, BATCH, 0, total_rows=num_rows), np.zeros(num_rows, dtype=int)
    for step in range(-(-num_rows // BATCH)):
        ranks = RANKS[step // 5]
        counts += np.bincount(read_by_ranks(epoch, step, *ranks), minlength=num_rows)
    assert (counts == 1).all()


def test_a_row_across_two_shards_has_the_tokens_of_its_positions(rows):
    across = (rows.tokens.starts[[1, 2, 500, 999]] - 1) // LENGTH
    last = len(rows) - 1
    windows, first = rows.read([*across, last])
    assert first[:-1].tolist() == [0] * 4
    starts = np.array([*across * LENGTH, len(rows.tokens) - 1 - LENGTH])
    assert (windows == starts[:, None] + np.arange(LENGTH + 1)).all()
    assert (last * LENGTH, rows.num_used_tokens()) == (starts[-1] + first[-1], len(rows.tokens) - 1)


@pytest.mark.parametrize("num_rows", [1, 500, 1000, 8192])
def test_a_parameter_sharded_over_512_ranks_is_restored_on_384(num_rows):
    tensor = torch.arange(2 * num_rows).view(num_rows, 2)
    parts = [*torch.chunk(tensor, 512)]
    parts += [tensor[:0]] * (512 - len(parts))  # ranks without rows

    class Part:
        def __init__(self, rows):
            self.rows = rows

        def get_slice(self, name):
            return self

        def get_shape(self):
            return list(self.rows.shape)

        def __getitem__(self, part):
            return self.rows[part]

    files = object.__new__(OptimizerFiles)
    files._files = [Part(part) for part in parts]
    ends = np.cumsum([0, *map(len, torch.chunk(tensor, 384))]).tolist()
    for start, stop in list(zip(ends, ends[1:], strict=False))[::9]:
        assert torch.equal(files.rows("x", start, stop), tensor[start:stop])


def test_each_weight_of_70b_is_written_by_one_of_512_ranks():
    weights = scale.JOBS[-1].build().state_dict()
    parts = export.partition(weights, 512)
    assert len(parts) <= 512
    assert sorted(name for names in parts for name in names) == sorted(weights)


def test_the_page_has_the_table_that_the_script_computes():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.with_table(page, scale.render()) == page


def test_a_checkpoint_has_the_bytes_that_the_page_counts():
    family = FAMILIES["llama"]
    model = family.tasks["causal"](family.config(**scale.llama(64, 2, 4, 2, 128, 500)))
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    stored = [*export.weights_to_save(model).values(), *optimizer_tensors(model, optimizer).values()]
    size = sum(tensor.nbytes for tensor in stored if tensor.dim())
    assert size == 12 * model.num_parameters()


def test_the_memory_of_sharded_parameters():
    """Counted by hand: a Llama with one layer and an untied head, 100 tokens in 16 bits."""
    family = FAMILIES["llama"]
    with torch.device("meta"):
        model = family.tasks["causal"](family.config(**scale.llama(64, 1, 4, 4, 128, 500)))
    root = 2 * 500 * 64 + 64  # embeddings, head, last norm
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    memory = memory_per_rank(model, 100, shards=4, is_16_bit=True, checkpoints_layers=True)
    assert memory["weights and optimizer"] == 16 * (root + layer) / 4
    assert memory["gathered weights"] == 2 * (root + 2 * layer) + 6 * root
    assert memory["activations"] == 100 * 64 * (34 + 2)
