"""The client app: trains on the device's own samples, which the node's settings name."""

from __future__ import annotations

import numpy as np
import torch
from digits_app.net import digits_net  # type: ignore[import-not-found]  # where the files are copied to
from flwr.app import (  # type: ignore[import-not-found]  # in Flower's environment only
    ArrayRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # type: ignore[import-not-found]

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Some epochs of SGD from the received weights; returns all weights."""
    torch.set_num_threads(1)  # as the other side; batches this small are no work to share
    config = context.run_config
    part = np.load(str(context.node_config["data"]))
    inputs, targets = torch.from_numpy(part["inputs"]), torch.from_numpy(part["targets"])
    net = digits_net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=config["learning-rate"], momentum=config["momentum"])
    loss = torch.tensor(0.0)
    for _ in range(config["local-epochs"]):
        order = torch.randperm(len(inputs))
        for first in range(0, len(order), config["batch-size"]):
            batch = order[first : first + config["batch-size"]]
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(inputs[batch]), targets[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    metrics = MetricRecord({"loss": float(loss.detach()), "num-examples": len(inputs)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
