"""Average precision: an `evaluate.Metric` (the folder `coco_detection`) and its streaming use in training."""
