"""From labelled images to a model directory: the rooms of `jobs/train.py`."""
