"""A site of federated rounds, with torch: fetch the open round's base, train on what is here, submit the difference.

    nearshard federated enroll berlin       # once; the lines it prints go to who runs the origin
    python examples/site.py ROUTER MODEL DATA.npz --epochs 3

DATA.npz has ``x`` (float32, a row an example) and ``y`` (class numbers); the model is two linear layers, with tensors
``hidden.weight``, ``hidden.bias``, ``out.weight`` and ``out.bias``. Put your own model and training in their place:
what counts is a state dict with the names that the model was published with.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from torch import nn

from nearshard import NearshardError, SyncClient


class Classifier(nn.Module):
    """Two layers, of the sizes that the base revision has."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        width, features = state["hidden.weight"].shape
        self.hidden = nn.Linear(features, width)
        self.out = nn.Linear(width, state["out.weight"].shape[0])
        self.load_state_dict(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the classes."""
        return self.out(torch.relu(self.hidden(x)))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> float:
    """A few epochs; the loss at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    return float(loss)


def main() -> int:
    """One round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("router")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    data = np.load(given.data, allow_pickle=False)
    x, y = torch.from_numpy(data["x"]).float(), torch.from_numpy(data["y"]).long()
    client = SyncClient(given.router)
    try:
        opened = client.rounds(given.model).open
        if opened is None:
            sys.stdout.write("no round is open\n")
            return 0
        model = Classifier(client.load_task(f"{given.model}@{opened.base}", framework="torch"))
        loss = train(model, x, y, given.epochs)
        done = client.submit(given.model, model.state_dict(), opened.base, examples=len(x))
    except NearshardError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"round {done.round}: loss {loss:.3f}, {done.size} bytes sent\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
