"""The server app: FedAvg over all devices, without the evaluation on devices, which would send the model once more.

After each round it writes the weights into the folder of the run configuration's `output`, under a name that appears
when the file is whole; that is how the watcher knows that a round has ended.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from digits_app.net import digits_net  # type: ignore[import-not-found]  # where the files are copied to
from flwr.app import ArrayRecord, Context  # type: ignore[import-not-found]  # in Flower's environment only
from flwr.serverapp import Grid, ServerApp  # type: ignore[import-not-found]
from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found]

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    config = context.run_config
    output = Path(str(config["output"]))

    def keep(number: int, arrays: ArrayRecord) -> None:
        unfinished = output / "unfinished.npz"
        np.savez(unfinished, **{name: tensor.numpy() for name, tensor in arrays.to_torch_state_dict().items()})
        unfinished.rename(output / f"round-{number}.npz")

    torch.manual_seed(config["seed"])
    devices = config["devices"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(digits_net().state_dict()),
        num_rounds=config["rounds"],
        evaluate_fn=keep,
    )
