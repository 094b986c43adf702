"""What each stage of a run does, in terms of the library's functions; `pipeline.py` says in which order."""

from draftsmith.stages.measuring import bench, chosen_growth, tune
from draftsmith.stages.reading import (
    dev_answers,
    dev_by_set,
    features,
    read_selection,
    score,
    select,
    training_source,
)
from draftsmith.stages.texts import prompts, read_prompts, read_samples, regenerate, source
from draftsmith.stages.training import Training, reads_stored, train, training_of, vocabulary

__all__ = [
    "Training",
    "bench",
    "chosen_growth",
    "dev_answers",
    "dev_by_set",
    "features",
    "prompts",
    "read_prompts",
    "read_samples",
    "read_selection",
    "reads_stored",
    "regenerate",
    "score",
    "select",
    "source",
    "train",
    "training_of",
    "training_source",
    "tune",
    "vocabulary",
]
