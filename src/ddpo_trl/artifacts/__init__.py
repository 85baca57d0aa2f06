"""Files of a run: checkpoints, record, pictures, trackers, report, model card, and pushes to the Hub."""
