"""A criterion of one's own as a method of a study: keep the filters whose weights vary most."""

LABEL = "weight spread"


def scores(model, layers, images, seed):
    """One number for each filter of each named convolution; the filters with the largest stay."""
    return {name: model.get_submodule(name).weight.detach().flatten(1).std(1) for name in layers}
