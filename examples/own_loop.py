"""One of heterokd's losses in your training loop: `python examples/own_loop.py`; a few seconds on digits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from heterokd.methods.dkd import dkd_loss


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [B, 1, 8, 8] that are classified correctly."""
    return float((network(images).argmax(dim=1) == labels).float().mean())


def train(network: nn.Module, images: Tensor, labels: Tensor, teacher: nn.Module | None = None) -> None:
    """Train with labels, and with decoupled distillation (DKD) if there is a teacher."""
    optimizer = torch.optim.Adam(network.parameters(), 0.003)
    for step in range(300):
        batch = torch.randint(len(images), (64,))
        logits = network(images[batch])
        loss = F.cross_entropy(logits, labels[batch])
        if teacher is not None:
            known = teacher(images[batch]).detach()
            loss = loss + min(1.0, step / 100) * dkd_loss(logits, known, labels[batch], temperature=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


torch.manual_seed(0)
images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
student = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(10))
train(teacher, images[400:], labels[400:])
train(student, images[400:500], labels[400:500], teacher)  # a hundred labelled images
for name, network in (("teacher", teacher), ("student", student)):
    print(f"{name} {accuracy(network, images[:400], labels[:400]):.3f}")
