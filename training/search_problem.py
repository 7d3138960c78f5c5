"""What a search needs of a run: its options, and everything that they are turned into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.cost import cost_per_width
from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import read_json, write_json
from ddsm_tf.latency import time_widths
from ddsm_tf.sampling import clip_to_range
from ddsm_tf.search import Evolution, ScheduleEvaluator, ScheduleSpace
from ddsm_tf.search.baselines import (
    FixedSchedules,
    PaperSearch,
    importance_genomes,
    importance_proxy,
    ramp_schedules,
    random_schedules,
)
from ddsm_tf.search.generations import Generations
from ddsm_tf.search.importance import ImportanceTable
from ddsm_tf.search.search import NameBaseline, check_trials, spaced, uniform_names
from ddsm_tf.search.space import Genome
from ddsm_tf.training.evaluate import frechet_distance_of
from ddsm_tf.training.importance import importance_of, weights_fingerprint
from ddsm_tf.training.run import Run

METHODS = ("nsga2", "importance", "random", "ramps", "paper")
CHILDREN = 8
BATCH_SIZE = 256
IMPORTANCE_BUDGETS = 400
TIMING_ROUNDS = 5


@dataclass(frozen=True)
class SearchOptions:
    """What `ddsm search` takes; None stands for the run's default.

    Attributes:
        method: one of `METHODS`.
        sampler, steps, guidance_scale: of every schedule.
        guidance_widths: of the unconditional branch, "same" (the steps') or "free" (searched).
        cost: "macs", "parameters" or "latency:FILE".
        trials, images: how many schedules, and images each.
        seed: of the search and its common noise.
        segments: parts of the trajectory that have a width of their own.
        refinements: how many times each of them is split in two while the search goes on.
        skips: whether segments may be left out.
        budget: choose the best schedule within this share of full width's cost, in (0, 1].
        max_distance: choose the cheapest schedule within this distance.
        tolerance: by which share of full width's distance the choice may be worse, in [0, 1].
        confirm_images: for each of the confirming seeds; None is twice `images`.
        memory: MiB for states that schedules share.
        xla: see `Run.load_model`. Like `memory` it is no setting of the search, and may change when
            one is resumed.

    Raises:
        InputError: an argument leaves its range.
    """

    method: str = "nsga2"
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_widths: str = "same"
    steps: int | None = None
    cost: str = "macs"
    trials: int | None = None
    images: int | None = None
    seed: int = 0
    segments: int | None = None
    refinements: int = 0
    skips: bool = False
    budget: float | None = None
    max_distance: float | None = None
    tolerance: float = 0.0
    confirm_images: int | None = None
    memory: int = 1024
    xla: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise invalid("--method", self.method, f"must be one of {', '.join(METHODS)}")
        if self.guidance_widths not in ("same", "free"):
            raise invalid("--guidance-widths", self.guidance_widths, "must be same or free")
        if self.budget is not None and not 0.0 < self.budget <= 1.0:
            raise invalid("--budget", self.budget, "must lie in (0, 1]")
        if self.max_distance is not None and not 0.0 < self.max_distance < np.inf:
            raise invalid("--max-distance", self.max_distance, "must be a positive number")
        if not 0.0 <= self.tolerance <= 1.0:
            raise invalid("--tolerance", self.tolerance, "must lie in [0, 1]")
        if (self.budget, self.max_distance, self.tolerance or None).count(None) < 2:
            names = "`--budget`, `--max-distance` and `--tolerance`"
            raise InputError(f"{names} exclude each other; give one")
        if not 0 <= self.refinements <= 8:
            raise invalid("--refinements", self.refinements, "must lie in [0, 8]")


class SearchProblem:
    """Everything that a search needs of a run, each made when it is first asked for."""

    def __init__(self, run: Run, options: SearchOptions) -> None:
        self.run = run
        self.options = options
        self.model = run.load_model(xla=options.xla)
        unet = self.model.unet
        self.macs: Mapping[float, float] = cost_per_width("macs", unet)
        by_macs = options.cost == "macs"
        self.cost = self.macs if by_macs else cost_per_width(options.cost, unet)
        self.base = run.schedule(
            "full",
            sampler=options.sampler,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
        )
        self.free_guidance = options.guidance_widths == "free"
        if self.free_guidance and not self.base.guided:
            raise invalid("--guidance-widths", "free", "needs --guidance, other than 1")
        segments = options.segments or run.config.search_segments
        self.segments = min(segments * 2**options.refinements, len(self.base))
        self.images = options.images or run.config.search_images
        self.trials = check_trials(
            options.trials or run.config.search_trials, self.space(options.method)
        )

    def space(self, method: str) -> ScheduleSpace:
        """The schedules that a method walks; the paper's have a width for each step."""
        segments = len(self.base) if method == "paper" else self.segments
        options = {"skips": self.options.skips, "free_guidance": self.free_guidance}
        return ScheduleSpace(self.base, self.model.unet.widths, segments, **options)

    @property
    def settings_path(self) -> Path:
        return self.run.search_path / "settings.json"

    @cached_property
    def importance(self) -> ImportanceTable:
        return importance_of(self.run, self.model)

    @cached_property
    def harm(self) -> np.ndarray:
        """(W, steps), or (W, 2 · steps) where the unconditional branch has its own widths."""
        if self.free_guidance:
            return self.importance.guided_harm(self.base, self.run.noise_table)
        return self.importance.harm(self.base, self.run.noise_table)

    @cached_property
    def evaluate(self) -> ScheduleEvaluator:
        return ScheduleEvaluator(
            self.model.denoise,
            self.run.noise_table,
            self.model.unet.image_shape,
            frechet_distance_of(self.run),
            self.macs,
            self.base,
            cost=self.cost,
            seconds=self._step_seconds(),
            images=self.images,
            batch_size=BATCH_SIZE,
            max_bytes=self.options.memory * 2**20,
            branch_timesteps=self.space(self.options.method).branch_timesteps,
            num_classes=self.model.unet.num_classes,
            clip=clip_to_range if self.model.clip else None,
            decode=self.model.decode,
        )

    @cached_property
    def _classifier_digest(self) -> str:
        """Of the network that judges: distances by another one would not compare."""
        return self.evaluate.distance.network.digest()

    def _step_seconds(self) -> dict[float, float]:
        """Width → seconds of a step for one image of a batch; measured once, then kept.

        Trials that share states take less time than their schedules would, so trials are not timed.
        """
        path = self.run.search_path / "step_seconds.json"
        if not path.exists():
            batch = min(self.images, BATCH_SIZE)
            unet = self.model.unet
            timed = time_widths(
                self.model.denoise,
                unet.widths,
                unet.image_shape,
                batch=batch,
                rounds=TIMING_ROUNDS,
                t=self.run.config.train_timesteps // 2,
                num_classes=unet.num_classes,
            )
            values = {width: float(np.median(timed[width])) / 1000 / batch for width in unet.widths}
            write_json(path, {str(width): value for width, value in values.items()})
        kept = read_json(path, argument="step seconds")
        try:
            return {width: float(kept[str(width)]) for width in self.model.unet.widths}
        except (KeyError, TypeError, ValueError) as error:
            raise invalid("step seconds", str(path), "is broken; delete it") from error

    def proposer(self, method: str, settings: Mapping[str, Any]) -> Generations:
        """A method's search."""
        space, seed = self.space(method), self.options.seed
        if method == "paper":
            return PaperSearch(space, seed)
        if method == "random":
            return random_schedules(space, max(settings["trials"], self.trials), seed)
        if method == "ramps":
            return ramp_schedules(space)
        uniform = space.uniforms()
        if method == "importance":
            genomes = self._importance_genomes(space, IMPORTANCE_BUDGETS)
            # What was tried first stays first, however many trials are added.
            counts = (settings["trials"], self.trials)
            chosen = [g for n in counts for g in spaced(genomes, max(2, n - len(uniform)))]
            return FixedSchedules(space, list(dict.fromkeys([*uniform, *chosen])))
        population = settings["population"]
        room = max(0, population - len(uniform))
        return Evolution(
            space,
            population,
            seed,
            costs=self.cost,
            children=min(CHILDREN, population),
            seeds=self._importance_genomes(
                space, (room + 1) // 2, block=2**self.options.refinements
            ),
            proxy=importance_proxy(space, self.harm),
            refinements=self.options.refinements,
        )

    def _importance_genomes(self, space: ScheduleSpace, count: int, block: int = 1) -> list[Genome]:
        proxy = importance_proxy(space, self.harm)
        return importance_genomes(space, proxy, self.cost, count, block)

    def name_baseline(self, method: str, proposer: Generations) -> NameBaseline:
        """Names a method's baselines: all but what NSGA-II bred."""
        names = uniform_names(proposer.space)
        if isinstance(proposer, Evolution):
            random = dict.fromkeys(proposer.random_genomes(), "random")
            ramps = {genome: self._ramp_name(genome) for genome in proposer.ramp_genomes()}
            return {**random, **ramps, **dict.fromkeys(proposer.seeds, "importance"), **names}.get
        if method == "ramps":
            return lambda genome: names.get(genome) or self._ramp_name(genome)
        return lambda genome: names.get(genome, method)

    def _ramp_name(self, genome: Genome) -> str:
        widths = self.space("ramps").choices
        return f"ramp:{widths[genome[0]]:g}-{widths[genome[-1]]:g}"

    def prepare(self) -> None:
        """Measure what the trials need and keep it in the run folder."""
        self.evaluate, self.importance  # noqa: B018

    def method_settings(self) -> dict[str, int]:
        """What a method keeps when its search is given more trials later."""
        return {"population": min(max(self.trials // 3, 8), 24), "trials": self.trials}

    def settings(self) -> dict[str, Any]:
        """What two searches must share for their trials to be comparable."""
        return {
            "steps": self.base.to_dict(),
            # Not the latencies' file, which may lie elsewhere: what it says follows.
            "cost": self.options.cost.partition(":")[0],
            "cost_per_width": {str(width): cost for width, cost in self.cost.items()},
            "images": self.images,
            "seed": self.options.seed,
            "weights": weights_fingerprint(self.model.unet),
            "classifier": self._classifier_digest,
            "segments": self.segments,
            "refinements": self.options.refinements,
            "skips": self.options.skips,
            "guidance_widths": self.options.guidance_widths,
        }
