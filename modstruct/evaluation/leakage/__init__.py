"""Images of an evaluation set that also occur, exactly or nearly, in a training source."""
