"""Ordinary Lightning projects, written as their authors would who never heard of this package."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.lightning import LightningModule

STEPS = 120
WORDS, LENGTH, BATCH = 60, 12, 8


def loader(*tensors: Tensor, batch: int = BATCH) -> DataLoader:
    """Shuffled by a generator of its own."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(*tensors), batch, shuffle=True, generator=generator)


def sentences(rows: int = STEPS * BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, padding mask, and a label that one word decides."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, WORDS, (rows, LENGTH), generator=generator)
    lengths = torch.randint(5, LENGTH + 1, (rows, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    labels = ((ids == 7) & mask).any(1)
    planted = torch.rand(rows, generator=generator) < 0.5
    ids[planted, 2] = 7
    labels = labels | planted
    return ids * mask, mask.long(), labels.long()


class Bert(LightningModule):
    """Fine-tunes a Hugging Face BERT, with warm-up and padding."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        self.bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=WORDS,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=32,
            )
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        output = self.bert(input_ids=ids, attention_mask=mask, labels=labels)
        self.log("train_loss", output.loss, prog_bar=True)
        return output.loss

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}


class Llama(LightningModule):
    """Pre-trains a tiny Hugging Face Llama with grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                use_cache=False,
            )
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        ids = batch[0]
        output = self.model(input_ids=ids, labels=ids)
        self.log("train_loss", output.loss)
        return {"loss": output.loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Gat(LightningModule):
    """Classifies the nodes of one graph, full batch, as PyG examples do."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv

        self.first = GATConv(16, 8, heads=4, dropout=0.3)
        self.second = GATConv(32, 4, heads=1, concat=False, dropout=0.3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.dropout(x, 0.3, self.training)
        x = F.dropout(F.elu(self.first(x, edges)), 0.3, self.training)
        return self.second(x, edges)

    def training_step(self, data: object, batch_idx: int) -> Tensor:
        out = self(data.x, data.edge_index)
        loss = F.cross_entropy(out[data.train_mask], data.y[data.train_mask])
        self.log("train_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.005, weight_decay=5e-4)


class Gan(LightningModule):
    """Two networks, two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.discriminator = nn.Sequential(
            nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(32, 1)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        to_generate, to_tell = self.optimizers()
        z = torch.randn(len(real), 4, device=self.device)

        self.toggle_optimizer(to_generate)
        loss = self.adversarial(self.discriminator(self.generator(z)), 1.0)
        to_generate.zero_grad()
        self.manual_backward(loss)
        to_generate.step()
        self.untoggle_optimizer(to_generate)

        self.toggle_optimizer(to_tell)
        fake = self.generator(z).detach()
        told = self.adversarial(self.discriminator(real), 1.0)
        told = (told + self.adversarial(self.discriminator(fake), 0.0)) / 2
        to_tell.zero_grad()
        self.manual_backward(told)
        to_tell.step()
        self.untoggle_optimizer(to_tell)
        self.log_dict({"g_loss": loss, "d_loss": told})

    def adversarial(self, logits: Tensor, truth: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in parts]


class Autoencoder(LightningModule):
    """The first example of Lightning's own documentation, on smaller pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8 * 8, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 8 * 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = nn.functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x = batch[0].view(len(batch[0]), -1)
        self.log("val_loss", F.mse_loss(self.decoder(self.encoder(x)), x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def graphs() -> object:
    """One graph with communities, once a step."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    generator = torch.Generator().manual_seed(4)
    nodes = 80
    y = torch.randint(4, (nodes,), generator=generator)
    x = F.one_hot(y, 16).float() + torch.randn(nodes, 16, generator=generator)
    alike = y[:, None] == y[None, :]
    chance = torch.where(alike, 0.2, 0.03)
    adjacent = torch.rand(nodes, nodes, generator=generator) < chance
    data = Data(x=x, edge_index=(adjacent | adjacent.T).nonzero().T, y=y)
    data.train_mask = torch.rand(nodes, generator=generator) < 0.6
    return GraphLoader([data] * STEPS, batch_size=1)


def points() -> DataLoader:
    """A ring."""
    generator = torch.Generator().manual_seed(5)
    angle = 6.2832 * torch.rand(STEPS * BATCH, generator=generator)
    return loader(torch.stack([angle.cos(), angle.sin()], 1))


def digits() -> DataLoader:
    """The handwritten digits that come with scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return loader(images[: STEPS * BATCH], torch.tensor(found.target)[: STEPS * BATCH])


PROJECTS = {
    "bert": (Bert, lambda: loader(*sentences())),
    "llama": (Llama, lambda: loader(*sentences())),
    "gat": (Gat, graphs),
    "gan": (Gan, points),
    "autoencoder": (Autoencoder, digits),
}
