"""What the benchmarks call what they compare: keys of their files, rows of RESULTS.md."""

from __future__ import annotations

KERAS, KERAS_XLA = "Keras graph", "Keras graph XLA"
SAVEDMODEL, SAVEDMODEL_XLA = "SavedModel", "SavedModel XLA"
SAMPLER, SAMPLER_XLA = "SavedModel sampler", "SavedModel sampler XLA"
LITERT, LITERT_INT8 = "LiteRT float32", "LiteRT dynamic int8"
TORCH, TORCH_COMPILED = "PyTorch eager", "PyTorch compiled"

STEP_AWARE, FULL = "step-aware", "full width"
# Steps of 1,000 that the DDSM paper's CIFAR-10 schedule runs at each width.
PAPER_STEPS = {0.5: 534, 0.75: 181, 1.0: 274, 0.25: 11}

# What a training step does to the parameters once their gradients are known.
UPDATE = "update alone"
