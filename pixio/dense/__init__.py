"""From frozen features to depth maps and masks: heads and sliding windows."""
