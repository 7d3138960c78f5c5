"""How class accuracy of samples rises with the guidance scale, judged by a classifier of the data.

    ddsm train digits --out run --set num_classes=10
    python benchmarks/guidance.py run --scales 1,2,4 --out guidance.json

The classifier is trained on the run's own images and labels. Beside every scale stands the Fréchet
distance on its features, since too much guidance moves samples away from the data.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from ddsm_tf.files import write_json
from ddsm_tf.images import to_float
from ddsm_tf.labels import labels_in_turn
from ddsm_tf.metrics import FrechetDistance, train_classifier
from ddsm_tf.training.run import Run


def main() -> None:
    options = _options()
    run = Run.open(options.run)
    model, data = run.load_model(), run.load_data()
    network = train_classifier(data.images, data.labels, seed=0)
    distance = FrechetDistance(network, data.images)
    labels = labels_in_turn(run.config.num_classes, 0, options.images)
    widths = model.unet.widths
    rows = []
    for scale in options.scales:
        for guidance_width in {widths[0], widths[-1]} if scale != 1.0 else {widths[0]}:
            schedule = run.schedule(
                "full", guidance_scale=scale, guidance_width=None if scale == 1 else guidance_width
            )
            accuracies, distances = [], []
            for seed in range(options.seeds):
                images = model.sample(schedule, options.images, seed, labels=labels)
                logits = network.classifier.predict(to_float(images), batch_size=512, verbose=0)
                accuracies.append(float(np.mean(logits.argmax(axis=1) == labels)))
                distances.append(distance(images))
            rows.append(
                {
                    "scale": scale,
                    "guidance_width": guidance_width,
                    "accuracy": float(np.mean(accuracies)),
                    "accuracy_spread": float(np.std(accuracies)),
                    "distance": float(np.mean(distances)),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "images": options.images,
        "seeds": options.seeds,
        "classifier_accuracy": network.accuracy,
        "rows": rows,
    }
    write_json(options.out, result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a model with classes")
    parser.add_argument(
        "--scales",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.0, 1.0, 2.0, 4.0],
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", default="guidance.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
