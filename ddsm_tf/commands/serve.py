"""`ddsm serve-sample`."""

from __future__ import annotations

from typing import Any

import click

from ddsm_tf.commands.shared import (
    quiet_logs,
    seed_option,
)
from ddsm_tf.console import without_stderr


@click.command("serve-sample")
@click.option("--target", required=True, metavar="HOST:PORT", help="8500 is usual for gRPC.")
@click.option("--transport", type=click.Choice(["grpc", "rest"]), default="grpc", show_default=True)
@click.option("--model", default="ddsm", show_default=True, metavar="NAME")
@click.option("--model-version", "version", type=click.IntRange(min=0), help="Not the newest.")
@click.option("--label", metavar="LABEL", help="The version with this label, such as stable.")
@click.option("-n", "count", type=click.IntRange(min=1), default=64, show_default=True)
@seed_option
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images a call."
)
@click.option("--schedule", metavar="FILE", help="Any schedule; else the model's.")
@click.option(
    "--class",
    "classes",
    metavar="K|K,K,…",
    help="Classes that the images take in turn; all of the model's if left out.",
)
@click.option(
    "--timeout", type=float, default=120.0, show_default=True, help="Seconds for each call."
)
@click.option("--tls", metavar="default|FILE.pem", help="TLS, with these authorities.")
@click.option("-o", "out", required=True, metavar="FILE.png|FILE.npy")
def serve_sample(
    count: int,
    seed: int,
    batch: int,
    schedule: str | None,
    classes: str | None,
    out: str,
    **server: Any,
) -> None:
    """Sample images from a TensorFlow Serving server."""
    from ddsm_tf.images import check_image_path, save_images
    from ddsm_tf.schedule import StepSchedule
    from ddsm_tf.serving import ServingClient

    check_image_path(out)
    steps = StepSchedule.load(schedule) if schedule else None
    server["tls"] = {None: False, "default": True}.get(server["tls"], server["tls"])
    quiet_logs()
    # The gRPC stubs import TensorFlow, which has something to say.
    with without_stderr(lambda: ServingClient(**server)) as client:
        options = {"labels": _labels(client, classes, count), "batch_size": batch}
        if steps:
            images = client.sample_schedule(steps, count, seed, **options)
        else:
            images = client.sample(count, seed, **options)
    save_images(images, out)
    click.echo(out)


def _labels(client: Any, classes: str | None, count: int) -> Any:
    """Labels where the model has classes; the server alone knows how many, and checks that."""
    from ddsm_tf.errors import invalid
    from ddsm_tf.labels import IN_TURN, MAX_CLASSES, parse_labels

    if classes == "none":
        rule = "is for `ddsm sample`; a server wants the model's number of classes instead"
        raise invalid("--class", classes, rule)
    labels = IN_TURN if classes is None else parse_labels(classes, count, MAX_CLASSES)
    if client.takes_labels():
        return labels
    if classes is not None:
        raise invalid("--class", classes, "is for a model with classes; the server's has none")
    return None
