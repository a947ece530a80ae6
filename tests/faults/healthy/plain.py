"""An example of a healthy run."""

from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.networks import MLP, Learner
from tests.faults.witness import Witness


def _learns(witness: Witness) -> None:
    assert witness.fell(0.5), "the loss does not fall to half"


@healthy("mlp_adam", "mlp", verify=_learns)
def _mlp(config: Config) -> Job:
    x, y = data.blobs(2048, noise=2.0)
    train, val = data.loader(x[:1536], y[:1536]), data.loader(x[1536:], y[1536:], shuffle=False)
    return Job(Learner(MLP([16, 64, 64, 4]), F.cross_entropy, config), train, val)
