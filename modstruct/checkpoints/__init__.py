"""The folder format of checkpoints, read and written by name."""

from modstruct.checkpoints.folder import *  # noqa: F403
