import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from lightning_diag.lightning import Callback, Trainer
from recipes.code.batches import EncodedFunctions, LengthBuckets, collate
from recipes.code.data import CodeData
from recipes.code.tokenizer import encode
from tests.recipes.test_model import tiny_model


def _functions(count: int) -> EncodedFunctions:
    texts = [f"a = {i}\n" + "b = a\n" * (i * 7 % 11) for i in range(count)]
    encoded = [encode(text, vocabulary_size=100, max_length=500) for text in texts]
    return EncodedFunctions(encoded, [i % 4 == 0 for i in range(count)])


@pytest.fixture
def own_files(tmp_path) -> dict[str, str]:
    paths = {}
    for split, count in (("train", 37), ("val", 12), ("test", 8)):
        rows = [
            {"func": f"x = {i}\n" * (1 + i % 5), "target": int(i % 4 == 0)} for i in range(count)
        ]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        paths[f"{split}_path"] = str(path)
    return paths


def _ready(**arguments) -> CodeData:
    data = CodeData(**arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def test_collate_by_hand():
    texts = ["a = 1\nb", "c"]
    rows = EncodedFunctions(
        [encode(text, vocabulary_size=100, max_length=9) for text in texts], [1, 0], [True, False]
    )
    batch = collate([rows[0], rows[1]])
    assert batch.ids.shape == (2, 6)
    assert batch.ids[1, 2:].tolist() == [0] * 4
    assert batch.statement.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, -1, -1, -1, -1]]
    assert batch.name.tolist() == [[0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.filled.tolist() == [[True, True], [True, False]]
    assert batch.target.tolist() == [1, 0]
    assert batch.injected.tolist() == [True, False]


def test_injected_is_none_where_unknown():
    assert collate([_functions(1)[0]]).injected is None


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("count", [5, 64, 333])
def test_the_order_covers_everything_and_ranks_share_it(count, replicas):
    dataset = _functions(count)
    shares = [
        list(LengthBuckets(dataset, 4, seed=1, num_replicas=replicas, rank=rank))
        for rank in range(replicas)
    ]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == len(LengthBuckets(dataset, 4, num_replicas=replicas, rank=0))
    seen = Counter(index for share in shares for index in share)
    assert set(seen) == set(range(count))
    assert seen.total() - count < replicas


def test_seed_and_epoch_alone_decide_the_order():
    dataset = _functions(200)
    first, again, other = (LengthBuckets(dataset, 8, seed=seed) for seed in (1, 1, 2))
    order = list(first)
    torch.rand(100)
    assert list(again) == order
    assert list(other) != order
    first.set_epoch(3)
    assert list(first) != order
    first.set_epoch(0)
    assert list(first) == order


def test_batches_hold_functions_of_similar_length():
    dataset = _functions(320)
    order = list(LengthBuckets(dataset, 8))
    lengths = torch.tensor(dataset.lengths)[torch.tensor(order)].view(-1, 8)
    spread = (lengths.amax(1) - lengths.amin(1)).float().mean()
    shuffled = torch.tensor(dataset.lengths)[torch.randperm(320)].view(-1, 8)
    assert spread < 0.4 * (shuffled.amax(1) - shuffled.amin(1)).float().mean()


def test_weights_draw_in_proportion():
    dataset = _functions(400)  # a quarter is positive
    order = LengthBuckets(
        dataset, 8, weights=[3.0 if target else 1.0 for target in dataset.targets]
    )
    drawn = [dataset.targets[index] for epoch in range(5) for index in _epoch(order, epoch)]
    assert len(drawn) == 2000
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.05)


def _epoch(order: LengthBuckets, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_other_randomness(workers, own_files):
    data = _ready(**own_files, batch_size=5, seed=3)
    expected = [batch.ids for batch in data.train_dataloader()]
    torch.manual_seed(99)
    other = _ready(**own_files, batch_size=5, seed=3, num_workers=workers)
    for one, two in zip(expected, other.train_dataloader(), strict=True):
        assert torch.equal(one, two.ids)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(99)))


def test_own_files(own_files):
    data = _ready(**own_files)
    assert data.fingerprint["samples"] == {"train": 37, "val": 12, "test": 8}
    assert set(data.fingerprint["sha256"]) == {"train", "val", "test"}
    (batch,) = data.val_dataloader()
    assert batch.target.tolist() == [1, 0, 0, 0] * 3
    assert len(list(data.test_dataloader())) == 1


def test_own_files_without_a_test_split(own_files):
    del own_files["test_path"]
    with pytest.raises(ValueError, match="`test_path` must be given to test"):
        _ready(**own_files).test_dataloader()


@pytest.mark.usefixtures("known_hosts")
def test_the_embedded_corpus(tmp_path):
    data = _ready(samples=200, cache_dir=str(tmp_path), batch_size=16)
    assert sum(data.fingerprint["samples"].values()) == 200
    assert re.fullmatch("[0-9a-f]{64}", data.fingerprint["sha256"])
    batch = next(iter(data.train_dataloader()))
    assert batch.injected.dtype == torch.bool
    assert all(fields.shape[1] <= 512 for fields in data.datasets["train"].fields)
    again = _ready(samples=200, cache_dir=str(tmp_path), seed=7)
    assert again.fingerprint == data.fingerprint


def test_weighting_is_one_or_the_other(own_files):
    weighted = _ready(**own_files, weighting="class_weights")
    assert weighted.class_weights == (1.0, 3.0)
    assert weighted.train_dataloader().sampler.weights is None
    sampled = _ready(**own_files, weighting="weighted_sampler", class_weights=[1.0, 5.0])
    assert sampled.class_weights is None
    weights = sampled.train_dataloader().sampler.weights
    assert sorted(set(weights.tolist())) == pytest.approx([1 / 27, 1 / 10])
    plain = _ready(**own_files, weighting="none")
    assert plain.class_weights is None
    assert plain.train_dataloader().sampler.weights is None


def test_ranks_come_from_the_trainer(own_files):
    data = _ready(**own_files)
    data.trainer = SimpleNamespace(world_size=3, global_rank=2)
    order = data.train_dataloader().sampler
    assert (order.num_replicas, order.rank, len(order)) == (3, 2, 13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weighting": "both"}, "`weighting` must be one of"),
        ({"class_weights": [1.0]}, "`class_weights` must be two positive numbers, got [1.0]."),
        ({"class_weights": [1.0, 0.0]}, "`class_weights` must be two positive numbers"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
        ({"vocabulary_size": 1}, "`vocabulary_size` must be at least 2, got 1."),
        ({"max_length": 0}, "`max_length` must be at least 1, got 0."),
        ({"train_path": "a"}, "`train_path` and `val_path` must be given together"),
        ({"test_path": "a"}, "`test_path` only with them, got None, None and a."),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CodeData(**arguments)


def test_lightning_moves_on_to_the_next_order_each_epoch(own_files, quiet):
    orders = []

    class Orders(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            orders.append(batch.target.tolist())

    data = CodeData(**own_files, batch_size=37, vocabulary_size=512, seed=3)
    trainer = Trainer(**{**quiet, "max_epochs": 2}, logger=False, callbacks=[Orders()])
    trainer.fit(tiny_model(), datamodule=data)
    for epoch, order in enumerate(orders):
        expected = LengthBuckets(data.datasets["train"], 37, seed=3)
        drawn = _epoch(expected, epoch)
        assert order == [data.datasets["train"].targets[index] for index in drawn]
    assert len(orders) == 2
    assert orders[0] != orders[1]
