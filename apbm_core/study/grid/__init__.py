"""Parameters, the grid of runs they ask for, and how it is carried out."""
