"""What a run says about itself: metrics, logs, timers, and the report."""
