"""An example of a fault, to be followed by others: a learning rate that no network survives."""

from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.networks import MLP, Learner
from tests.faults.witness import Witness


def _rises(witness: Witness) -> None:
    assert witness.mean_loss(-20) > 3 * witness.mean_loss(0, 5), "the loss does not rise"


@fault(
    "sgd_rate_ten_times_too_large",
    "mlp",
    cause="learning_rate_too_high",
    found=("divergence", "exploding_gradient", "update_too_large"),
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 3.0}},
    verify=_rises,
    repairable=True,
    cured=lambda witness: _falls(witness),
)
def _sgd_rate(config: Config) -> Job:
    x, y = data.blobs(1024)
    net = MLP([16, 64, 64, 4], config["model"].get("activation", "relu"))
    train = data.loader(x, y, batch_size=config["hardware"]["batch_size"])
    return Job(Learner(net, F.cross_entropy, config), train)


def _falls(witness: Witness) -> None:
    assert witness.fell(0.7), "the mended run does not learn"
