"""How sure a classifier is of images, and how varied they are to it."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import invalid

SPLITS = 10


def classifier_score(
    logits: np.ndarray, *, splits: int = SPLITS, seed: int = 0
) -> tuple[float, float]:
    """exp E[KL(p(y|x) ‖ p(y))] (Salimans et al., 2016, arXiv 1606.03498, section 4).

    It is the Inception Score where the logits are Inception's.

    Args:
        logits: (N, K).
        splits: parts that are scored by themselves, after a shuffle.
        seed: of the shuffle.

    Returns:
        Mean and standard deviation over the parts; between 1 and K.

    Raises:
        InputError: fewer images than parts.
    """
    if len(logits) < splits:
        raise invalid("images", len(logits), f"must be at least as many as splits (={splits})")
    logits = logits.astype(np.float64)[np.random.default_rng(seed).permutation(len(logits))]
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, splits):
        p = np.exp(part)
        log_mean = np.log(np.maximum(p.mean(axis=0), 1e-300))
        scores.append(np.exp((p * (part - log_mean)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
