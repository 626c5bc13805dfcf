"""Random filters of a trained network stay, and the others are fused: the control of who stays in fused_once.py."""

from apbm_core.study.methods.random import scores
from apbm_core.study.methods.ranking import RankingOptions, prune_by

LABEL = "random, fused once"
SUMMARY = "filters drawn by lot are fused once into what reads the others"
SOURCE = "the control that every choice of who is fused must beat"
PLACE, COLOUR, MARKER, DEFAULT = 92, "#BDBDBD", "o", False

Options, prune = RankingOptions, prune_by(scores, fuses=True)
