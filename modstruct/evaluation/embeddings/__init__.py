"""Sets embedded once, by a checkpoint or a model of open_clip, on any number of processes."""
