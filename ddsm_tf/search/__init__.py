"""The search for step schedules: NSGA-II as a Keras Tuner oracle."""

from ddsm_tf.search.allocation import allocate
from ddsm_tf.search.baselines import PaperSearch
from ddsm_tf.search.distribution import ChiefLost
from ddsm_tf.search.evaluation import ScheduleEvaluator
from ddsm_tf.search.evolution import Evolution
from ddsm_tf.search.generations import Generations
from ddsm_tf.search.importance import ImportanceTable, measure_importance
from ddsm_tf.search.oracle import ScheduleOracle
from ddsm_tf.search.pareto import front_ranks, hypervolume, pareto_entries, read_pareto
from ddsm_tf.search.search import Confirmation, Confirmer, choose, run_trials
from ddsm_tf.search.space import ScheduleSpace
from ddsm_tf.search.tuner import ScheduleTuner

__all__ = [
    "ChiefLost",
    "Confirmation",
    "Confirmer",
    "Evolution",
    "Generations",
    "ImportanceTable",
    "PaperSearch",
    "ScheduleEvaluator",
    "ScheduleOracle",
    "ScheduleSpace",
    "ScheduleTuner",
    "allocate",
    "choose",
    "front_ranks",
    "hypervolume",
    "measure_importance",
    "pareto_entries",
    "read_pareto",
    "run_trials",
]
