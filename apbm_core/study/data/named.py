"""The data sets that are known by name, a row each: what a complete copy holds, and what says that it is the right one.

CIFAR-10 and CIFAR-100: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009. Their fingerprints
are of copies whose training mean and standard deviation are, to all digits, the values in common use for the originals.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedDataset:
    """What is known of a data set.

    Attributes:
        title: its name in sentences, tables and plots.
        classes: class names in the order of the labels.
        counts: training and test images in the complete set.
        side: height and width of its images, in pixels.
        mean, std: channel means and standard deviations of the complete set's training images, on the scale 0..1.
        label_column: the labels' column in the Hugging Face layout.
        torchvision_class: its class in ``torchvision.datasets``, if it is one of CIFAR's kind.
        fingerprints: ``images.fingerprint`` of the complete training and test set, where known.
        is_embedded: whether it comes with a library, so that no files are looked for.
    """

    title: str
    classes: tuple[str, ...]
    counts: tuple[int, int]
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label_column: str = "label"
    torchvision_class: str | None = None
    fingerprints: tuple[str, str] | None = None
    is_embedded: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.side, self.side


_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

NAMED: dict[str, NamedDataset] = {
    "cifar10": NamedDataset(
        title="CIFAR-10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        counts=(50_000, 10_000),
        side=32,
        mean=(0.49140, 0.48216, 0.44653),
        std=(0.24703, 0.24349, 0.26159),
        torchvision_class="CIFAR10",
        fingerprints=(
            "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
            "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
        ),
    ),
    "cifar100": NamedDataset(
        title="CIFAR-100",
        classes=tuple(_CIFAR100_CLASSES.split()),
        counts=(50_000, 10_000),
        side=32,
        mean=(0.50708, 0.48655, 0.44092),
        std=(0.26733, 0.25644, 0.27615),
        label_column="fine_label",
        torchvision_class="CIFAR100",
        fingerprints=(
            "36ce7a701fbea47796e570c34382aad50f2539687cfcbc6ae96e2f56530d29b6",
            "d3cd5d87a1b9317a0982c8ef5535fe3b86da8da90b13ce5e9b23ea06400dd5eb",
        ),
    ),
    "digits": NamedDataset(
        title="scikit-learn digits",
        classes=tuple("0123456789"),
        counts=(1438, 359),
        side=32,
        mean=(0.30586, 0.30586, 0.30586),
        std=(0.37614, 0.37614, 0.37614),
        is_embedded=True,
    ),
}


def dataset_label(name: str) -> str:
    """How tables and plots call a data set; a folder of images goes by its name."""
    return NAMED[name].title if name in NAMED else name


def known_side(name: str) -> int | None:
    """Height and width, in pixels, of a data set whose images are known by name; None for a folder."""
    return NAMED[name].side if name in NAMED else None
