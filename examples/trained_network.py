"""Make a trained network small: fuse it once, look what it still knows, fine-tune it. On scikit-learn's digits.

python examples/trained_network.py                       # trains a small ResNet first, for want of one of yours
python examples/trained_network.py --target 0.75         # until so much of its parameters is gone
"""

import argparse

import sklearn.datasets
import torch
import torchvision
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split

import apbm_core
from apbm_core.counting import count_parameters


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.75, help="share of the parameters to remove")
    parser.add_argument("--epochs", type=int, default=3, help="of training, and of fine-tuning as well")
    args = parser.parse_args(arguments)
    if not 0 < args.target < 1 or args.epochs < 1:
        parser.error("target lies between 0 and 1, epochs from 1")
    torch.manual_seed(0)
    found = sklearn.datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    data = TensorDataset(interpolate(images, size=32), torch.tensor(found.target))
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)

    model = torchvision.models.resnet18(num_classes=10)
    fit(model, loader, args.epochs, lr=0.05)
    example = data[0][0][None]
    net = apbm_core.fuse_trained(model, example, loader, target=args.target, widths="balanced")
    known = accuracy(net, test)
    fit(net, loader, args.epochs, lr=0.01)

    print(f"{count_parameters(model):,} -> {count_parameters(net):,} parameters")
    print(f"accuracy {accuracy(model, test):.1%} -> {known:.1%} right after, {accuracy(net, test):.1%} fine-tuned")
    return net


def fit(model: torch.nn.Module, loader: DataLoader, epochs: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: torch.utils.data.Dataset) -> float:
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in DataLoader(data, 256)]
    return torch.cat(right).mean().item()


if __name__ == "__main__":
    main()
