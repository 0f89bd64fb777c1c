"""The built-in downstream tasks: questions, statements, hypotheses and captions about scenes, as published ones are.

Each task is made in memory with the scenes it speaks of (questions.py, statements.py, hypotheses.py, captioned.py)
and written as the data set it stands for is published (files.py), so that modstruct.data.downstream reads it
like anyone's; folder.py keeps what was written. What a scene shows is asked of claims.py by all of them.

Training scenes belong to the training split of modstruct/data/scenes/splits.py, validation and test scenes to theirs,
so the combinations of objects that are measured occur neither in pre-training nor in fine-tuning.
"""
