"""What a run leaves for people to look at: tables, curves and sheets of detections."""
