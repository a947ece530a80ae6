"""A user's script: its `make` stands beside the call. Arguments: sizes, marks, report, guard."""

import json
import sys
from dataclasses import asdict

from lightning_diag.tuning.batch_size import profile_batch_sizes


def make(batch_size, marks):
    """8 fails, 16 trains with too few samples, a larger size never ends its warm-up epoch."""
    from tests.tuning import batch_size_jobs as jobs  # the script itself needs no torch

    if batch_size == 8:
        return jobs.make(batch_size, marks=marks, fails_in=1)
    return jobs.make(batch_size, marks=marks, samples=12 if batch_size == 16 else 10**8)


def run():
    sizes, marks, report = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    rows = profile_batch_sizes(make, sizes, epochs=1, arguments={"marks": marks}, output=report)
    print(json.dumps([asdict(row) for row in rows]))
    assert "torch" not in sys.modules


if __name__ == "__main__" or sys.argv[4:] == ["unguarded"]:
    run()
