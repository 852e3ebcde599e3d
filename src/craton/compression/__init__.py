"""Make a model smaller and faster, with known, measured loss: quantise, prune, distil, merge, convert."""
