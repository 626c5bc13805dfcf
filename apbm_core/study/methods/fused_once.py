"""APBM on a trained network: its unimportant filters are fused once, at the cut, into what reads the important ones.

The filters of the largest relative entropy stay as they are; each layer that reads the others takes them over from
those that predict them best on training images (:mod:`apbm_core.handover`), and the small network is fine-tuned. Its
control is entropy_cut.py.
"""

from apbm_core.study.methods.entropy_cut import scores
from apbm_core.study.methods.ranking import RankingOptions, prune_by

LABEL = "APBM, fused once"
SUMMARY = "unimportant filters of a trained network are fused once into what reads the important ones"
SOURCE = "ours, after Qu, Zhang, Wang, 2022, and the least squares of He, Zhang, Sun, Channel Pruning, ICCV 2017"
PLACE, COLOUR, MARKER, DEFAULT = 14, "#FB6A4A", "o", False

Options, prune = RankingOptions, prune_by(scores, fuses=True)
