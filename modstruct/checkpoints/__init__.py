"""The folder format of a checkpoint: everything that a run resumes from, complete or not there; and published weights.

    OUTPUT/checkpoints/step-00000500/
        pieces-00000.safetensors    of each process: SECTION/NAME, the range of that flattened tensor which it had
        index.json                  by section and name: kind, shape, and [file, start, end, CRC-32] of each piece
        state.json                  step, which is the position in the data too; optimizer groups, counters
        recipe.yaml                 the run's recipe
        tokenizer/                  the tokenizer

Sections: weights (float32, with buffers), moments (exp_avg.NAME, exp_avg_sq.NAME), rng (random state of each process)
and momentum (EMA weights, and queues of a fusion model). Keys are names, not processes, so any number of processes and
any ZeRO stage reads it. Nothing is pickled. The folder is written aside by all processes, synced to disk and renamed,
so that a name step-… is always a whole checkpoint. Format 1 had a file for each section, and no checksums.
"""

from modstruct.checkpoints.folders import (
    EMA,
    Checkpoint,
    Saved,
    TrainState,
    Written,
    read,
    read_measured,
    read_weight_file,
    read_weights,
    require_finite,
    require_same_names,
    write,
)
from modstruct.checkpoints.kept import (
    clean,
    find,
    folder,
    list_checkpoints,
    note_score,
    read_best,
    remove_old,
    replace_folder,
    step_folder,
    step_of,
    was_validated,
)
from modstruct.checkpoints.tensors import LazyTensors, Piece, StoredTensors, described, save_tensors

__all__ = [
    "EMA",
    "Checkpoint",
    "LazyTensors",
    "Piece",
    "Saved",
    "StoredTensors",
    "TrainState",
    "Written",
    "clean",
    "described",
    "find",
    "folder",
    "list_checkpoints",
    "note_score",
    "read",
    "read_best",
    "read_measured",
    "read_weight_file",
    "read_weights",
    "remove_old",
    "replace_folder",
    "require_finite",
    "require_same_names",
    "save_tensors",
    "step_folder",
    "step_of",
    "was_validated",
    "write",
]
