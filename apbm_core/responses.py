r"""Responses: an unimportant filter answers in a branch of its own, which is added to the kept filters it resembles.

Mixing weights is ordinary training with another step size (methods.md 1): to add something, the unimportant filters
have to be seen by a nonlinearity before they are fused. Here that is a BatchNorm. The layer computes

.. math:: y_k = \mathrm{BN}_0(w_{s_k} x) + \mathrm{BN}_1\Bigl(\sum_{u \notin S} Q_{ku} w_u x\Bigr),
    \qquad Q_{ku} = \frac{p_{u s_k}}{\sum_{l \in S} p_{ul}}

so each unimportant filter ``u`` divides itself among the kept ones by its similarity to them, and what it answers is
normalised apart. In evaluation mode both norms are affine, so all of it is one convolution (branches.py).
"""

import torch
from torch import Tensor


def division(log_p: Tensor, selected: Tensor) -> Tensor:
    """``Q``: how each unimportant filter divides itself among the kept ones, shape (m, n).

    Columns of kept filters are zeros, all others sum to 1: nobody is lost.

    Args:
        log_p: logarithms of the similarity distributions, shape (n, n).
        selected: the kept filters, shape (m,), in slot order.
    """
    shares = torch.softmax(log_p[:, selected], dim=1).T
    return shares.index_fill(1, selected, 0.0)
