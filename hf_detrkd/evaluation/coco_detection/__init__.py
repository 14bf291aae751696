"""The COCO detection metric: a folder that `evaluate.load` takes, laid out as a Space."""
