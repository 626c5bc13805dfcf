"""Compress torchvision's ResNet-18 in a plain PyTorch loop: fuse before it, rescore in it, compact after it.

python examples/own_training_loop.py path/to/images      # a folder for each class: path/to/images/cat/1.jpg
python examples/own_training_loop.py --demo              # scikit-learn's digits, to see it run
"""

import argparse
from itertools import islice
from pathlib import Path

import sklearn.datasets
import torch
import torchvision
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import apbm_core
from apbm_core.counting import count_parameters


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=Path, help="a folder that holds a folder for each class")
    parser.add_argument("--demo", action="store_true", help="use scikit-learn's digits instead")
    parser.add_argument("--keep", type=float, default=0.5, help="share of each layer's filters to keep")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10**6, help="stop each epoch after so many batches")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="the images' sides in pixels")
    args = parser.parse_args(arguments)
    if args.demo == (args.images is not None) or not (args.demo or args.images.is_dir()):
        parser.error("give either a folder that exists or --demo")
    if not 0 < args.keep <= 1 or min(args.epochs, args.batch_size - 1, args.steps, args.size - 31) < 1:
        parser.error("keep is above 0 and at most 1, epochs and steps from 1, batch-size from 2, size from 32")
    torch.manual_seed(0)
    data, classes = digits(args.size) if args.demo else folder(args.images, args.size)
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    if len(train) < args.batch_size:
        parser.error(f"{len(train)} training images do not fill one batch of {args.batch_size}")
    model = torchvision.models.resnet18(num_classes=classes)
    slim = apbm_core.fuse(model, example_inputs=data[0][0][None], keep=args.keep)  # 1 of 3
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(args.epochs):
        apbm_core.rescore(slim, progress=epoch / args.epochs)  # 2 of 3
        slim.train()
        for images, labels in islice(DataLoader(train, args.batch_size, shuffle=True, drop_last=True), args.steps):
            loss = cross_entropy(slim(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy(slim, test):.1%}")
    net = apbm_core.compact(slim)  # 3 of 3

    print(f"{count_parameters(model):,} -> {count_parameters(net):,} parameters, accuracy {accuracy(net, test):.1%}")
    return net  # apbm_core.export writes it to a file


def folder(path: Path, size: int) -> tuple[Dataset, int]:
    steps = v2.ToImage(), v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])
    data = ImageFolder(path, v2.Compose(steps))
    return data, len(data.classes)


def digits(size: int) -> tuple[Dataset, int]:
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    return TensorDataset((interpolate(images, size=size) - 0.3) / 0.35, torch.tensor(data.target)), 10


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Dataset) -> torch.Tensor:
    model.eval()
    return torch.cat([(model(images).argmax(1) == labels).float() for images, labels in DataLoader(data, 256)]).mean()


if __name__ == "__main__":
    main()
