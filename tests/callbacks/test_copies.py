"""What a user copies or saves while all diagnostics watch is free of them."""

import copy
import pickle

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.witness import fit
from tests.promises.cases import build
from tests.promises.networks import TOKENS, Classifier
from tests.promises.trace import seed


class Teacher(Classifier):
    """Keeps a copy of its network from the first step, and saves it at each."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            vars(self)["teacher"] = copy.deepcopy(self.net)
        self.saved = pickle.dumps(self.net)
        with torch.no_grad():
            told = self.teacher(batch[0])
        return F.mse_loss(self.net(batch[0]), told) + super().training_step(batch, batch_idx)


def test_copies_made_in_a_watched_step(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(TOKENS, (32, 5), generator=generator)
    loader = DataLoader(TensorDataset(tokens, tokens[:, 0]), batch_size=4)
    left = []
    for name, callbacks in {"a": [], "b": build("all", every_n_steps=1)}.items():
        seed()
        module = Teacher()
        fit(module, callbacks, loader, tmp_path / name)
        left.append(module)
    without, watched = left
    for one, other in zip(without.net.parameters(), watched.net.parameters(), strict=True):
        assert torch.equal(one, other)
    saved = pickle.loads(watched.saved)
    assert torch.equal(saved.head.weight, pickle.loads(without.saved).head.weight)
    # what hangs on a copy does nothing, in another process too
    saved(tokens[:4])
    watched.teacher(tokens[:4])
