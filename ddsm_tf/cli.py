"""The `ddsm` command. Heavy modules load inside the commands, so that `--help` is quick."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ddsm_tf.console import BAD_INPUT, DONE, FAILED, debugging, run_safely, say, without_stderr
from ddsm_tf.errors import InputError, invalid, missing_extra

try:
    import click
except ImportError:
    click = None

PROGRAM = "ddsm"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failure, 2 bad input, 130 interrupted."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Every error is one line on stderr."""
    if click is None:
        return say(PROGRAM, str(missing_extra("click", "train")), FAILED)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return run_safely(PROGRAM, lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    try:
        # Not `commands.main`, which turns an interrupt into one without its message.
        with commands.make_context(PROGRAM, arguments) as context:
            commands.invoke(context)
        return DONE
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return BAD_INPUT
    except click.ClickException as error:
        raise InputError(error.format_message()) from error


def _group() -> Any:
    """The command group; built in a function because click may be absent."""

    @click.group(context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(package_name="ddsm_tf")
    def group() -> None:
        """Step-aware diffusion: train a slimmable UNet, search which width each step needs,
        sample and export."""

    for command in (
        demo,
        presets,
        train,
        importance,
        search,
        sample,
        evaluate,
        export,
        latency,
        report,
        serve_sample,
    ):
        group.add_command(command)
    return group


if click is not None:
    schedule_option = click.option(
        "--schedule",
        metavar="FILE|full|uniform:W",
        help="Step schedule; the searched one by default, full width where none was searched.",
    )
    sampler_option = click.option(
        "--sampler",
        type=click.Choice(["ddim", "ddpm"]),
        default="ddim",
        show_default=True,
        help="Sampler of full and uniform:W.",
    )
    steps_option = click.option(
        "--steps", type=click.IntRange(min=1), help="Sampler steps; the run's default if left out."
    )
    cost_option = click.option(
        "--cost", default="macs", show_default=True, metavar="macs|parameters|latency:FILE"
    )
    run_argument = click.argument("run", metavar="RUN")
    seed_option = click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True
    )
    # `ddsm_tf.export.QUANTIZE`; click wants the names before the heavy modules are there.
    quantize_option = click.option(
        "--quantize",
        type=click.Choice(["none", "float16", "dynamic", "dynamic-mixed", "int8", "int8-mixed"]),
        default="none",
        show_default=True,
        help="Precision of tflite; mixed keeps the first and last convolution float32.",
    )
    overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")

    @click.command()
    @click.option("--out", default="ddsm-demo", show_default=True, help="Run folder.")
    def demo(out: str) -> None:
        """All three stages, export and report on real handwritten digits."""
        quiet_tensorflow()
        from ddsm_tf.training.demo import run_demo

        run_demo(out, click.echo)

    @click.command()
    def presets() -> None:
        """List the presets."""
        from ddsm_tf.training.presets import ABOUT, PRESETS

        for name, config in PRESETS.items():
            click.echo(f"{name:15} {ABOUT[name]}")
            click.echo(f"{'':15} data {config.data}, {config.steps:,} steps of {config.batch_size}")

    @click.command()
    @click.argument("preset")
    @click.option("--out", required=True, help="Run folder.")
    @click.option("--data", metavar="SOURCE", help="digits, npz:FILE[:KEY], folder:DIR, tfds:NAME")
    @click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Configuration.")
    @click.option("--steps", type=click.IntRange(min=1), help="Training steps in all.")
    @click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
    def train(
        preset: str, out: str, data: str, changes: tuple[str, ...], steps: int, resume: bool
    ) -> None:
        """Train a slimmable UNet on every width at once."""
        from ddsm_tf.training.presets import get_preset

        config = get_preset(preset).changed(changes)
        config = config.changed([f"data={data}"] if data else [])
        config = config.changed([f"steps={steps}"] if steps else [])
        quiet_tensorflow()
        from ddsm_tf.training.train import open_run
        from ddsm_tf.training.train import train as train_run

        run = open_run(out, config, resume=resume)
        train_run(run)
        click.echo(f"trained {config.steps} steps: {run.weights_path}")

    @click.command()
    @run_argument
    @sampler_option
    @steps_option
    @cost_option
    @click.option(
        "--budget",
        "budgets",
        type=click.FloatRange(0, 1, min_open=True),
        multiple=True,
        help="Share of full width's cost; may be repeated.",
    )
    @click.option(
        "--switch-penalty",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Harm of a change of width, as a share of the narrowest width's harm.",
    )
    @click.option(
        "--min-run",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Fewest steps before the width may change.",
    )
    @click.option("-o", "out", metavar="DIR", help="Write the schedules there.")
    def importance(run: str, budgets: tuple[float, ...], **options: Any) -> None:
        """Measure each width's error over t, and read schedules off it without sampling."""
        opened = _open_run(run)
        from ddsm_tf.training.importance import BUDGETS, importance_schedules

        click.echo(importance_schedules(opened, budgets=budgets or BUDGETS, **options))
        click.echo(opened.importance_path)

    @click.command()
    @run_argument
    @sampler_option
    @steps_option
    @click.option(
        "--method",
        default="nsga2",
        show_default=True,
        metavar="nsga2|importance|random|ramps|paper",
        help="All but the first are baselines; their trials join the comparison.",
    )
    @cost_option
    @click.option("--trials", type=click.IntRange(min=1), help="Schedules to try.")
    @click.option("--images", type=click.IntRange(min=2), help="Images a trial.")
    @click.option("--segments", type=click.IntRange(min=1), help="Parts with a width of their own.")
    @click.option(
        "--refinements",
        type=click.IntRange(0, 8),
        default=0,
        show_default=True,
        help="How many times each segment is split in two as the search goes on.",
    )
    @click.option("--skips", is_flag=True, help="Steps may also be left out.")
    @click.option("--budget", type=float, help="Choose the best within this share of full cost.")
    @click.option("--max-distance", type=float, help="Choose the cheapest within this distance.")
    @click.option(
        "--confirm-images",
        type=click.IntRange(min=2),
        help="Images for each of the seeds that confirm the choice; twice a trial's if left out.",
    )
    @click.option(
        "--memory",
        type=click.IntRange(min=0),
        default=1024,
        show_default=True,
        help="MiB for the states that schedules share.",
    )
    @seed_option
    @click.option("--resume", is_flag=True, help="Go on with an interrupted search.")
    def search(run: str, resume: bool, **options: Any) -> None:
        """Search which width each step needs."""
        opened = _open_run(run)
        from ddsm_tf.training.search import SearchOptions, search_run

        click.echo(search_run(opened, SearchOptions(**options), resume=resume))

    @click.command()
    @run_argument
    @schedule_option
    @sampler_option
    @steps_option
    @click.option("-n", "count", type=click.IntRange(min=1), default=64, show_default=True)
    @seed_option
    @click.option("-o", "out", required=True, metavar="FILE.png|FILE.npy")
    def sample(
        run: str, schedule: str, sampler: str, steps: int, count: int, seed: int, out: str
    ) -> None:
        """Sample images: a grid as PNG, or uint8 NHWC as NPY."""
        from ddsm_tf.images import check_image_path

        check_image_path(out)
        opened = _open_run(run)
        from ddsm_tf.training.sample import sample_to_file

        chosen = opened.schedule(schedule, sampler=sampler, steps=steps)
        sample_to_file(opened, chosen, count, seed, out)
        click.echo(out)

    @click.command()
    @run_argument
    @schedule_option
    @sampler_option
    @steps_option
    @click.option("-n", "count", type=click.IntRange(min=2), help="Images to compare.")
    @seed_option
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    def evaluate(
        run: str, schedule: str, sampler: str, steps: int, count: int, seed: int, as_json: bool
    ) -> None:
        """Distance to the real images, MACs, share of the full cost, seconds an image."""
        opened = _open_run(run)
        from ddsm_tf.training.evaluate import evaluate_run

        chosen = opened.schedule(schedule, sampler=sampler, steps=steps)
        result = evaluate_run(opened, chosen, count, seed)
        if as_json:
            click.echo(json.dumps(result, indent=2))
        else:
            for key, value in result.items():
                click.echo(
                    f"{key:15} {value:.6g}" if isinstance(value, float) else f"{key:15} {value}"
                )

    @click.command()
    @run_argument
    @click.argument("kind", type=click.Choice(["savedmodel", "tflite", "bundle"]))
    @click.option("-o", "out", metavar="DIR", help="Folder to make; this or --serving.")
    @quantize_option
    @click.option(
        "--batch", type=click.IntRange(min=1), help="Images a call, fixed in the files; else any."
    )
    @click.option(
        "--optimize",
        type=click.Choice(["prune", "cluster", "qat"]),
        help="Make files that compress well, or int8 ones, by fine-tuning every width.",
    )
    @click.option("--optimize-steps", type=click.IntRange(min=1), help="Fine-tuning steps a width.")
    @click.option(
        "--sparsity",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Share of zeros that prune makes.",
    )
    @click.option("--clusters", type=click.IntRange(2, 256), help="Values that cluster leaves.")
    @schedule_option
    @click.option(
        "--add-schedule",
        "added",
        multiple=True,
        metavar="NAME=FILE|uniform:W",
        help="A further schedule of a bundle, for `ddsm-edge --schedule NAME`; may be repeated.",
    )
    @overwrite_option
    @click.option(
        "--serving", metavar="DIR", help="Add a version to a folder that TensorFlow Serving serves."
    )
    @click.option("--model", metavar="NAME", help="With --serving: the model; ddsm if left out.")
    @click.option(
        "--label",
        metavar="LABEL",
        help="With --serving: the version's label; stable at first, then canary, if left out.",
    )
    @click.option(
        "--mount",
        metavar="PATH",
        help="With --serving: where the server sees DIR; as before, or /models, if left out.",
    )
    @click.option(
        "--batch-sampler",
        is_flag=True,
        help="With --serving: the server may join requests for samples.",
    )
    def export(
        run: str,
        kind: str,
        out: str | None,
        quantize: str,
        batch: int | None,
        optimize: str | None,
        optimize_steps: int | None,
        sparsity: float | None,
        clusters: int | None,
        schedule: str,
        added: tuple[str, ...],
        overwrite: bool,
        **serving: Any,
    ) -> None:
        """Export every width: SavedModel, TFLite, or the bundle for `ddsm-edge`."""
        tuning = {"optimize_steps": optimize_steps, "sparsity": sparsity, "clusters": clusters}
        _check_export(kind, out, quantize, overwrite, bool(added or optimize or batch), serving)
        opened = _open_run(run)
        unet, chosen = opened.load_unet(), opened.schedule(schedule)
        if out is None:
            from ddsm_tf.export.serving import write_serving

            given = {name: value for name, value in serving.items() if value is not None}
            path = write_serving(unet, opened.noise_table, chosen, given.pop("serving"), **given)
            click.echo(path)
            return
        from ddsm_tf.export import export as export_unet
        from ddsm_tf.training.optimize import fine_tuning

        with fine_tuning(opened, optimize, **tuning) as optimization:
            path = export_unet(
                kind,
                unet,
                opened.noise_table,
                chosen,
                out,
                quantize=quantize,
                batch=batch,
                schedules=_named_schedules(opened, added),
                provenance=opened.provenance,
                overwrite=overwrite,
                **optimization,
            )
        click.echo(path)

    @click.command("serve-sample")
    @click.option("--target", required=True, metavar="HOST:PORT", help="8500 is usual for gRPC.")
    @click.option(
        "--transport", type=click.Choice(["grpc", "rest"]), default="grpc", show_default=True
    )
    @click.option("--model", default="ddsm", show_default=True, metavar="NAME")
    @click.option("--model-version", "version", type=click.IntRange(min=0), help="Not the newest.")
    @click.option("--label", metavar="LABEL", help="The version with this label, such as stable.")
    @click.option("-n", "count", type=click.IntRange(min=1), default=64, show_default=True)
    @seed_option
    @click.option(
        "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images a call."
    )
    @click.option("--schedule", metavar="FILE", help="Any schedule, in one call; else the model's.")
    @click.option(
        "--timeout", type=float, default=120.0, show_default=True, help="Seconds for each call."
    )
    @click.option("--tls", metavar="system|FILE.pem", help="TLS, with these authorities.")
    @click.option("-o", "out", required=True, metavar="FILE.png|FILE.npy")
    def serve_sample(
        count: int, seed: int, batch: int, schedule: str | None, out: str, **server: Any
    ) -> None:
        """Sample images from a TensorFlow Serving server."""
        from ddsm_tf.images import check_image_path, save_images
        from ddsm_tf.schedule import StepSchedule
        from ddsm_tf.serving import ServingClient

        check_image_path(out)
        steps = StepSchedule.load(schedule) if schedule else None
        server["tls"] = {None: False, "system": True}.get(server["tls"], server["tls"])
        _quiet_logs()
        # The gRPC stubs import TensorFlow, which has something to say.
        with without_stderr(lambda: ServingClient(**server)) as client:
            if steps:
                images = client.sample_schedule(steps, count, seed)
            else:
                images = client.sample(count, seed, batch_size=batch)
        save_images(images, out)
        click.echo(out)

    @click.command()
    @run_argument
    @click.option(
        "--runtime",
        type=click.Choice(["litert", "savedmodel", "keras"]),
        default="litert",
        show_default=True,
    )
    @click.option(
        "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images a step."
    )
    @click.option(
        "--threads",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="CPU threads; 0 is the runtime's own choice: one for LiteRT, all for TensorFlow.",
    )
    @click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=30,
        show_default=True,
        help="Timed steps a width.",
    )
    @quantize_option
    @click.option("-o", "out", required=True, metavar="FILE.json")
    @overwrite_option
    def latency(run: str, out: str, runtime: str, threads: int, **options: Any) -> None:
        """Time a step of every width here, for `ddsm search --cost latency:FILE`."""
        # LiteRT has threads of its own; TensorFlow's must be known before it starts.
        opened = _open_run(run, 0 if runtime == "litert" else threads)
        from ddsm_tf.training.latency import latency_of_run

        click.echo(latency_of_run(opened, out, runtime=runtime, threads=threads, **options))

    @click.command()
    @run_argument
    def report(run: str) -> None:
        """Write one self-contained report.html."""
        opened = _open_run(run)
        from ddsm_tf.training.report import write_report

        click.echo(write_report(opened))

    commands = _group()


def _check_export(
    kind: str,
    out: str | None,
    quantize: str,
    overwrite: bool,
    for_devices: bool,
    serving: dict[str, Any],
) -> None:
    """Raise `InputError` unless -o or --serving is given, with the options that belong to it."""
    if (out is None) == (serving["serving"] is None):
        raise InputError("`-o` or `--serving` must be given, and not both")
    if out is not None:
        extra = [name for name, value in serving.items() if value]
        if extra:
            raise InputError(f"`--{extra[0].replace('_', '-')}` belongs to --serving, not to -o")
        return
    if kind != "savedmodel":
        raise invalid("kind", kind, "must be savedmodel with --serving")
    if quantize != "none":
        raise invalid("quantize", quantize, "must be none with --serving; the server runs float32")
    if for_devices:
        raise InputError(
            "`--add-schedule`, `--batch` and `--optimize` belong to -o, not to --serving"
        )
    if overwrite:
        raise InputError("`--overwrite` belongs to -o; --serving adds a version beside the others")


def _open_run(path: str, threads: int = 0) -> Any:
    from ddsm_tf.training.run import Run

    run = Run.open(path)
    quiet_tensorflow(threads)
    return run


def _named_schedules(run: Any, texts: tuple[str, ...]) -> dict[str, Any]:
    """The schedules of `NAME=FILE` texts."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, choice) in zip(texts, pairs, strict=True):
        if not name or not choice:
            raise invalid("--add-schedule", text, "must be NAME=FILE or NAME=uniform:W")
    return {name: run.schedule(choice) for name, _, choice in pairs}


def quiet_tensorflow(threads: int = 0) -> None:
    """Import TensorFlow without its start-up lines, and keep its later warnings quiet.

    Args:
        threads: that it computes with; 0 leaves the number to it.

    Raises:
        InputError: it has started already, with another number.
    """
    _quiet_logs()
    without_stderr(lambda: _start_tensorflow(threads))


def _quiet_logs() -> None:
    if not debugging():
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        for name in ("absl", "tensorflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def _start_tensorflow(threads: int) -> None:
    try:
        import tensorflow as tf
    except ImportError:
        return
    if threads:
        from ddsm_tf.latency import limit_tensorflow

        limit_tensorflow(threads)
    tf.config.list_logical_devices()


if __name__ == "__main__":
    main()
